"""The plugin among what surrounds an optimizer: scalers, precision, checkpoints, frameworks."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from contract import MEASURING, Case, Net, Reference, assert_same, batch, pair, train
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import swa_utils

import gradsurgery
from gradsurgery import AdaptiveGradientSurgery
from gradsurgery.kernels import combine, gram

PLAIN = Case("AdamW", (), "gradvac")
FUSED = Case("AdamW", (("fused", True),), "gradvac")
FUSED_SGD = Case("SGD", (("momentum", 0.9), ("fused", True)))
SGD = Case("SGD", (("momentum", 0.9),))
scaled_cases = pytest.mark.parametrize("case", [SGD, PLAIN, FUSED, FUSED_SGD], ids=str)


def step(model: Net, optimizer: Any, index: int) -> None:
    """One plain training step."""
    optimizer.zero_grad()
    optimizer.backward(model.losses(batch(index)))
    optimizer.step()


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """Copies of p.grad by name."""
    return {
        name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
    }


def surgery_state(optimizer: AdaptiveGradientSurgery) -> dict[str, Any]:
    """A copy of the state of the surgery itself, as a checkpoint holds it."""
    state: dict[str, Any] = copy.deepcopy(optimizer.state_dict()["param_groups"][0])
    return state["gradient_surgery"]


# ------------------------------------------------------------------ GradScaler


@scaled_cases
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("form", ["mapping", "list"])
def test_scaled_training_is_unscaled_training(case: Case, clip: bool, form: str) -> None:
    """A scale that is a power of two changes no bit of the run, fused or not."""
    model, optimizer = pair(case)
    twin, plain = pair(case)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for index in range(5):
        for net, one in ((model, optimizer), (twin, plain)):
            scaled = one is optimizer
            one.zero_grad()
            losses = net.losses(batch(index))
            values: Any = list(losses.values()) if form == "list" else losses
            if scaled and form == "list":
                values = scaler.scale(values)
                assert isinstance(values, list)
            elif scaled:
                values = {name: scaler.scale(loss) for name, loss in losses.items()}
            one.backward(values)
            if clip:
                if scaled:
                    scaler.unscale_(one)
                norm = nn.utils.clip_grad_norm_(net.parameters(), 0.5)
                assert norm > 0.5
            if scaled:
                scaler.step(one)
                scaler.update()
            else:
                one.step()
    assert scaler.get_scale() == 2.0**12
    assert_same(model.state_dict(), twin.state_dict())
    assert_same(surgery_state(optimizer), surgery_state(plain))
    assert_same(optimizer.state_dict()["state"], plain.state_dict()["state"])


@scaled_cases
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_step_that_is_not_finite_is_skipped(case: Case, unscale: bool, bad: float) -> None:
    """Nothing changes but the scale, which halves; and the next step is as if it had not been."""
    model, optimizer = pair(case)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)

    def scaled_step(index: int, factor: float = 1.0) -> None:
        optimizer.zero_grad()
        losses = model.losses(batch(index))
        losses["far"] = losses["far"] * factor
        optimizer.backward({name: scaler.scale(loss) for name, loss in losses.items()})
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()

    for index in range(2):
        scaled_step(index)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    scaled_step(2, bad)
    after = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for state in (before, after):
        # The stream of random orders went on; the run stays deterministic.
        state[1]["param_groups"][0]["gradient_surgery"].pop("order")
    assert_same(after, before)
    assert scaler.get_scale() == 2.0**7
    scaled_step(3)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert not torch.equal(before[0]["trunk.weight"], model.trunk.weight)
    assert scaler.get_scale() == 2.0**7


@pytest.mark.parametrize("method", sorted({*gradsurgery.methods.available()} - {"random"}))
def test_a_first_step_that_is_not_finite_leaves_no_trace(method: str) -> None:
    """A run that starts with a skipped step goes on as one that starts with the next."""
    case = Case("SGD", (), method)
    runs = []
    for skipped in (True, False):
        model, optimizer = pair(case)
        for index in range(3):
            optimizer.zero_grad()
            losses = list(model.losses(batch(index)).values())[:2]
            if skipped and index == 0:
                optimizer.backward([losses[0] * float("inf"), losses[1]])
                assert not torch.isfinite(model.trunk.weight.grad).all()
                continue
            if index == 0:
                continue
            optimizer.backward(losses)
            optimizer.step()
        runs.append(model.state_dict())
    assert_same(runs[0], runs[1])


@pytest.mark.parametrize("case", [FUSED, FUSED_SGD], ids=str)
def test_grad_scale_and_found_inf_reach_the_base_and_go_again(case: Case) -> None:
    """A fused base reads both at its step; afterwards neither object has them."""
    model = case.model()
    base = case.base(model.parameters())
    optimizer = AdaptiveGradientSurgery(base, method=case.method)
    assert getattr(optimizer, "_step_supports_amp_scaling", False)
    seen: list[tuple[float, float]] = []
    base.register_step_pre_hook(
        lambda who, args, kwargs: seen.append((float(who.grad_scale), float(who.found_inf)))
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    optimizer.backward([scaler.scale(loss) for loss in model.losses(batch(0)).values()])
    scaler.step(optimizer)
    assert seen == [(64.0, 0.0)]
    for one in (optimizer, base):
        assert getattr(one, "found_inf", None) is None
        assert getattr(one, "grad_scale", None) is None
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.step(optimizer)


def test_an_unfused_base_has_no_amp_support_of_its_own() -> None:
    """The flag that GradScaler looks for is the base's, and absent where the base has none."""
    assert not hasattr(pair(SGD)[1], "_step_supports_amp_scaling")


def test_a_disabled_scaler_changes_nothing() -> None:
    """GradScaler(enabled=False) passes straight through."""
    model, optimizer = pair(SGD)
    twin, plain = pair(SGD)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    optimizer.backward(scaler.scale(list(model.losses(batch(0)).values())))
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    plain.backward(list(twin.losses(batch(0)).values()))
    plain.step()
    assert_same(model.state_dict(), twin.state_dict())


# ------------------------------------------------------------------ autocast and precision


@pytest.mark.parametrize("method", MEASURING)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_around_backward_changes_nothing(method: str, dtype: torch.dtype) -> None:
    """Forward under autocast; backward inside the region equals backward outside, bit for bit."""
    found = []
    for inside in (True, False):
        model, optimizer = pair(Case("SGD", (), method))
        with torch.autocast("cpu", dtype=dtype):
            losses = model.losses(batch(0))
            assert model.trunk(torch.ones(1, 12)).dtype == dtype
            if inside:
                optimizer.backward(losses)
        if not inside:
            optimizer.backward(losses)
        assert optimizer.last is not None
        found.append((gradients(model), optimizer.last.gram, optimizer.last.weights))
    assert_same(found[0], found[1])


def rows(count: int, width: int) -> Tensor:
    """Task gradients with a common part, so that no entry of M is small by chance."""
    generator = torch.Generator().manual_seed(count)
    noise = torch.randn(count, width, generator=generator)
    return noise + torch.randn(width, generator=generator)


@pytest.mark.parametrize("width", [100, 4096 * 65 + 17])
def test_kernels_do_not_run_in_half_precision_under_autocast(width: int) -> None:
    """gram, combine and aggregate: the same bits inside an autocast region."""
    G, w = rows(4, width), torch.tensor([0.3, -1.7, 0.9, 2.2])

    def results() -> list[Tensor]:
        stream = torch.Generator().manual_seed(0)
        short = G.bfloat16()
        return [
            *(gram(G), gram(short), combine(G, w), combine(short, w)),
            gradsurgery.aggregate(G, "pcgrad", generator=stream),
        ]

    outside = results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (G[:, :9] @ G[:, :9].T).dtype == torch.bfloat16
        inside = results()
    assert_same(inside, outside)


@pytest.fixture
def precision() -> Iterator[None]:
    """Whatever a test sets of the float32 modes is taken back."""
    backends: Any = torch.backends
    holders = (backends, backends.mkldnn, backends.mkldnn.matmul)
    before = [holder.fp32_precision for holder in holders]
    yield
    for holder, mode in zip(holders, before, strict=True):
        holder.fp32_precision = mode
    assert [holder.fp32_precision for holder in holders] == before


def _everywhere(mode: str) -> None:
    torch.backends.fp32_precision = mode  # type: ignore[attr-defined]


def _mkldnn(mode: str) -> None:
    torch.backends.mkldnn.fp32_precision = mode  # type: ignore[attr-defined]


def _matmul(mode: str) -> None:
    torch.backends.mkldnn.matmul.fp32_precision = mode  # type: ignore[attr-defined]


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize(
    ("setter", "mode"),
    [
        (torch.set_float32_matmul_precision, "medium"),
        (torch.set_float32_matmul_precision, "high"),
        *(
            (setter, mode)
            for setter in (_everywhere, _mkldnn, _matmul)
            for mode in ("bf16", "tf32")
        ),
    ],
)
@pytest.mark.parametrize("count", [2, 16])
def test_reduced_float32_modes_do_not_reach_the_surgery(
    setter: Callable[[str], None], mode: str, count: int
) -> None:
    """Whatever is set globally: 1e-5 of the float64 definition."""
    # Long enough for the float32 path, and bfloat16 rounds every element the same way.
    G = 1.003 + 0.1 * torch.arange(count)[:, None] + 1e-4 * rows(count, 4096 * 65 + 3)
    w = torch.linspace(-1, 2, count, dtype=torch.float64)
    exact = G.double() @ G.double().T
    setter(mode)
    assert (gram(G) - exact).abs().max() <= 1e-5 * exact.abs().max()
    expected = w @ G.double()
    for width in (100, G.shape[1]):
        error = combine(G[:, :width], w) - expected[:width]
        assert error.norm() <= 1e-5 * expected[:width].norm()


# ------------------------------------------------------------------ accumulation and clipping


@pytest.mark.parametrize("method", MEASURING)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_micro_batches_are_the_joined_batch(method: str, count: int) -> None:
    """Three micro-batches, the first two with accumulate=True: the gradients of all at once."""
    case = Case("SGD", (), method)
    model, optimizer = pair(case)
    twin, whole = pair(case)
    images = torch.cat([batch(0), batch(1), batch(2)])
    whole.backward(dict(list(twin.losses(images).items())[:count]))
    for index in range(3):
        losses = model.losses(images[6 * index : 6 * index + 6])
        losses = {name: loss / 3 for name, loss in list(losses.items())[:count]}
        optimizer.backward(losses, accumulate=index < 2)
    for p, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (expected.grad is None)
        if p.grad is not None:
            # Float32 sums in another order; weights amplify them where gradients nearly cancel.
            torch.testing.assert_close(p.grad, expected.grad, rtol=1e-4, atol=1e-5)
    assert optimizer.last is not None
    assert whole.last is not None
    torch.testing.assert_close(optimizer.last.weights, whole.last.weights, rtol=1e-4, atol=1e-5)
    if count > 1:
        torch.testing.assert_close(optimizer.last.gram, whole.last.gram, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", [SGD, FUSED], ids=str)
def test_clipping_after_backward(case: Case) -> None:
    """clip_grad_norm_ and clip_grad_value_ work on p.grad in place, as after loss.backward()."""
    model, optimizer = pair(case)
    plain = Reference(case)
    for index in range(4):
        for net, one in ((model, optimizer), (plain.model, plain)):
            one.zero_grad()
            one.backward(net.losses(batch(index)))
            if index % 2:
                assert nn.utils.clip_grad_norm_(net.parameters(), 0.1) > 0.1
            else:
                nn.utils.clip_grad_value_(net.parameters(), 0.05)
                assert max(float(p.grad.abs().max()) for p in net.parameters()) <= 0.05 + 1e-8
        optimizer.step()
        plain.optimizer.step()
    assert_same(model.state_dict(), plain.model.state_dict())


# ------------------------------------------------------------------ averages, LBFGS, parametrize


@pytest.mark.parametrize("kind", ["swa", "ema"])
def test_averaged_models(kind: str) -> None:
    """AveragedModel beside the plugin holds what it holds beside the plain optimizer."""
    averages = []
    model, optimizer = pair(SGD)
    plain = Reference(SGD)
    for net, one, scheduled in (
        (model, optimizer, optimizer),
        (plain.model, plain, plain.optimizer),
    ):
        function = swa_utils.get_ema_multi_avg_fn(0.9) if kind == "ema" else None
        average = swa_utils.AveragedModel(net, multi_avg_fn=function)
        rates = swa_utils.SWALR(scheduled, 0.05, anneal_epochs=2)
        for index in range(4):
            train(net, one, range(index, index + 1))
            average.update_parameters(net)
            rates.step()
        averages.append(average)
    assert_same(averages[0].state_dict(), averages[1].state_dict())
    assert not torch.equal(averages[0].module.trunk.weight, model.trunk.weight)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_on_the_sum(search: str | None) -> None:
    """backward inside the closure; method="sum" is LBFGS on the sum of the losses."""
    case = Case("LBFGS", (("line_search_fn", search),), "sum")
    # float64, because a line search makes rounding grow from step to step.
    model, twin = case.model().double(), case.model().double()
    optimizer, base = case.plugin(model), case.base(twin.parameters())
    images = batch(0).double()
    first = sum(float(loss.detach()) for loss in model.losses(images).values())
    values = [0.0, 0.0]
    for _ in range(4):

        def closure() -> Tensor:
            optimizer.zero_grad()
            losses = model.losses(images)
            optimizer.backward(losses)
            return torch.stack(list(losses.values())).sum().detach()

        def plain_closure() -> Tensor:
            base.zero_grad()
            loss = torch.stack(list(twin.losses(images).values())).sum()
            loss.backward()
            return loss.detach()

        values = [float(optimizer.step(closure)), float(base.step(plain_closure))]
    assert values[0] < first - 0.1
    assert values[0] == pytest.approx(values[1], rel=1e-9)
    for p, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-7, atol=1e-9)


def test_parametrized_modules() -> None:
    """weight_norm: the originals get the gradients; "sum" is the sum."""
    model, twin = SGD.model(), SGD.model()
    for net in (model, twin):
        nn.utils.parametrizations.weight_norm(net.trunk)
    optimizer = AdaptiveGradientSurgery(torch.optim.SGD(model.parameters(), lr=0.1), method="sum")
    optimizer.backward(model.losses(batch(0)))
    torch.stack(list(twin.losses(batch(0)).values())).sum().backward()
    names = [name for name, _ in model.named_parameters()]
    assert "trunk.parametrizations.weight.original0" in names
    for p, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, expected.grad)
    before = model.trunk.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, model.trunk.weight)


def test_named_parameters_are_named_in_errors() -> None:
    """Groups made from named_parameters() carry names; without them the error gives the place."""
    layer = nn.Sequential(nn.Linear(1, 1), nn.Embedding(3, 2, sparse=True))
    for parameters, name in (
        (layer.named_parameters(), "'1.weight'"),
        (layer.parameters(), r"2 of param_groups\[0\]"),
    ):
        optimizer = AdaptiveGradientSurgery(torch.optim.SGD(parameters, lr=0.1))
        out = layer[1](torch.tensor([0]))
        with pytest.raises(ValueError, match=name):
            optimizer.backward([out.sum(), out.square().sum()])


# ------------------------------------------------------------------ modes of torch


# torch 2.11 warns of itself, here and when it compiles a step.
@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")
def test_profiler_around_a_step() -> None:
    """The base's step shows in the profile under its own name, once."""
    model, optimizer = pair(PLAIN)
    step(model, optimizer, 0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(model, optimizer, 1)
    names = [event.name for event in profile.events() or []]
    assert names.count("Optimizer.step#AdamW.step") == 1
    assert names.count("Optimizer.zero_grad#AdamW.zero_grad") == 1


def _default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def _default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)


def _anomaly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Anomaly Detection")
        with torch.autograd.set_detect_anomaly(True):
            yield


def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize(
    "mode", [_default_device, _default_dtype, _deterministic, _anomaly, _no_grad]
)
@pytest.mark.parametrize("method", ["ags", "cr_mogm", "famo", "gradvac", "nash_mtl", "random"])
def test_global_modes_change_no_bit(mode: Callable[[], Iterator[None]], method: str) -> None:
    """backward and step inside the mode equal those outside."""
    case = Case("SGD", (("momentum", 0.9),), method)
    model, optimizer = pair(case)
    twin, plain = pair(case)
    for index in range(3):
        losses = model.losses(batch(index))
        running = mode()
        next(running)
        try:
            optimizer.zero_grad()
            optimizer.backward(losses)
            optimizer.step()
        finally:
            next(running, None)
        step(twin, plain, index)
    assert_same(model.state_dict(), twin.state_dict())
    assert_same(optimizer.state_dict(), plain.state_dict())


def test_anomaly_mode_still_finds_what_is_not_finite() -> None:
    """The error of anomaly mode comes through, and p.grad is what it was."""
    model, optimizer = pair(SGD)
    optimizer.backward(model.losses(batch(0)))
    before = gradients(model)
    running = _anomaly()
    next(running)
    losses = model.losses(batch(0))
    losses["odd"] = (model.trunk.bias - model.trunk.bias).sqrt().sum() * 0
    with pytest.raises(RuntimeError, match="nan"):
        optimizer.backward(losses)
    next(running, None)
    assert_same(gradients(model), before)


def test_saved_tensors_hooks() -> None:
    """A forward under save_on_cpu, and one whose saved tensors a hook of the user's packs."""
    found = []
    for hooks in (
        torch.autograd.graph.save_on_cpu(),
        torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x),
        None,
    ):
        model, optimizer = pair(SGD)
        if hooks is None:
            losses = model.losses(batch(0))
        else:
            with hooks:
                losses = model.losses(batch(0))
        optimizer.backward(losses)
        found.append(gradients(model))
    assert_same(found[0], found[2])
    assert_same(found[1], found[2])


@pytest.mark.parametrize("steps_before", [0, 1])
@pytest.mark.parametrize("case", [SGD, PLAIN], ids=str)
def test_backward_in_inference_mode_leaves_a_working_plugin(case: Case, steps_before: int) -> None:
    """Works, as loss.backward() does there, and what comes afterwards outside is not spoilt."""
    model, optimizer = pair(case)
    twin, plain = pair(case)
    train(model, optimizer, range(steps_before))
    train(twin, plain, range(steps_before))
    for index in (1, 2):
        losses = model.losses(batch(index))
        optimizer.zero_grad()
        with torch.inference_mode():
            optimizer.backward(losses)
        plain.zero_grad()
        plain.backward(twin.losses(batch(index)))
        assert_same(gradients(model), gradients(twin))
    step(model, optimizer, 3)
    step(twin, plain, 3)
    assert_same(model.state_dict(), twin.state_dict())


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
@pytest.mark.parametrize("case", [SGD, Case("AdamW")], ids=str)
def test_a_compiled_step(case: Case) -> None:
    """torch.compile(optimizer.step) is what torch.compile makes of the plain step."""
    model, optimizer = pair(case)
    plain = Reference(case)
    torch._dynamo.reset()
    compiled = torch.compile(optimizer.step, backend="eager")
    plain_compiled = torch.compile(plain.optimizer.step, backend="eager")
    before = copy.deepcopy(model.state_dict())
    for index in range(3):
        for net, one, do in ((model, optimizer, compiled), (plain.model, plain, plain_compiled)):
            one.zero_grad()
            one.backward(net.losses(batch(index)))
            do()
    torch._dynamo.reset()
    assert_same(model.state_dict(), plain.model.state_dict())
    assert not torch.equal(before["trunk.weight"], model.trunk.weight)


# ------------------------------------------------------------------ frameworks


class FrameworkOptimizer:
    """What Lightning does: a class made on the spot that inherits from the plugin's own."""

    def __init__(self, inner: Any) -> None:
        self.__dict__ = {k: v for k, v in vars(inner).items() if k not in ("step", "__del__")}
        self.__class__ = type("Framework" + type(inner).__name__, (type(self), type(inner)), {})
        self._optimizer = inner
        self.calls = 0

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Always passes a closure on."""
        self.calls += 1
        return self._optimizer.step((lambda: None) if closure is None else closure)


@pytest.mark.parametrize("case", [SGD, PLAIN, FUSED], ids=str)
def test_a_framework_that_copies_our_dict(case: Case) -> None:
    """Backward on either object, step on the framework's: one state, also after a load."""
    model, optimizer = pair(case)
    twin, plain = pair(case)
    framework: Any = FrameworkOptimizer(optimizer)
    assert isinstance(framework, AdaptiveGradientSurgery)
    assert isinstance(framework, FrameworkOptimizer)
    for index in range(6):
        one = framework if index % 2 else optimizer
        one.zero_grad()
        one.backward(model.losses(batch(index)), accumulate=False)
        framework.step()
        step(twin, plain, index)
        if index == 2:
            saved = copy.deepcopy(framework.state_dict())
            framework.load_state_dict(saved)
        if index == 3:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert framework.calls == 6
    assert framework.last is optimizer.last
    assert framework.param_groups is optimizer.param_groups
    assert_same(model.state_dict(), twin.state_dict())
    assert_same(framework.state_dict(), plain.state_dict())
    resumed_model, resumed = pair(case, seed=77)
    resumed_model.load_state_dict(model.state_dict())
    resumed_framework: Any = FrameworkOptimizer(resumed)
    # torch's load_state_dict shares the tensors that it is given.
    resumed_framework.load_state_dict(copy.deepcopy(framework.state_dict()))
    for net, one in ((resumed_model, resumed_framework), (model, framework)):
        one.zero_grad()
        one.backward(net.losses(batch(9)))
        one.step()
    assert_same(resumed_model.state_dict(), model.state_dict())
    assert_same(resumed_framework.state_dict(), framework.state_dict())


def test_micro_batches_pass_from_one_object_to_the_other() -> None:
    """accumulate=True on the framework's object, the plain call on ours: the same rows."""
    model, optimizer = pair(SGD)
    twin, plain = pair(SGD)
    framework: Any = FrameworkOptimizer(optimizer)
    framework.backward(model.losses(batch(0)), accumulate=True)
    optimizer.backward(model.losses(batch(1)))
    plain.backward(twin.losses(batch(0)), accumulate=True)
    plain.backward(twin.losses(batch(1)))
    assert_same(gradients(model), gradients(twin))


class HoldingOptimizer(torch.optim.Optimizer):
    """What Accelerate does: an Optimizer that holds another and moves its state at construction."""

    def __init__(self, optimizer: Any, device: str) -> None:
        self.optimizer = optimizer
        moved = _to_device(optimizer.state_dict(), device)
        optimizer.load_state_dict(moved)

    param_groups = property(lambda self: self.optimizer.param_groups)  # type: ignore[assignment]
    state = property(lambda self: self.optimizer.state)  # type: ignore[assignment]
    defaults = property(lambda self: self.optimizer.defaults)  # type: ignore[assignment]

    def state_dict(self) -> Any:
        """The inner one's."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        """The inner one's."""
        self.optimizer.load_state_dict(state_dict)

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """The inner one's; by inspection of its signature."""
        self.optimizer.zero_grad(**({} if set_to_none is None else {"set_to_none": set_to_none}))

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """The inner one's."""
        return self.optimizer.step(closure)


def _to_device(value: Any, device: str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    if isinstance(value, dict):
        return {key: _to_device(one, device) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to_device(one, device) for one in value)
    return value


@pytest.mark.parametrize("case", [SGD, PLAIN, FUSED], ids=str)
def test_a_framework_that_holds_the_plugin(case: Case) -> None:
    """Wrapped in the middle of a run, the run goes on to the bit."""
    model, optimizer = pair(case)
    twin, plain = pair(case)
    outer: Any = optimizer
    for index in range(4):
        if index == 2:
            outer = HoldingOptimizer(optimizer, "cpu")
        outer.zero_grad()
        optimizer.backward(model.losses(batch(index)))
        outer.step()
        step(twin, plain, index)
    assert_same(model.state_dict(), twin.state_dict())
    assert_same(outer.state_dict(), plain.state_dict())


# ------------------------------------------------------------------ distributed checkpoint


def _grouped(case: Case, groups: int) -> tuple[Net, AdaptiveGradientSurgery]:
    model = case.model()
    parameters: Any = list(model.parameters())
    if groups == 2:
        parameters = [{"params": parameters[:2], "lr": 0.02}, {"params": parameters[2:]}]
    return model, AdaptiveGradientSurgery(case.base(parameters), method=case.method)


def _through_checkpoint_api(case: Case, groups: int, *, flat: bool) -> Any:
    """A trained pair, and a new one that got its state."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = _grouped(case, groups)
    for index in range(3):
        step(model, optimizer, index)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    resumed, other = _grouped(case, groups)
    resumed.load_state_dict(model.state_dict())
    set_optimizer_state_dict(resumed, other, saved, options=options)
    return (model, optimizer), (resumed, other)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("case", [PLAIN, FUSED, SGD], ids=str)
def test_distributed_checkpoint_round_trip(case: Case, groups: int, flat: bool) -> None:
    """get_ and set_optimizer_state_dict on one process, flattened or not: the base's part."""
    (model, optimizer), (resumed, other) = _through_checkpoint_api(case, groups, flat=flat)
    assert_same(resumed.state_dict(), model.state_dict())
    states = [copy.deepcopy(one.state_dict()) for one in (other, optimizer)]
    for state in states:
        state["param_groups"][0].pop("gradient_surgery")
    assert_same(*states)


@pytest.mark.parametrize("case", [PLAIN, SGD], ids=str)
def test_a_flattened_distributed_checkpoint_leaves_the_surgery_out(case: Case) -> None:
    """A limit that docs/guide.md names: torch keeps only keys of the base's live groups."""
    (_, optimizer), (_, other) = _through_checkpoint_api(case, 2, flat=True)
    _, (_, fresh) = _through_checkpoint_api(case, 0, flat=True)
    assert_same(surgery_state(other), surgery_state(fresh), "surgery")
    assert not torch.equal(surgery_state(other)["order"], surgery_state(optimizer)["order"])


@pytest.mark.parametrize("case", [PLAIN, SGD], ids=str)
def test_distributed_checkpoint_resumes_the_surgery(case: Case) -> None:
    """And the surgery's own part: the run goes on to the bit."""
    (model, optimizer), (resumed, other) = _through_checkpoint_api(case, 2, flat=False)
    assert_same(surgery_state(other), surgery_state(optimizer), "surgery")
    for index in range(3, 6):
        step(model, optimizer, index)
        step(resumed, other, index)
    assert_same(resumed.state_dict(), model.state_dict())
    assert_same(surgery_state(other), surgery_state(optimizer), "surgery")


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("case", [PLAIN, SGD], ids=str)
@pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")
def test_distributed_checkpoint_on_disk(case: Case, steps_before: int, tmp_path: Path) -> None:
    """`load` fills in what the new plugin's own state_dict has a place for: that must be all."""
    model, optimizer = pair(case)
    train(model, optimizer, range(3))
    dcp.save({"o": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path)
    resumed, other = pair(case, seed=9)
    train(resumed, other, range(steps_before))
    resumed.load_state_dict(model.state_dict())
    saved = {"o": get_optimizer_state_dict(resumed, other)}
    dcp.load(saved, checkpoint_id=tmp_path)
    set_optimizer_state_dict(resumed, other, saved["o"])
    assert_same(other.state_dict()["state"], optimizer.state_dict()["state"])
    assert_same(surgery_state(other), surgery_state(optimizer), "surgery")
    train(model, optimizer, range(3, 5))
    train(resumed, other, range(3, 5))
    assert_same(resumed.state_dict(), model.state_dict())


def test_distributed_checkpoint_of_two_plugins() -> None:
    """Two optimizers on parts of one model: each gets its own surgery back."""
    runs = []
    saved: Any = None
    for trained in (True, False):
        model = PLAIN.model()
        heads = {id(p) for p in model.heads.parameters()}
        parts = [
            [p for p in model.parameters() if id(p) not in heads],
            list(model.heads.parameters()),
        ]
        plugins = [
            AdaptiveGradientSurgery(PLAIN.base(parts[0]), "gradvac", seed=1 + 8 * trained),
            AdaptiveGradientSurgery(SGD.base(parts[1]), "pcgrad", seed=2 + 8 * trained),
        ]
        if trained:
            for index in range(2):
                losses = model.losses(batch(index))
                for last, plugin in enumerate(plugins):
                    plugin.zero_grad()
                    plugin.backward(losses, retain_graph=not last)
                for plugin in plugins:
                    plugin.step()
            saved = copy.deepcopy(get_optimizer_state_dict(model, plugins))
        else:
            set_optimizer_state_dict(model, plugins, saved)
        runs.append([plugin.state_dict() for plugin in plugins])
    assert_same(runs[1], runs[0])


@pytest.mark.parametrize("flat", [False, True])
def test_a_distributed_checkpoint_of_the_base_loads(flat: bool) -> None:
    """One that was written without surgery: the base's part resumes."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    plain = Reference(PLAIN)
    train(plain.model, plain, range(3))
    saved = get_optimizer_state_dict(plain.model, plain.optimizer, options=options)
    model, optimizer = pair(PLAIN)
    model.load_state_dict(plain.model.state_dict())
    set_optimizer_state_dict(model, optimizer, saved, options=options)
    assert_same(optimizer.state_dict()["state"], plain.optimizer.state_dict()["state"])
    step(model, optimizer, 3)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("flat", [False, True])
def test_a_distributed_checkpoint_loads_into_a_plain_base(flat: bool) -> None:
    """The way back: no surgery any more, and training goes on."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = pair(PLAIN)
    step(model, optimizer, 0)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    plain = Reference(PLAIN)
    set_optimizer_state_dict(plain.model, plain.optimizer, saved, options=options)
    assert_same(plain.optimizer.state_dict()["state"], optimizer.state_dict()["state"])
    train(plain.model, plain, range(1))


def test_a_checkpoint_that_was_moved_to_another_device_loads() -> None:
    """map_location and move_to_device touch every tensor, the random stream's state too."""
    model, optimizer = pair(PLAIN)
    step(model, optimizer, 0)
    other = pair(PLAIN, seed=4)[1]
    other.load_state_dict(_to_device(optimizer.state_dict(), "cpu"))
    assert_same(surgery_state(other), surgery_state(optimizer))
