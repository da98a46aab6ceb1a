"""Methods of losses, of given and of random weights; methods around methods; running state."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchjd import aggregation, scalarization

from gradsurgery import AdaptiveGradientSurgery, methods
from gradsurgery.methods import AGS, Method, PCGrad, Sum
from gradsurgery.methods.constant import Constant
from gradsurgery.methods.cr_mogm import CRMOGM
from gradsurgery.methods.dwa import DWA
from gradsurgery.methods.famo import FAMO
from gradsurgery.methods.gradvac import GradVac
from gradsurgery.methods.random import Random
from gradsurgery.methods.rescaled import Rescaled
from gradsurgery.methods.stch import STCH
from gradsurgery.methods.uncertainty import Uncertainty

# Some dozens of float64 roundings, and the few digits that exp and log lose.
CLOSE = {"rtol": 1e-11, "atol": 1e-13}
EXAMPLES = settings(max_examples=60, derandomize=True, deadline=None)
NAN, INF = math.nan, math.inf


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gram_of(count: int, seed: int = 0, *batch: int) -> Tensor:
    rows = torch.randn(*batch, count, count + 3, generator=seeded(seed), dtype=torch.float64)
    return rows @ rows.mT


def losses_of(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, generator=seeded(seed), dtype=torch.float64) + 0.1


def ask(method: Method, losses: Tensor, seed: int = 0) -> Tensor:
    """The weights; of M a loss-only method may see the shape, dtype and device."""
    count = losses.shape[-1]
    gram = gram_of(count, seed) if method.reads_gram else torch.full((count, count), NAN)
    return method.weights(gram, losses=losses, generator=seeded(seed))


def close(found: Tensor, wanted: Tensor | list[float], **slack: float) -> None:
    wanted = torch.as_tensor(wanted, dtype=torch.float64)
    torch.testing.assert_close(found, wanted, **(CLOSE | slack))


def softmax(values: list[float]) -> list[float]:
    most = max(values)
    terms = [math.exp(value - most) for value in values]
    return [term / math.fsum(terms) for term in terms]


counts, seeds = st.integers(2, 6), st.integers(0, 10_000)


def rows_of(count: int, seed: int, steps: int = 5) -> Tensor:
    """Losses [steps, count], most of them between 0.02 and 50.

    Random ones: Adam makes steps of size lr of slopes that are nothing but rounding, as those of
    losses that fell exactly alike are.
    """
    return (2 * torch.randn(steps, count, generator=seeded(seed), dtype=torch.float64)).exp()


# ----------------------------------------------------------- given and random weights


def test_constant_is_what_was_given() -> None:
    given_weights = (0.5, 2.0, -1.0)
    weights = Constant(given_weights).weights(torch.full((3, 3), NAN))
    theirs = aggregation.ConstantWeighting(torch.tensor(given_weights, dtype=torch.float64))
    assert torch.equal(weights, theirs(torch.ones(3, 7)))
    assert Constant(range(1, 3)).weights(gram_of(2, 0, 4)).tolist() == [[1.0, 2.0]] * 4
    assert Constant().weights(torch.eye(4)).tolist() == [1.0] * 4


def test_constant_hands_out_weights_of_their_own() -> None:
    method = Constant([1.0, 2.0])
    method.weights(torch.eye(2)).zero_()
    assert method.weights(torch.eye(2)).tolist() == [1.0, 2.0]


def test_constant_refuses() -> None:
    with pytest.raises(ValueError, match="2 weights for 3 tasks"):
        Constant([1.0, 2.0]).weights(torch.eye(3))
    for bad in ([1.0, NAN], [INF], []):
        with pytest.raises(ValueError, match="weights must be finite"):
            Constant(bad)
    for wrong in (["1"], [True], 1.0, torch.ones(2)):
        with pytest.raises(TypeError, match="weights must be a"):
            Constant(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [1, 2, 7])
def test_random_is_the_softmax_of_normal_noise(count: int) -> None:
    torch.manual_seed(3)
    theirs = aggregation.RandomWeighting()(torch.ones(count, 5, dtype=torch.float64))
    torch.manual_seed(3)
    assert torch.equal(Random().weights(torch.eye(count)), theirs)
    first, again = (Random().weights(torch.eye(count), generator=seeded(1)) for _ in range(2))
    assert torch.equal(first, again)


def test_random_favours_no_task_and_draws_for_each_element() -> None:
    weights = Random().weights(torch.eye(4).expand(20_000, 4, 4), generator=seeded())
    close(weights.sum(-1), [1.0] * 20_000)
    # w_t has a standard deviation below 1/4; five of them over sqrt(20 000) draws.
    assert float((weights.mean(0) - 0.25).abs().max()) < 5 * 0.25 / math.sqrt(20_000)
    assert weights.unique(dim=0).shape == weights.shape


# ------------------------------------------------------------------------- FAMO


def famo_by_loops(rows: list[list[float]], lr: float, gamma: float) -> list[list[float]]:
    """Algorithm 1 with Adam, each step's losses after it being those of the next row."""
    count = len(rows[0])
    logits, mean, square = ([0.0] * count for _ in range(3))
    found = []
    for step, row in enumerate(rows):
        if step:
            z = softmax(logits)
            fall = [math.log(a) - math.log(b) for a, b in zip(rows[step - 1], row, strict=True)]
            for t in range(count):
                # Row t of the softmax's Jacobian.
                jacobian = [z[t] * ((1.0 if s == t else 0.0) - z[s]) for s in range(count)]
                slope = math.fsum(j * f for j, f in zip(jacobian, fall, strict=True))
                slope += gamma * logits[t]
                mean[t] = 0.9 * mean[t] + 0.1 * slope
                square[t] = 0.999 * square[t] + 0.001 * slope**2
            for t in range(count):
                size = math.sqrt(square[t] / (1 - 0.999**step)) + 1e-8
                logits[t] -= lr * mean[t] / (1 - 0.9**step) / size
        shares = [z / loss for z, loss in zip(softmax(logits), row, strict=True)]
        found.append([share / math.fsum(shares) for share in shares])
    return found


@EXAMPLES
@given(count=counts, seed=seeds, lr=st.sampled_from([0.0, 0.025, 1.0]), gamma=st.floats(0, 0.1))
def test_famo_against_algorithm_1(count: int, seed: int, lr: float, gamma: float) -> None:
    method, rows = FAMO(lr=lr, gamma=gamma), rows_of(count, seed)
    found = [ask(method, row) for row in rows]
    # 1e-15 of a slope as small as 1e-6.
    close(torch.stack(found), famo_by_loops(rows.tolist(), lr, gamma), rtol=1e-9)


def test_famo_fed_the_same_batch_again_is_the_authors() -> None:
    """Against another library's, which took the authors' code."""
    ours, theirs = FAMO(gamma=0.01), scalarization.FAMO(4, weight_decay=0.01).double()
    for step in range(40):
        losses = losses_of(4, step).requires_grad_()
        (wanted,) = torch.autograd.grad(theirs(losses), losses)
        # It adds 1e-8 to losses of at least 0.1.
        close(ask(ours, losses), wanted, rtol=1e-6)
        after = losses.detach() * (0.9 + 0.05 * losses_of(4, 1000 + step))
        theirs.update(after)
        ours.update(after)


@EXAMPLES
@given(count=counts, seed=seeds, scales=st.lists(st.floats(1e-2, 1e5), min_size=5, max_size=5))
def test_famo_does_not_see_a_loss_scale_that_moves(
    count: int, seed: int, scales: list[float]
) -> None:
    plain, scaled = FAMO(), FAMO()
    for row, scale in zip(rows_of(count, seed), scales, strict=True):
        weights = ask(plain, row)
        assert float(weights.sum()) == pytest.approx(1)
        # As above.
        close(ask(scaled, row * scale), weights, rtol=1e-9)


def test_famo_gives_weight_to_what_falls_slowly() -> None:
    method = FAMO()
    for step in range(50):
        weights = ask(method, torch.tensor([0.9**step, 0.99**step], dtype=torch.float64))
    # w_t ℓ_t is z_t up to a factor.
    share = weights * torch.tensor([0.9**49, 0.99**49], dtype=torch.float64)
    assert share[1] > 1.5 * share[0]


def test_famo_on_losses_that_are_not_positive() -> None:
    method = FAMO()
    ask(method, losses_of(2))
    before = method.state_dict()
    for bad in ([-1e-3, 1.0], [-INF, 1.0], [INF, 1.0], [NAN, NAN], [NAN, -1.0]):
        assert ask(method, torch.tensor(bad)).isnan().all()
        assert method.state_dict() == before
    # A task that is done asks for all the weight, but the weights are finite.
    for done in (0.0, -1e-9):
        weights = ask(FAMO(), torch.tensor([done, 1.0], dtype=torch.float64))
        close(weights, [1 / (1 + 1e-8), 1e-8 / (1 + 1e-8)])


def test_famo_update_refuses_and_forgets() -> None:
    method = FAMO()
    with pytest.raises(RuntimeError, match="call it first"):
        method.update(torch.ones(2))
    ask(method, losses_of(2))
    with pytest.raises(ValueError, match=r"T = 2; got \[3\]"):
        method.update(torch.ones(3))
    method.update(torch.tensor([NAN, 1.0]))
    method.update(torch.ones(2))
    ask(method, losses_of(2, 1))
    # The first was not finite, the second and the call had nothing to compare with.
    assert method.state_dict()["steps"] == "[0.0, 0.0]"
    ask(method, losses_of(2, 2))
    assert method.state_dict()["steps"] == "[1.0, 1.0]"


# ------------------------------------------------------- uncertainty, DWA, STCH


@EXAMPLES
@given(count=counts, seed=seeds, lr=st.sampled_from([0.0, 1e-3, 0.3]), start=st.floats(-2, 2))
def test_uncertainty_is_adam_on_its_own_loss(
    count: int, seed: int, lr: float, start: float
) -> None:
    """Equation 7 by autograd and torch's Adam; losses may be negative."""
    method = Uncertainty(lr=lr, start=start)
    s = torch.full((count,), start, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([s], lr=lr)
    for row in rows_of(count, seed):
        losses = (row - 0.5).requires_grad_()
        adam.zero_grad()
        variance = s.exp()
        (losses / (2 * variance) + variance.sqrt().log()).sum().backward()
        # As FAMO's.
        close(ask(method, losses), losses.grad, rtol=1e-9)
        adam.step()


def test_uncertainty_is_another_librarys() -> None:
    theirs = scalarization.UW(3).double()
    losses = losses_of(3).requires_grad_()
    (wanted,) = torch.autograd.grad(theirs(losses), losses)
    assert torch.equal(ask(Uncertainty(), losses), wanted)


def test_uncertainty_comes_to_half_of_one_over_the_loss() -> None:
    method, losses = Uncertainty(lr=0.05), torch.tensor([0.25, 3.0], dtype=torch.float64)
    for _ in range(2000):
        weights = ask(method, losses)
    # Adam has settled to far less than lr by then.
    close(weights, (0.5 / losses).tolist(), rtol=1e-3)


@pytest.mark.parametrize("period", [1, 2, 5])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_dwa_is_another_librarys(period: int, temperature: float) -> None:
    """And a step that is not finite belongs to no period."""
    ours, theirs = DWA(temperature, period), scalarization.DWA(temperature)
    for step in range(4 * period + 1):
        losses = losses_of(3, step).requires_grad_()
        (wanted,) = torch.autograd.grad(theirs(losses), losses)
        close(ask(ours, losses), wanted)
        assert float(wanted.sum()) == pytest.approx(3)
        if step % period == period - 1:
            theirs.step()
        assert ask(ours, torch.tensor([1.0, INF, 1.0])).isnan().all()


def test_dwa_by_hand() -> None:
    method = DWA(temperature=1.0, period=2)
    rows = [[4.0, 1.0], [2.0, 1.0], [1.0, 0.0], [0.0, 1.0], [9.0, 9.0]]
    found = [ask(method, torch.tensor(row, dtype=torch.float64)) for row in rows]
    assert torch.equal(torch.stack(found[:4]), torch.ones(4, 2, dtype=torch.float64))
    # Mean losses 3 and 1, then 1/2 and 1/2.
    close(found[4], [2 * value for value in softmax([1 / 6, 1 / 2])])


def test_dwa_with_a_loss_that_was_zero() -> None:
    method = DWA(period=1)
    for _ in range(4):
        weights = ask(method, torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert weights.tolist() == [1.0, 1.0]


@EXAMPLES
@given(
    values=st.lists(st.floats(-50, 50), min_size=2, max_size=6),
    mu=st.floats(0.01, 100),
    preference=st.floats(0.1, 3),
    ideal=st.floats(-5, 5),
)
def test_stch_is_the_gradient_of_the_scalarization(
    values: list[float], mu: float, preference: float, ideal: float
) -> None:
    losses = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    count = len(values)
    scales = [preference + t for t in range(count)]
    method = STCH(mu, scales, [ideal] * count)
    terms = torch.tensor(scales, dtype=torch.float64) * (losses - ideal) / mu
    (wanted,) = torch.autograd.grad(mu * terms.logsumexp(-1), losses)
    # Exponents up to 4e4 carry 1e-16 of that.
    close(ask(method, losses), wanted, rtol=1e-9, atol=1e-15)
    weights = [scale * share for scale, share in zip(scales, softmax(terms.tolist()), strict=True)]
    close(ask(method, losses), weights, rtol=1e-9, atol=1e-15)


def test_stch_is_another_librarys() -> None:
    losses = losses_of(4).requires_grad_()
    preferences = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    theirs = scalarization.STCH(0.3, preferences, torch.full_like(preferences, 0.05))
    (wanted,) = torch.autograd.grad(theirs(losses), losses)
    close(ask(STCH(0.3, preferences.tolist(), [0.05] * 4), losses), wanted)
    # Its uniform preference is 1/T: as the docstring says.
    (wanted,) = torch.autograd.grad(scalarization.STCH(0.3 / 4)(losses), losses)
    close(ask(STCH(0.3), losses) / 4, wanted)


def test_stch_goes_from_the_worst_task_to_all_alike() -> None:
    losses = torch.tensor([1.0, 3.0, 2.0])
    assert ask(STCH(mu=1e-3), losses).tolist() == [0.0, 1.0, 0.0]
    close(ask(STCH(mu=1e9), losses), [1 / 3] * 3, rtol=1e-8)


@pytest.mark.parametrize("bad", [INF, -INF])
def test_stch_passes_on_what_is_not_finite(bad: float) -> None:
    """Also -inf, of which a softmax makes 0."""
    for method in (STCH(), STCH(1.0, [1.0, 2.0], [0.0, 0.0])):
        assert ask(method, torch.tensor([bad, 1.0])).isnan().all()
        assert ask(method, torch.tensor([NAN, NAN])).isnan().all()


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: FAMO(lr=-1), ValueError, "lr must be"),
        (lambda: FAMO(lr=NAN), ValueError, "lr must be"),
        (lambda: FAMO(gamma=INF), ValueError, "gamma must be"),
        (lambda: FAMO(lr="1"), TypeError, "lr must be"),
        (lambda: Uncertainty(lr=-1), ValueError, "lr must be"),
        (lambda: Uncertainty(start=NAN), ValueError, "start must be"),
        (lambda: DWA(temperature=0), ValueError, "temperature must be"),
        (lambda: DWA(temperature=NAN), ValueError, "temperature must be"),
        (lambda: DWA(period=0), ValueError, "period must be"),
        (lambda: DWA(period=2.0), TypeError, "period must be"),
        (lambda: STCH(mu=0), ValueError, "mu must be"),
        (lambda: STCH(preferences=[1.0, 0.0]), ValueError, "preferences must be"),
        (lambda: STCH(ideal=[INF]), ValueError, "ideal must be"),
        (lambda: STCH(ideal=[0.0]).weights(torch.eye(2)), ValueError, "1 ideal for 2 tasks"),
        (lambda: CRMOGM("sum", alpha=1), ValueError, "alpha must be"),
        (lambda: CRMOGM("sum", alpha=NAN), ValueError, "alpha must be"),
        (lambda: CRMOGM("summ"), ValueError, "did you mean 'sum'"),
        (lambda: Rescaled("sum", max_scale=0), ValueError, "max_scale must be"),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], Any], kind: type, words: str) -> None:
    with pytest.raises(kind, match=words):
        make()


# -------------------------------------------------------- methods around methods


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
def test_cr_mogm_is_another_librarys(alpha: float) -> None:
    """Around PCGrad of two tasks, which meets no random order."""
    ours = CRMOGM("pcgrad", alpha=alpha)
    theirs = aggregation.CRMOGMWeighting(aggregation.PCGradWeighting(), alpha=alpha)
    for step in range(20):
        gram = gram_of(2, step)
        close(ours.weights(gram), theirs(gram), rtol=1e-9)


def test_cr_mogm_by_its_definition_while_alpha_moves() -> None:
    ours, inner = CRMOGM("pcgrad"), PCGrad()
    average: Tensor | None = None
    for step in range(10):
        ours.alpha = alpha = step / 10
        new = inner.weights(gram_of(5, step), generator=seeded(step))
        average = new if average is None else alpha * average + (1 - alpha) * new
        close(ours.weights(gram_of(5, step), generator=seeded(step)), average)


def test_cr_mogm_asks_for_what_the_other_method_asks_for() -> None:
    for inner in (PCGrad(), Sum(), Random(), FAMO(), Rescaled("famo"), CRMOGM("stch")):
        outer = CRMOGM(inner)
        for flag in ("reads_gram", "reads_losses", "known_beforehand"):
            assert getattr(outer, flag) == getattr(inner, flag)
        measured = Rescaled(inner)
        assert measured.reads_gram
        assert not measured.known_beforehand
        assert measured.reads_losses == inner.reads_losses


@EXAMPLES
@given(seed=st.integers(0, 10_000), exponent=st.integers(-6, 6))
def test_rescaled_pcgrad_of_two_tasks_is_ags(seed: int, exponent: int) -> None:
    size = torch.tensor([1.0, 10.0**exponent], dtype=torch.float64)
    gram = gram_of(2, seed) * size * size[:, None]
    # The same sums, perhaps in another order.
    close(Rescaled(PCGrad()).weights(gram), AGS().weights(gram), rtol=1e-13)
    close(Rescaled("pcgrad", 0.5).weights(gram), AGS(0.5).weights(gram), rtol=1e-13)


@pytest.mark.parametrize("inner", ["mean", "random", "gradvac", "famo", "uncertainty", "cr_mogm"])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_rescaled_has_the_length_of_the_sum(inner: str, count: int) -> None:
    method, twin = Rescaled(inner), methods.resolve(inner)
    for step in range(4):
        gram, losses = gram_of(count, step), losses_of(count, step)
        weights = method.weights(gram, losses=losses, generator=seeded(step))
        assert float(weights @ gram @ weights) == pytest.approx(float(gram.sum()), rel=1e-9)
        direction = twin.weights(gram, losses=losses, generator=seeded(step))
        close(weights / weights.norm(), direction / direction.norm(), rtol=1e-9)


def test_rescaled_leaves_noise_alone() -> None:
    """Exact opposition with weights that cancel: as AGS, no rescale of what is rounding."""
    gram = torch.tensor([[1.0, -2.0], [-2.0, 4.0]], dtype=torch.float64)
    assert Rescaled(Constant([2.0, 1.0])).weights(gram).tolist() == [2.0, 1.0]


# ------------------------------------------------------------------ running state

STATEFUL: dict[str, Callable[[], Method]] = {
    "gradvac": lambda: GradVac(beta=0.3),
    "famo": FAMO,
    "uncertainty": lambda: Uncertainty(lr=0.1, start=0.5),
    "dwa": lambda: DWA(period=2),
    "around random": lambda: CRMOGM(Random(), alpha=0.7),
    "around pcgrad": lambda: CRMOGM("pcgrad"),
    "around gradvac": lambda: CRMOGM(GradVac(beta=0.3)),
    "around famo": lambda: CRMOGM(FAMO()),
    "twice": lambda: CRMOGM(CRMOGM(DWA(period=2), alpha=0.3), alpha=0.6),
    "rescaled gradvac": lambda: Rescaled(GradVac(beta=0.3), max_scale=2.0),
    "rescaled famo": lambda: Rescaled(FAMO()),
    "rescaled average": lambda: Rescaled(CRMOGM(Random())),
    "rescaled twice": lambda: Rescaled(CRMOGM(Rescaled(CRMOGM(Uncertainty(lr=0.1))))),
}
STATELESS: dict[str, Callable[[], Method]] = {
    "constant": lambda: Constant((1.0, 0.5, 2.0)),
    "random": Random,
    "stch": lambda: STCH(0.5, (1.0, 2.0, 3.0), (0.0, 0.1, 0.2)),
    "rescaled": lambda: Rescaled(STCH(0.5)),
}
EVERY = STATEFUL | STATELESS
# Weights out of their names' methods are random, of more than two tasks at least.
DRAWS = {"random", "average", "pcgrad", "gradvac"}
stateful = pytest.mark.parametrize("name", STATEFUL)
every = pytest.mark.parametrize("name", EVERY)


def tensors_of(method: Method) -> list[Tensor]:
    """The running state, also of the methods inside."""
    own = list(getattr(method, "_state", {}).values())
    average = getattr(method, "_average", None)
    inner = getattr(method, "method", None)
    return own + [average] * (average is not None) + (tensors_of(inner) if inner else [])


def run(method: Method, steps: range, count: int = 3) -> list[Tensor]:
    return [ask(method, losses_of(count, step), step) for step in steps]


def saved(state: dict[str, Any]) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@stateful
@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_checkpoint_continues_to_the_bit(name: str, after: int) -> None:
    method, twin = STATEFUL[name](), STATEFUL[name]()
    empty = method.state_dict()
    run(method, range(after))
    state = method.state_dict()
    assert list(state) == list(empty)
    assert all(isinstance(value, str) for value in state.values())
    assert after == 0 or all(state.values())
    # Whatever it did before.
    run(twin, range(90, 93), count=4)
    twin.load_state_dict(saved(state))
    assert twin.state_dict() == state
    for found, wanted in zip(run(twin, range(5, 11)), run(method, range(5, 11)), strict=True):
        assert torch.equal(found, wanted)


@stateful
def test_state_stays_in_its_memory(name: str) -> None:
    """A captured CUDA graph reads and writes there, also after a call was taken back."""
    method = STATEFUL[name]()
    run(method, range(2))
    where = [tensor.data_ptr() for tensor in tensors_of(method)]
    assert where
    taken = method.snapshot()
    run(method, range(2, 5))
    method.restore(taken)
    assert [tensor.data_ptr() for tensor in tensors_of(method)] == where


@stateful
@pytest.mark.parametrize("before", [0, 3])
def test_a_call_taken_back_leaves_nothing(name: str, before: int) -> None:
    method, twin = STATEFUL[name](), STATEFUL[name]()
    run(method, range(before))
    run(twin, range(before))
    taken = method.snapshot()
    run(method, range(20, 22), count=3)
    method.restore(taken)
    assert method.state_dict() == twin.state_dict()
    # Before the first call no number of tasks is settled.
    count = 3 if before else 4
    for found, wanted in zip(run(method, range(5), count), run(twin, range(5), count), strict=True):
        assert torch.equal(found, wanted)


@stateful
def test_other_tasks_are_refused_before_anything_moves(name: str) -> None:
    method = STATEFUL[name]()
    run(method, range(2))
    before = method.state_dict()
    with pytest.raises(ValueError, match=r"tasks\s+of\s+shape \[3\] and now gets \[4\]"):
        run(method, range(1), count=4)
    with pytest.raises(ValueError, match=r"now gets \[2, 3\]"):
        method.check(torch.Size([2, 3]))
    assert method.state_dict() == before


@every
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_not_finite_is_passed_on_and_forgotten(name: str, bad: float) -> None:
    method = EVERY[name]()
    run(method, range(3))
    before = method.state_dict()
    gram, losses = gram_of(3), losses_of(3)
    broken_gram, broken_losses = gram.clone(), losses.clone()
    broken_gram[1, 2] = broken_gram[2, 1] = broken_losses[1] = bad
    if method.reads_gram:
        weights = method.weights(broken_gram, losses=losses, generator=seeded())
        assert not weights.isfinite().all()
        assert method.state_dict() == before
    if method.reads_losses and not math.isnan(bad):
        weights = method.weights(gram, losses=broken_losses, generator=seeded())
        assert not weights.isfinite().all()
        assert method.state_dict() == before


@pytest.mark.parametrize("name", [name for name, make in EVERY.items() if make().reads_losses])
def test_a_loss_that_is_nan_counts_as_absent(name: str) -> None:
    """A mean over no samples: the others are weighed without it, and no state moves."""
    method, left_out = EVERY[name](), EVERY[name]()
    for each in (method, left_out):
        run(each, range(3))
    before = method.state_dict()
    losses = losses_of(3, 7)
    losses[1] = NAN
    gram = gram_of(3)
    found = method.weights(gram, losses=losses, generator=seeded())
    assert found.isfinite().all()
    assert method.state_dict() == before
    if name in ("stch", "uncertainty", "dwa"):
        with left_out.only([0, 2], 3):
            some = losses[[0, 2]]
            wanted = left_out.weights(gram[[0, 2]][:, [0, 2]], losses=some, generator=seeded())
        close(found[[0, 2]], wanted)


@every
def test_one_row_of_losses_serves_a_batch(name: str) -> None:
    """Granularity: [P, T, T] with [T]. T = 2 meets no random order."""
    if {"random", "average"} & set(name.split()):
        pytest.skip("draws for each element of a batch")
    count = 3 if name in ("constant", "stch") else 2
    whole, parts = EVERY[name](), [EVERY[name]() for _ in range(4)]
    for step in range(5):
        grams, losses = gram_of(count, step, 4), losses_of(count, step)
        found = whole.weights(grams, losses=losses)
        assert found.shape == (4, count)
        for part, gram, weights in zip(parts, grams, found, strict=True):
            close(weights, part.weights(gram, losses=losses))
    # One element that is not finite is not the others' business.
    grams[1] = NAN
    found, known = whole.weights(grams, losses=losses).isfinite().all(-1), whole.reads_gram
    assert found.tolist() == [True, not known, True, True]


@every
def test_repr_makes_it_again(name: str) -> None:
    method = EVERY[name]()
    names = {c.__name__: c for c in (Constant, CRMOGM, DWA, FAMO, GradVac, PCGrad, Random)}
    names |= {c.__name__: c for c in (Rescaled, STCH, Uncertainty)}
    again = eval(repr(method), names)
    assert repr(again) == repr(method)
    for found, wanted in zip(run(again, range(3)), run(method, range(3)), strict=True):
        assert torch.equal(found, wanted)


@every
def test_losses_are_asked_for(name: str) -> None:
    method = EVERY[name]()
    if method.reads_losses:
        with pytest.raises(ValueError, match="losses"):
            method.weights(gram_of(3))
    else:
        assert method.weights(gram_of(3)).isfinite().all()


def test_one_task_alone() -> None:
    one = torch.tensor([2.5], dtype=torch.float64)
    for method in (Constant(), Random(), FAMO(), DWA(), STCH(), CRMOGM("famo"), CRMOGM("pcgrad")):
        assert ask(method, one).tolist() == [1.0]
    # Rescaled takes square roots of M.
    close(ask(Rescaled(Uncertainty()), one), [1.0])
    assert ask(Uncertainty(), one).tolist() == [0.5]
    assert ask(Constant([3.0]), one).tolist() == [3.0]
    assert ask(STCH(1.0, [2.0]), one).tolist() == [2.0]


class NoCopies(TorchDispatchMode):
    """Fails where something of the host's is copied to the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.device.type == "cuda":
            # A number in a 0-dim tensor goes along as an argument of the kernel.
            assert not any(
                isinstance(a, Tensor) and a.dim() and a.device.type == "cpu" for a in args
            ), func
        return out


@pytest.mark.parametrize("name", ["constant", "stch", "famo", "uncertainty", "dwa", "twice"])
def test_after_the_first_call_nothing_is_copied_from_the_host(name: str) -> None:
    """Such a copy could not be captured in a CUDA graph."""
    method = EVERY[name]()
    with FakeTensorMode():
        gram = torch.zeros(3, 3, device="cuda", dtype=torch.float64)
        losses = torch.zeros(3, device="cuda")
        method.weights(gram, losses=losses)
        with NoCopies():
            assert method.weights(gram, losses=losses).device.type == "cuda"


# ----------------------------------------------------------------- in the plugin


@every
def test_the_plugin_takes_these_weights(name: str) -> None:
    """The gradient of Σ_t w_t L_t, w from a twin that sees the same M and losses."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3).double()
    base = torch.optim.SGD(model.parameters(), lr=0.05)
    plugin, twin = AdaptiveGradientSurgery(base, method=EVERY[name]()), EVERY[name]()
    for step in range(5):
        inputs = torch.randn(6, 4, generator=seeded(step), dtype=torch.float64)
        losses = list((model(inputs) - 1).square().mean(0) + 0.1)
        rows = [torch.autograd.grad(loss, model.parameters(), retain_graph=True) for loss in losses]
        flat = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
        plugin.zero_grad()
        plugin.backward(losses)
        found = torch.cat([p.grad.flatten() for p in model.parameters()])
        weights = plugin.last.weights
        close(found, weights @ flat, rtol=1e-9, atol=1e-12)
        if not DRAWS & set(name.split()):
            wanted = twin.weights(flat @ flat.T, losses=torch.stack(losses))
            close(weights, wanted, rtol=1e-9)
        plugin.step()
