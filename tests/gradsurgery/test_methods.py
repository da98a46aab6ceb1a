"""Every method through the same roster, and each against its definition."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradsurgery import aggregate, methods
from gradsurgery.methods import AGS, GradVac, Mean, PCGrad, Sum

NAMES = methods.available()
# T×T arithmetic is float64 throughout: a few hundred roundings.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def gram_of(count: int, seed: int, width: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return gradients @ gradients.T


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def project(gram: list[list[float]], orders: list[tuple[int, ...]]) -> list[float]:
    """PCGrad's definition with explicit loops: ags.md steps 1 to 3."""
    count = len(gram)
    totals = [0.0] * count
    for i in range(count):
        row = [1.0 if k == i else 0.0 for k in range(count)]
        for j in orders[i]:
            if j == i or gram[j][j] == 0:
                continue
            dot = sum(row[k] * gram[k][j] for k in range(count))
            if dot < 0:
                row[j] -= dot / gram[j][j]
        totals = [a + b for a, b in zip(totals, row, strict=True)]
    return totals


def rescaled(gram: list[list[float]], weights: list[float]) -> list[float]:
    count = range(len(gram))
    before = sum(gram[i][j] for i in count for j in count)
    after = sum(weights[i] * gram[i][j] * weights[j] for i in count for j in count)
    return [w * math.sqrt(before / after) for w in weights]


# ------------------------------------------------------------------ the roster


@pytest.mark.parametrize("name", NAMES)
class TestRoster:
    @pytest.mark.parametrize("count", [1, 2, 3, 8, 40])
    def test_shape_type_and_finite(self, name: str, count: int) -> None:
        weights = methods.resolve(name).weights(gram_of(count, 0).float(), generator=seeded())
        assert weights.shape == (count,)
        assert weights.dtype == torch.float64
        assert weights.isfinite().all()

    def test_one_task_keeps_its_gradient(self, name: str) -> None:
        weights = methods.resolve(name).weights(torch.tensor([[4.0]]))
        assert weights.tolist() == [1.0]

    def test_a_batch_is_its_elements(self, name: str) -> None:
        """T = 2, where no order is drawn: leading dimensions must not mix."""
        batch = torch.stack([gram_of(2, seed) for seed in range(6)]).view(3, 2, 2, 2)
        together = methods.resolve(name).weights(batch)
        for i in range(3):
            for j in range(2):
                single = methods.resolve(name).weights(batch[i, j])
                torch.testing.assert_close(together[i, j], single, **CLOSE)

    def test_same_seed_same_bits(self, name: str) -> None:
        gram = gram_of(6, 1)
        first = methods.resolve(name).weights(gram, generator=seeded(5))
        again = methods.resolve(name).weights(gram, generator=seeded(5))
        assert torch.equal(first, again)

    def test_zero_gradients(self, name: str) -> None:
        gram = gram_of(4, 2)
        gram[1, :] = gram[:, 1] = 0
        assert methods.resolve(name).weights(gram, generator=seeded()).isfinite().all()
        nothing = methods.resolve(name).weights(torch.zeros(3, 3), generator=seeded())
        assert nothing.isfinite().all()

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_not_finite_stays_not_finite(self, name: str, bad: float) -> None:
        """Invariant 8: the combined gradient of rows that are not finite is not finite."""
        gradients = torch.ones(3, 4)
        gradients[1, 2] = bad
        combined = aggregate(gradients, name, generator=seeded())
        assert not combined.isfinite().all()

    @pytest.mark.parametrize("scale", [1e-24, 1e-6, 1e6, 1e24])
    def test_invariant_to_a_common_scale(self, name: str, scale: float) -> None:
        gram = gram_of(4, 3)
        plain = methods.resolve(name).weights(gram, generator=seeded())
        scaled = methods.resolve(name).weights(gram * scale, generator=seeded())
        torch.testing.assert_close(plain, scaled, **CLOSE)

    def test_without_conflict_the_projections_are_the_sum(self, name: str) -> None:
        gram = torch.eye(3, dtype=torch.float64) + 0.25
        weights = methods.resolve(name).weights(gram, generator=seeded())
        wanted = 1 / 3 if name == "mean" else 1.0
        assert weights.tolist() == [wanted] * 3

    def test_state_round_trip_continues_to_the_bit(self, name: str) -> None:
        method = methods.resolve(name)
        for seed in range(3):
            method.weights(gram_of(3, seed), generator=seeded(seed))
        twin = methods.resolve(name)
        twin.load_state_dict(method.state_dict())
        for seed in range(3, 6):
            found = twin.weights(gram_of(3, seed), generator=seeded(seed))
            assert torch.equal(found, method.weights(gram_of(3, seed), generator=seeded(seed)))

    def test_gradients_of_the_caller_are_left_alone(self, name: str) -> None:
        gram = gram_of(3, 4).requires_grad_()
        before = gram.detach().clone()
        weights = methods.resolve(name).weights(gram, generator=seeded())
        assert not weights.requires_grad
        assert torch.equal(gram.detach(), before)

    def test_repr_makes_it_again(self, name: str) -> None:
        method = methods.resolve(name)
        again = eval(repr(method), vars(methods).copy())
        assert type(again) is type(method)
        assert repr(again) == repr(method)


# ---------------------------------------------------------------- definitions


def test_available_is_sorted_and_complete() -> None:
    classes = [getattr(methods, n) for n in methods.__all__ if n[0].isupper() and n != "Method"]
    assert sorted(c.name for c in classes) == list(NAMES)


def test_sum_and_mean() -> None:
    assert Sum().weights(torch.eye(4)).tolist() == [1.0] * 4
    assert Mean().weights(torch.eye(4)).tolist() == [0.25] * 4


@settings(max_examples=200, derandomize=True, deadline=None)
@given(
    first=st.floats(1e-6, 1e6),
    second=st.floats(1e-6, 1e6),
    cosine=st.floats(-0.9999, 1.0),
)
def test_two_tasks_in_closed_form(first: float, second: float, cosine: float) -> None:
    """ags.md: w_1 = 1 + c n_2/n_1 under conflict with cosine -c, then the sum's norm."""
    off = cosine * first * second
    gram = torch.tensor([[first**2, off], [off, second**2]], dtype=torch.float64)
    c = max(-cosine, 0.0)
    wanted = [1 + c * second / first, 1 + c * first / second]
    found = PCGrad().weights(gram)
    torch.testing.assert_close(found.tolist(), wanted, **CLOSE)
    ags = AGS().weights(gram)
    # The closed form of the rescale loses digits as the sum cancels: 1/(1 - c) of them.
    slack = {"rtol": 1e-11 / (1 + cosine) if cosine < 0 else 1e-12, "atol": 0.0}
    torch.testing.assert_close(ags.tolist(), rescaled(gram.tolist(), wanted), **slack)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(count=st.integers(3, 7), seed=st.integers(0, 10_000))
def test_projections_against_explicit_loops(count: int, seed: int) -> None:
    """The orders are drawn as the library draws them, the rest is written out."""
    gram = gram_of(count, seed, width=count - 1)
    noise = torch.rand(count, count, generator=seeded(seed), dtype=torch.float64)
    orders = [tuple(row) for row in noise.argsort(-1).tolist()]
    wanted = project(gram.tolist(), orders)
    found = PCGrad().weights(gram, generator=seeded(seed))
    torch.testing.assert_close(found.tolist(), wanted, **CLOSE)
    noise = torch.rand(1, count, generator=seeded(seed), dtype=torch.float64)
    shared = [tuple(noise.argsort(-1)[0].tolist())] * count
    wanted = rescaled(gram.tolist(), project(gram.tolist(), shared))
    found = AGS().weights(gram, generator=seeded(seed))
    torch.testing.assert_close(found.tolist(), wanted, rtol=1e-7, atol=1e-9)


def test_every_order_is_drawn() -> None:
    """All 3! orders come up, about equally often."""
    gram = torch.tensor([[1.0, -0.6, -0.5], [-0.6, 2.0, -0.4], [-0.5, -0.4, 3.0]]).double()
    wanted = {
        tuple(round(w, 9) for w in project(gram.tolist(), [order] * 3)): 0
        for order in permutations(range(3))
    }
    generator = seeded(1)
    for _ in range(600):
        weights = AGS().weights(gram, generator=generator)
        before = gram.sum().sqrt()
        for key in wanted:
            candidate = torch.tensor(key, dtype=torch.float64)
            scaled = candidate * before / (candidate @ gram @ candidate).sqrt()
            if torch.allclose(scaled, weights, rtol=1e-7):
                wanted[key] += 1
                break
        else:
            pytest.fail(f"{weights} comes from no order")
    # Orders that differ only where a task meets itself coincide; none may be missing.
    assert min(wanted.values()) > 40


@settings(max_examples=100, derandomize=True, deadline=None)
@given(count=st.integers(1, 10), seed=st.integers(0, 10_000))
def test_ags_keeps_the_norm_of_the_sum(count: int, seed: int) -> None:
    gram = gram_of(count, seed, width=count + 2)
    weights = AGS().weights(gram, generator=seeded(seed))
    torch.testing.assert_close(weights @ gram @ weights, gram.sum(), rtol=1e-9, atol=0.0)


def test_two_tasks_with_equal_norms_are_the_plain_sum() -> None:
    for cosine in (-0.99, -0.5, 0.0, 0.7):
        weights = AGS().weights(torch.tensor([[1.0, cosine], [cosine, 1.0]]))
        torch.testing.assert_close(weights.tolist(), [1.0, 1.0], **CLOSE)


@pytest.mark.parametrize("angle", [1e-2, 1e-4, 1e-6])
def test_near_opposition_is_rescaled_down_to_rounding(angle: float) -> None:
    """float64 rows: the norm of the sum is kept as long as anything but rounding is left."""
    turned = torch.tensor([-math.cos(angle), math.sin(angle)], dtype=torch.float64)
    for length in (1.0, 2.0):
        gradients = torch.stack([torch.tensor([1.0, 0.0], dtype=torch.float64), length * turned])
        combined, total = aggregate(gradients), gradients.sum(0)
        # wᵀMw cancels to angle² of its terms, which are good to 1e-16.
        slack = max(1e-9, 1e-14 / angle**2)
        assert float(combined.norm()) == pytest.approx(float(total.norm()), rel=slack)
        if length == 1.0:
            torch.testing.assert_close(combined, total, rtol=10 * slack, atol=0.0)


def test_pcgrad_pair_does_not_conflict_afterwards() -> None:
    gradients = torch.tensor([[1.0, 0.2], [-3.0, 0.4]], dtype=torch.float64)
    combined = aggregate(gradients, "pcgrad")
    assert (gradients @ combined >= 0).all()


@pytest.mark.parametrize("factor", [1.0, 2.0, 3.0, 1e-3, 0.1, 1e5])
@pytest.mark.parametrize("width", [100, 300_000])
def test_exact_opposition_is_not_blown_up(factor: float, width: int) -> None:
    """The plain sum may be large; what is left after projection is noise and stays noise."""
    row = torch.randn(width, generator=seeded())
    combined = aggregate(torch.stack([row, -factor * row]))
    assert combined.isfinite().all()
    # What float32 leaves of two equal terms of size (1 + factor).
    assert float(combined.norm()) <= 1e-6 * (1 + factor) * float(row.norm())


def test_max_scale_caps_the_factor() -> None:
    gram = torch.tensor([[1.0, -1.998], [-1.998, 4.0]], dtype=torch.float64)
    free, projected = AGS().weights(gram), PCGrad().weights(gram)
    assert float(free[0] / projected[0]) == pytest.approx(7.5, rel=0.01)
    torch.testing.assert_close(AGS(max_scale=2.0).weights(gram), 2 * projected, **CLOSE)
    assert torch.equal(AGS(max_scale=10.0).weights(gram), free)


def gradvac_by_loops(
    gradients: Tensor, target: list[list[float]], orders: list[list[int]], beta: float
) -> Tensor:
    """Algorithm 1 of arXiv 2010.05874 on the vectors themselves."""
    total = torch.zeros_like(gradients[0])
    for i, order in enumerate(orders):
        altered = gradients[i].clone()
        for j in order:
            if i == j:
                continue
            other = gradients[j]
            cosine = float(altered @ other / (altered.norm() * other.norm()))
            goal = target[i][j]
            if cosine < goal:
                sine = math.sqrt(1 - goal**2)
                pull = goal * math.sqrt(1 - cosine**2) - cosine * sine
                altered = altered + other * float(altered.norm()) * pull / (
                    float(other.norm()) * sine
                )
            target[i][j] = (1 - beta) * goal + beta * cosine
        total = total + altered
    return total


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("beta", [0.01, 0.5])
def test_gradvac_against_algorithm_1(count: int, beta: float) -> None:
    method, target = GradVac(beta=beta), [[0.0] * count for _ in range(count)]
    data, ours, theirs = seeded(7), seeded(8), seeded(8)
    for _ in range(30):
        gradients = torch.randn(count, 6, generator=data, dtype=torch.float64)
        if count == 2:
            orders = [[0, 1], [0, 1]]
        else:
            noise = torch.rand(count, count, generator=theirs, dtype=torch.float64)
            orders = noise.argsort(-1).tolist()
        wanted = gradvac_by_loops(gradients, target, orders, beta)
        found = method.weights(gradients @ gradients.T, generator=ours) @ gradients
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_gradvac_does_not_learn_from_a_step_that_is_not_finite() -> None:
    method = GradVac(beta=0.5)
    method.weights(gram_of(3, 0), generator=seeded())
    before = method.state_dict()["target"]
    broken = gram_of(3, 1)
    broken[0, 0] = torch.inf
    assert method.weights(broken, generator=seeded()).isnan().all()
    assert method.state_dict()["target"] == before


def test_gradvac_with_parallel_tasks_stays_finite() -> None:
    method = GradVac(beta=1.0)
    parallel = torch.ones(2, 2, dtype=torch.float64)
    for gram in (parallel, parallel, torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), torch.eye(2)):
        assert method.weights(gram).isfinite().all()


def test_a_zero_task_changes_nothing_for_the_others() -> None:
    gram = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 4.0, 0.0], [0.0, 0.0, 0.0]])
    pair = PCGrad().weights(gram[:2, :2])
    assert torch.equal(PCGrad().weights(gram, generator=seeded())[:2], pair)


def test_names_and_instances_resolve() -> None:
    method = AGS(max_scale=3.0)
    assert methods.resolve(method) is method
    with pytest.raises(ValueError, match="did you mean 'pcgrad'"):
        methods.resolve("PCGard")
    with pytest.raises(TypeError, match=r"AGS\(\) with parentheses"):
        methods.resolve(AGS)  # type: ignore[arg-type]
