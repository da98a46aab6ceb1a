"""Every method through the same roster, and each against its definition."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import permutations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from gradsurgery import aggregate, methods
from gradsurgery.kernels import native, tasks
from gradsurgery.methods import AGS, GradVac, Mean, Method, PCGrad, Sum

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

# Weights that do not change with the scale of all gradients, but for these, which undo it.
SCALE_FREE = {"nash_mtl", "fairgrad"}
# Where nothing conflicts.
LIKE_THE_SUM = {"ags", "constant", "gradops", "gradvac", "pcgrad", "sum"}
LIKE_THE_MEAN = {"dualproj", "mean", "upgrad"}


def losses_of(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.rand(count, generator=generator, dtype=torch.float64) + 0.5


def ask(method: str | Method, gram: Tensor, seed: int = 0) -> Tensor:
    """The weights; losses are the same for the same seed."""
    losses = losses_of(gram.shape[-1], seed)
    return methods.resolve(method).weights(gram, losses=losses, generator=seeded(seed))


@pytest.fixture(params=["native", "torch"])
def version(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both versions of the T×T steps that run on the CPU."""
    if request.param == "native" and not native.available():
        pytest.skip("was built without a C compiler")
    if request.param == "torch":
        monkeypatch.setattr(tasks, "_runs_native", lambda name, gram: False)
    return request.param


@pytest.mark.parametrize("name", NAMES)
class TestRoster:
    @pytest.mark.parametrize("count", [1, 2, 3, 8, 40])
    def test_shape_type_and_finite(self, name: str, count: int) -> None:
        weights = ask(name, gram_of(count, 0).float())
        assert weights.shape == (count,)
        assert weights.dtype == torch.float64
        assert weights.isfinite().all()

    def test_one_task_keeps_its_gradient(self, name: str, version: str) -> None:
        weights = ask(name, torch.tensor([[4.0]]))
        # g·g = 1/w, 4w = w^(-1/2), exp(-0) / 2: their own equations.
        own = {"nash_mtl": 0.5, "fairgrad": 4 ** (-2 / 3), "uncertainty": 0.5}
        # They regularise by the rounding of a float32 M.
        assert weights.tolist() == pytest.approx([own.get(name, 1.0)], rel=1e-6)

    def test_a_batch_is_its_elements(self, name: str, version: str) -> None:
        """T = 2, where no order is drawn: leading dimensions must not mix."""
        if name == "random":
            pytest.skip("draws for each element of a batch")
        batch = torch.stack([gram_of(2, seed) for seed in range(6)]).view(3, 2, 2, 2)
        together = ask(name, batch)
        for i in range(3):
            for j in range(2):
                torch.testing.assert_close(together[i, j], ask(name, batch[i, j]), **CLOSE)

    @pytest.mark.parametrize("count", [3, 7])
    def test_the_order_of_tasks_does_not_matter(self, name: str, count: int, version: str) -> None:
        if name in ("ags", "gradvac", "pcgrad", "random"):
            pytest.skip("draws a random order, or weights")
        gram, losses = gram_of(count, 5), losses_of(count)
        order = torch.randperm(count, generator=seeded(1))
        first = methods.resolve(name).weights(gram, losses=losses)
        again = methods.resolve(name).weights(gram[order][:, order], losses=losses[order])
        torch.testing.assert_close(again, first[order], rtol=1e-6, atol=1e-9)

    def test_same_seed_same_bits(self, name: str) -> None:
        gram = gram_of(6, 1)
        assert torch.equal(ask(name, gram, 5), ask(name, gram, 5))

    def test_zero_gradients(self, name: str, version: str) -> None:
        gram = gram_of(4, 2)
        gram[1, :] = gram[:, 1] = 0
        assert ask(name, gram).isfinite().all()
        assert ask(name, torch.zeros(3, 3)).isfinite().all()

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_not_finite_stays_not_finite(self, name: str, bad: float, version: str) -> None:
        """Invariant 8: the combined gradient of rows that are not finite is not finite."""
        gradients = torch.ones(3, 4)
        gradients[1, 2] = bad
        combined = aggregate(gradients, name, losses=losses_of(3), generator=seeded())
        assert not combined.isfinite().all()

    @pytest.mark.parametrize("scale", [1e-24, 1e-6, 1e6, 1e24])
    def test_invariant_to_a_common_scale(self, name: str, scale: float, version: str) -> None:
        gram = gram_of(4, 3)
        plain, scaled = ask(name, gram), ask(name, gram * scale)
        if name in SCALE_FREE:
            plain, scaled = plain / plain.sum(), scaled / scaled.sum()
        torch.testing.assert_close(plain, scaled, rtol=1e-8, atol=1e-10)

    def test_tasks_that_look_alike_weigh_alike(self, name: str, version: str) -> None:
        """And where nothing conflicts, projections leave the sum or the mean."""
        gram = torch.eye(3, dtype=torch.float64) + 0.25
        same = torch.ones(3, dtype=torch.float64)
        weights = methods.resolve(name).weights(gram, losses=same, generator=seeded())
        if name == "random":
            assert weights.sum() == pytest.approx(1)
            return
        assert weights.tolist() == pytest.approx([float(weights[0])] * 3, rel=1e-9)
        if name in LIKE_THE_SUM | LIKE_THE_MEAN:
            assert weights.tolist() == [1.0 if name in LIKE_THE_SUM else 1 / 3] * 3

    def test_state_round_trip_continues_to_the_bit(self, name: str) -> None:
        method = methods.resolve(name)
        empty = method.state_dict()
        for seed in range(3):
            ask(method, gram_of(3, seed), seed)
        state = method.state_dict()
        # What distributed checkpoints need: the same leaves before the first step as later.
        assert state.keys() == empty.keys()
        assert all(isinstance(value, str | int | float | Tensor) for value in state.values())
        twin = methods.resolve(name)
        twin.load_state_dict(state)
        for seed in range(3, 6):
            assert torch.equal(
                ask(twin, gram_of(3, seed), seed), ask(method, gram_of(3, seed), seed)
            )

    def test_a_call_can_be_taken_back(self, name: str) -> None:
        method, twin = methods.resolve(name), methods.resolve(name)
        for seed in range(2):
            ask(method, gram_of(3, seed), seed)
            ask(twin, gram_of(3, seed), seed)
            taken = method.snapshot()
            ask(method, gram_of(3, 9), 9)
            method.restore(taken)
        assert method.state_dict() == twin.state_dict()
        assert torch.equal(ask(method, gram_of(3, 4), 4), ask(twin, gram_of(3, 4), 4))

    def test_state_of_a_step_that_is_not_finite_is_left_out(self, name: str) -> None:
        """GradScaler will skip that step."""
        method = methods.resolve(name)
        ask(method, gram_of(3, 0))
        before = method.state_dict()
        bad, losses = gram_of(3, 1), losses_of(3)
        bad[0, 0], losses[0] = torch.nan, torch.inf
        weights = method.weights(bad, losses=losses, generator=seeded())
        if method.reads_gram or method.reads_losses:
            assert not weights.isfinite().all()
        assert method.state_dict() == before

    def test_state_of_other_tasks_is_refused(self, name: str) -> None:
        method = methods.resolve(name)
        if not method.state_dict():
            pytest.skip("keeps no state")
        ask(method, gram_of(3, 0))
        with pytest.raises(ValueError, match="number of tasks changes"):
            ask(method, gram_of(4, 0))

    def test_losses_are_asked_for_by_name(self, name: str) -> None:
        method = methods.resolve(name)
        if not method.reads_losses:
            pytest.skip("does not look at losses")
        with pytest.raises(ValueError, match="needs losses"):
            method.weights(gram_of(3, 0))
        with pytest.raises(ValueError, match="T = 3"):
            method.weights(gram_of(3, 0), losses=losses_of(4))

    def test_gradients_of_the_caller_are_left_alone(self, name: str) -> None:
        gram = gram_of(3, 4).requires_grad_()
        before = gram.detach().clone()
        weights = ask(name, gram)
        assert not weights.requires_grad
        assert torch.equal(gram.detach(), before)

    def test_repr_makes_it_again(self, name: str) -> None:
        method = methods.resolve(name)
        again = eval(repr(method), vars(methods).copy())
        assert type(again) is type(method)
        assert repr(again) == repr(method)

    def test_nothing_waits_for_a_device(self, name: str) -> None:
        """The version that CUDA gets, on fake tensors there: it could not look at a number."""
        with FakeTensorMode(), NoWaits():
            gram = torch.zeros(2, 5, 5, device="cuda", dtype=torch.float64)
            losses = torch.zeros(2, 5, device="cuda", dtype=torch.float64)
            with unhidden():
                weights = methods.resolve(name).weights(gram, losses=losses)
            assert weights.shape == (2, 5)
            assert weights.device.type == "cuda"


class NoWaits(TorchDispatchMode):
    """Fails where a number would be read from a device, or a device be waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        waits = ("_local_scalar_dense", "nonzero", "linalg_eigh", "linalg_svd", "masked_select")
        assert not any(word in name for word in waits), name
        return func(*args, **(kwargs or {}))


@contextmanager
def unhidden() -> Iterator[None]:
    """The steps as what they are made of, and not as one op."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "solve", tasks.solve._init_fn)
        patch.setattr(tasks, "_solve_moving", tasks._solve_moving._init_fn)
        yield


# ---------------------------------------------------------------- definitions


def test_available_is_sorted_and_complete() -> None:
    others = ("Method", "Rescaled")
    classes = [getattr(methods, n) for n in methods.__all__ if n[0].isupper() and n not in others]
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
