"""Wrong input by table: type and text of the error, and that nothing was changed."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract import MEASURING, Case, Net, assert_same, batch, pair
from torch import Tensor, nn

import gradsurgery
from gradsurgery import AdaptiveGradientSurgery, aggregate
from gradsurgery.kernels import combine, gram
from gradsurgery.methods import AGS, GradVac, PCGrad, Sum

GRADVAC = Case("AdamW", (), "gradvac")


def check_message(error: BaseException, *parts: str) -> None:
    """Every part is in the message."""
    for part in parts:
        assert re.search(part, str(error)), f"{part!r} is not in {error}"


# ------------------------------------------------------------------ losses


def with_odd(replace: Callable[[Net, Tensor], Any]) -> Callable[[Net], Any]:
    """The right losses, but for the one called "odd"."""

    def make(model: Net) -> dict[str, Any]:
        losses: dict[str, Any] = model.losses(batch(5))
        losses["odd"] = replace(model, losses["odd"])
        return losses

    return make


def values(model: Net) -> list[Tensor]:
    """The right losses, as a list."""
    return list(model.losses(batch(5)).values())


def without_grad(model: Net) -> Any:
    """All losses from a forward under no_grad."""
    with torch.no_grad():
        return values(model)


BAD_LOSSES: dict[str, tuple[Callable[[Net], Any], type[Exception], list[str]]] = {
    "empty list": (lambda m: [], ValueError, ["losses", "empty", "at least one"]),
    "empty mapping": (lambda m: {}, ValueError, ["losses", "empty", "at least one"]),
    "vector": (
        with_odd(lambda m, loss: loss.expand(2)),
        ValueError,
        [r"losses\['odd'\]", "scalar", r"\[2\]"],
    ),
    "one element": (
        with_odd(lambda m, loss: loss[None]),
        ValueError,
        [r"losses\['odd'\]", "scalar", r"\[1\]"],
    ),
    "detached": (
        with_odd(lambda m, loss: loss.detach()),
        ValueError,
        [r"losses\['odd'\]", "no graph", "require"],
    ),
    "no_grad": (without_grad, ValueError, [r"losses\['task_0'\]", "no graph"]),
    "meta": (
        with_odd(lambda m, loss: torch.zeros((), device="meta", requires_grad=True) * 2),
        ValueError,
        [r"losses\['odd'\]", "meta", "cpu"],
    ),
    "complex": (
        with_odd(lambda m, loss: torch.complex(loss, loss)),
        ValueError,
        [r"losses\['odd'\]", "real", "complex64"],
    ),
    "integer": (
        with_odd(lambda m, loss: torch.tensor(3)),
        ValueError,
        [r"losses\['odd'\]", "real", "int64"],
    ),
    "bool": (
        with_odd(lambda m, loss: torch.tensor(True)),
        ValueError,
        [r"losses\['odd'\]", "bool"],
    ),
    "float": (
        with_odd(lambda m, loss: 1.5),
        TypeError,
        [r"losses\['odd'\]", "tensor", "float", "1.5"],
    ),
    "nothing but None": (
        lambda m: dict.fromkeys(m.losses(batch(5))),
        ValueError,
        ["losses", "None for every task"],
    ),
    "nested list": (
        lambda m: [*values(m)[:2], values(m)[2:]],
        TypeError,
        [r"losses\['task_2'\]", "tensor", "list"],
    ),
    "bare scalar": (
        lambda m: values(m)[0],
        TypeError,
        ["losses must be a sequence", "a tensor of shape", r"backward\(\[loss_a"],
    ),
    "bare vector": (
        lambda m: torch.stack(values(m)),
        TypeError,
        ["losses must be a sequence", r"\[3\]"],
    ),
    "generator": (
        lambda m: (loss for loss in values(m)),
        TypeError,
        ["losses must be a sequence", "generator"],
    ),
    "set": (lambda m: set(values(m)), TypeError, ["losses must be a sequence", "set"]),
    "values of a dict": (
        lambda m: m.losses(batch(5)).values(),
        TypeError,
        ["losses must be a sequence", "dict_values"],
    ),
    "nothing": (lambda m: None, TypeError, ["losses must be", "NoneType"]),
    "number": (lambda m: 3, TypeError, ["losses must be", "int", "3"]),
    "string": (lambda m: "sum", TypeError, ["losses", "str", "'s'"]),
    "two under one name": (
        lambda m: dict(zip(["a", 1, "1"], values(m), strict=True)),
        ValueError,
        ["losses", "one name", "1"],
    ),
    "fewer tasks": (lambda m: values(m)[:2], ValueError, ["GradVac", r"\[3\]", r"\[2\]"]),
    "more tasks": (
        lambda m: [*values(m), values(m)[0]],
        ValueError,
        ["GradVac", r"\[3\]", r"\[4\]"],
    ),
}
# While micro-batches of other tasks wait, that is what the error may be about.
TASKS_CHANGED = {"fewer tasks", "more tasks"}


class Situation:
    """A run in the middle, with gradients in p.grad, and micro-batches that wait or not."""

    def __init__(self, *, waiting: bool) -> None:
        self.model, self.optimizer = pair(GRADVAC)
        for index in range(2):
            self.optimizer.zero_grad()
            self.optimizer.backward(self.model.losses(batch(index)))
            self.optimizer.step()
        if waiting:
            self.optimizer.backward(self.model.losses(batch(2)), accumulate=True)
        self.grads = [p.grad for p in self.model.parameters()]
        self.last = self.optimizer.last
        self.state = copy.deepcopy(self.snapshot())

    def snapshot(self) -> Any:
        """All that can be seen."""
        return {
            "grads": [p.grad for p in self.model.parameters()],
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
        }

    def assert_untouched(self) -> None:
        """Nothing that can be seen changed, and the step that follows is the step it would be."""
        for p, grad in zip(self.model.parameters(), self.grads, strict=True):
            assert p.grad is grad
        assert_same(self.snapshot(), self.state)
        assert self.optimizer.last is self.last
        assert self.last is not None

    def finish(self) -> Any:
        """The step that follows."""
        self.optimizer.backward(self.model.losses(batch(3)))
        assert self.optimizer.last is not None
        self.optimizer.step()
        found = self.snapshot()
        del found["random"]
        return [found, self.optimizer.last.gram, self.optimizer.last.weights]


@functools.cache
def untroubled(waiting: bool) -> Any:
    """What `finish` gives where nothing went wrong before."""
    return Situation(waiting=waiting).finish()


@pytest.mark.parametrize("name", BAD_LOSSES)
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("waiting", [False, True])
def test_wrong_losses(name: str, accumulate: bool, waiting: bool) -> None:
    """The message says what is wrong; gradients, state, report, order and micro-batches stay."""
    make, kind, parts = BAD_LOSSES[name]
    run = Situation(waiting=waiting)
    losses = make(run.model)
    with pytest.raises(kind) as caught:
        run.optimizer.backward(losses, accumulate=accumulate)
    if waiting and name in TASKS_CHANGED:
        parts = ["losses has the tasks task_0", "near, far, odd are waiting", "zero_grad"]
    check_message(caught.value, *parts)
    run.assert_untouched()
    assert_same(run.finish(), untroubled(waiting=waiting))


@pytest.mark.parametrize("method", MEASURING)
@pytest.mark.parametrize("counts", [(2, 3), (1, 2)])
def test_no_task_may_come_between_micro_batches(method: str, counts: tuple[int, int]) -> None:
    """More tasks than the micro-batches that wait, also where those have one."""
    model, optimizer = pair(Case("SGD", (), method))
    first, second = (dict(list(model.losses(batch(0)).items())[:count]) for count in counts)
    optimizer.backward(first, accumulate=True)
    with pytest.raises(ValueError, match="micro-batches") as caught:
        optimizer.backward(second)
    check_message(caught.value, "near", "far", "zero_grad")
    optimizer.zero_grad()
    optimizer.backward(dict(list(model.losses(batch(0)).items())[: counts[1]]))
    assert optimizer.last is not None
    assert len(optimizer.last.names) == counts[1]


def test_task_names_must_not_change_between_micro_batches() -> None:
    """The same number under other names."""
    run = Situation(waiting=True)
    losses = run.model.losses(batch(3))
    for wrong in (
        dict(zip("abc", losses.values(), strict=True)),
        list(losses.values()),
    ):
        with pytest.raises(ValueError, match="near, far, odd are waiting"):
            run.optimizer.backward(wrong)
        run.assert_untouched()
    assert_same(run.finish(), untroubled(waiting=True))


def test_named_tasks_may_come_in_another_order() -> None:
    """Rows belong to names: a mapping in another order adds to the same rows."""
    results = []
    for turned in (False, True):
        run = Situation(waiting=True)
        losses = run.model.losses(batch(3))
        run.optimizer.backward(dict(reversed(losses.items())) if turned else losses)
        results.append([p.grad for p in run.model.parameters()])
    assert_same(results[1], results[0])


class MakesSparse(torch.autograd.Function):
    """A node whose gradient is fully sparse, which the graph does not show."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight.sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.ones(8, 8).to_sparse() * gradient


@pytest.mark.parametrize("kind", ["function", "scaled embedding"])
def test_a_sparse_gradient_that_only_shows_in_the_backward(kind: str) -> None:
    """Refused by name from within the backward; p.grad is what it was."""
    weight = nn.Parameter(torch.randn(8, 8))
    weight.grad = torch.ones(8, 8)
    optimizer = AdaptiveGradientSurgery(torch.optim.SGD([("table", weight)], lr=0.1))

    def loss() -> Tensor:
        if kind == "function":
            return MakesSparse.apply(weight)
        rows = nn.functional.embedding(torch.tensor([1, 2]), weight * 1.0, sparse=True)
        return rows.sum()

    with pytest.raises(ValueError, match=r"'table'.*sparse gradient"):
        optimizer.backward([loss(), -2 * loss()])
    assert torch.equal(weight.grad, torch.ones(8, 8))
    assert not weight._backward_hooks


@pytest.mark.parametrize("layer", ["Embedding", "EmbeddingBag"])
@pytest.mark.parametrize("named", [False, True])
def test_sparse_gradients(layer: str, named: bool) -> None:
    """Refused with the parameter's name or place; nothing changed."""
    table = getattr(nn, layer)(5, 3, sparse=True)
    head = nn.Linear(3, 2)
    model = nn.ModuleDict({"table": table, "head": head})
    parameters: Any = model.named_parameters() if named else model.parameters()
    optimizer = AdaptiveGradientSurgery(torch.optim.SGD(parameters, lr=0.1))
    out = head(torch.ones(2, 3))
    optimizer.backward([out[:, 0].sum(), out.square().sum()])
    grads, last = [p.grad for p in model.parameters()], optimizer.last
    before = copy.deepcopy((grads, optimizer.state_dict()))
    found = head(table(torch.tensor([[0, 2]])))
    with pytest.raises(ValueError, match="sparse") as caught:
        optimizer.backward([found.mean(), found.square().mean()])
    place = "'table.weight'" if named else r"0 of param_groups\[0\]"
    check_message(caught.value, place, r"\[5, 3\]", "sparse=False")
    assert_same(([p.grad for p in model.parameters()], optimizer.state_dict()), before)
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert optimizer.last is last


def raising_hook(grad: Tensor) -> Tensor:
    """A user's hook with a fault of its own."""
    raise RuntimeError("the hook failed")


@pytest.mark.parametrize("fault", ["freed graph", "hook"])
@pytest.mark.parametrize("waiting", [False, True])
def test_an_error_inside_autograd(fault: str, waiting: bool) -> None:
    """Comes through; p.grad, state and report are what they were before the call."""
    run = Situation(waiting=waiting)
    losses = run.model.losses(batch(3))
    if fault == "freed graph":
        losses["odd"].backward()
        for p, grad in zip(run.model.parameters(), run.grads, strict=True):
            p.grad = grad
        run.state = copy.deepcopy(run.snapshot())
        match = "second time"
    else:
        losses["odd"].register_hook(raising_hook)
        match = "the hook failed"
    with pytest.raises(RuntimeError, match=match):
        run.optimizer.backward(losses)
    run.assert_untouched()
    run.optimizer.zero_grad()
    run.optimizer.backward(run.model.losses(batch(4)))
    assert all(torch.isfinite(p.grad).all() for p in run.model.parameters() if p.grad is not None)


def test_features_that_no_loss_has() -> None:
    """Refused by name, and nothing is changed."""
    run = Situation(waiting=True)
    losses = run.model.losses(batch(3))
    with pytest.raises(ValueError, match="features"):
        run.optimizer.backward(losses, features=torch.ones(2))
    run.assert_untouched()
    assert_same(run.finish(), untroubled(waiting=True))


# ------------------------------------------------------------------ construction

BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], type[Exception], list[str]]] = {
    "method misspelt": ({"method": "pcgard"}, ValueError, ["method", "'pcgard'", "'pcgrad'"]),
    "method in capitals": ({"method": "AGS"}, ValueError, ["method", "'AGS'", "mean 'ags'"]),
    "method from nowhere": ({"method": "xyz"}, ValueError, ["method", "'xyz'", "ags, aligned_mtl"]),
    "method class": ({"method": PCGrad}, TypeError, ["method", r"PCGrad\(\)", "parentheses"]),
    "method None": ({"method": None}, TypeError, ["method", "None"]),
    "method function": ({"method": len}, TypeError, ["method", "len"]),
    "scope": ({"scope": "trunk"}, ValueError, ["scope", "'shared'", "'all'", "'trunk'"]),
    "scope None": ({"scope": None}, ValueError, ["scope", "None"]),
    "seed float": ({"seed": 1.5}, TypeError, ["seed", "int", "1.5"]),
    "seed bool": ({"seed": True}, TypeError, ["seed", "True"]),
    "seed string": ({"seed": "0"}, TypeError, ["seed", "'0'"]),
    "seed None": ({"seed": None}, TypeError, ["seed", "None"]),
    "seed too large": ({"seed": 1 << 70}, ValueError, ["seed", str(1 << 70)]),
    "granularity": ({"granularity": "layer"}, ValueError, ["granularity", "'layer'", "'group'"]),
    "granularity empty": ({"granularity": {}}, ValueError, ["granularity", "empty"]),
    "granularity of numbers": ({"granularity": {"a": 3}}, TypeError, ["must be a module", "int"]),
    "granularity rest": ({"granularity": {"rest": []}}, ValueError, ["granularity", "'rest'"]),
    "every and granularity": (
        {"every": 2, "granularity": "group"},
        ValueError,
        ["every=2", "granularity"],
    ),
    "every string": ({"every": "2"}, TypeError, ["every", "'2'"]),
    "every True": ({"every": True}, TypeError, ["every", "True"]),
    "every 0": ({"every": 0}, ValueError, ["every", "0"]),
    "metric": ({"metric": "adam"}, ValueError, ["metric", "'adam'", "'optimizer'"]),
    "process_group": ({"process_group": "world"}, TypeError, ["process_group", "'world'"]),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_wrong_arguments(name: str) -> None:
    """The message names argument and value; the base is as it was, and can be wrapped."""
    arguments, kind, parts = BAD_ARGUMENTS[name]
    model = GRADVAC.model()
    base = GRADVAC.base(model.parameters())
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(kind) as caught:
        AdaptiveGradientSurgery(base, **arguments)
    check_message(caught.value, *parts)
    assert_same(base.state_dict(), before)
    AdaptiveGradientSurgery(base).backward(model.losses(batch(0)))


@pytest.mark.parametrize(
    ("make", "shown"),
    [
        (lambda m: list(m.parameters()), "list"),
        (lambda m: m.parameters(), "generator"),
        (lambda m: m, "Net"),
        (lambda m: torch.optim.SGD, "type"),
        (lambda m: None, "NoneType"),
        (lambda m: "sgd", "str"),
    ],
)
def test_a_base_that_is_no_optimizer(make: Callable[[Net], Any], shown: str) -> None:
    """TypeError with what it was instead."""
    with pytest.raises(TypeError, match=rf"optimizer must be a torch\.optim\.Optimizer.*{shown}"):
        AdaptiveGradientSurgery(make(GRADVAC.model()))


def test_wrapping_twice() -> None:
    """The plugin is an Optimizer too, and still no base."""
    _, optimizer = pair(GRADVAC)
    with pytest.raises(TypeError, match=r"optimizer is wrapped .* already"):
        AdaptiveGradientSurgery(optimizer)


# ------------------------------------------------------------------ methods

NAN = float("nan")


@pytest.mark.parametrize("value", [0, 0.0, -1.0, NAN, -float("inf")])
def test_max_scale_must_be_positive(value: float) -> None:
    """ValueError with the value."""
    with pytest.raises(ValueError, match=rf"max_scale must be positive.*{re.escape(repr(value))}"):
        AGS(max_scale=value)


@pytest.mark.parametrize("value", [0, -0.1, 1.01, NAN, float("inf")])
def test_beta_must_be_in_range(value: float) -> None:
    """ValueError with the value."""
    with pytest.raises(ValueError, match=rf"beta must be in \(0, 1\].*{re.escape(repr(value))}"):
        GradVac(beta=value)


@pytest.mark.parametrize(
    ("make", "argument"), [(lambda: AGS("3"), "max_scale"), (lambda: GradVac("0.5"), "beta")]
)
def test_hyperparameters_must_be_numbers(make: Callable[[], Any], argument: str) -> None:
    """TypeError that names the argument."""
    with pytest.raises(TypeError, match=argument):
        make()


BAD_GRAMS: dict[str, tuple[Any, type[Exception], list[str]]] = {
    "not square": (torch.ones(2, 3), ValueError, ["gram", r"\[\.\.\., T, T\]", r"\[2, 3\]"]),
    "vector": (torch.ones(3), ValueError, ["gram", r"\[3\]"]),
    "scalar": (torch.ones(()), ValueError, ["gram", r"\[\]"]),
    "no tasks": (torch.ones(0, 0), ValueError, ["gram", "T >= 1", r"\[0, 0\]"]),
    "integer": (torch.ones(2, 2, dtype=torch.int64), TypeError, ["gram", "int64"]),
    "bool": (torch.ones(2, 2, dtype=torch.bool), TypeError, ["gram", "bool"]),
    "complex": (torch.ones(2, 2, dtype=torch.complex64), TypeError, ["gram", "complex64"]),
    "list": ([[1.0, 0.0], [0.0, 1.0]], TypeError, ["gram", "list"]),
}


@pytest.mark.parametrize("method", gradsurgery.methods.available())
@pytest.mark.parametrize("name", BAD_GRAMS)
def test_wrong_gram(name: str, method: str) -> None:
    """Refused with shape or dtype; neither the method's state nor a random stream moved."""
    value, kind, parts = BAD_GRAMS[name]
    rule = gradsurgery.methods.resolve(method)
    stream = torch.Generator().manual_seed(0)
    rule.weights(torch.eye(3), losses=torch.ones(3), generator=stream)
    before = copy.deepcopy((rule.state_dict(), stream.get_state()))
    with pytest.raises(kind) as caught:
        rule.weights(value, losses=torch.ones(3), generator=stream)
    check_message(caught.value, *parts)
    assert_same((rule.state_dict(), stream.get_state()), before)


@pytest.mark.parametrize("shape", [(2, 2), (4, 4), (1, 3, 3)])
def test_gradvac_keeps_its_number_of_tasks(shape: tuple[int, ...]) -> None:
    """The state belongs to the tasks that it has seen."""
    rule = GradVac()
    rule.weights(torch.eye(3))
    before = copy.deepcopy(rule.state_dict())
    with pytest.raises(ValueError, match=r"GradVac.*\[3\]"):
        rule.weights(torch.eye(shape[-1]).expand(shape))
    assert_same(rule.state_dict(), before)


# ------------------------------------------------------------------ kernels and aggregate

ROWS = torch.arange(6.0).view(2, 3)

BAD_GRADIENTS: dict[str, tuple[Any, type[Exception], list[str]]] = {
    "vector": (torch.ones(3), ValueError, ["gradients", r"\[T, D\]", r"\[3\]"]),
    "three axes": (torch.ones(1, 2, 3), ValueError, ["gradients", r"\[1, 2, 3\]"]),
    "no rows": (torch.ones(0, 3), ValueError, ["gradients", "T >= 1", r"\[0, 3\]"]),
    "integer": (torch.ones(2, 3, dtype=torch.int32), TypeError, ["gradients", "int32"]),
    "bool": (torch.ones(2, 3, dtype=torch.bool), TypeError, ["gradients", "bool"]),
    "list": ([[1.0, 2.0]], TypeError, ["gradients", "list"]),
    "list of tensors": ([torch.ones(3)], TypeError, ["gradients", "list"]),
    "sparse": (ROWS.to_sparse(), (TypeError, ValueError), ["gradients", "sparse"]),  # type: ignore[dict-item]
}
CALLS: dict[str, Callable[[Any], Any]] = {
    "gram": gram,
    "gram reference": lambda G: gram(G, backend="reference"),
    "combine": lambda G: combine(G, torch.ones(2)),
    "aggregate": aggregate,
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", BAD_GRADIENTS)
def test_wrong_gradients(name: str, call: str) -> None:
    """Refused by every entry, in the same words."""
    value, kind, parts = BAD_GRADIENTS[name]
    with pytest.raises(kind) as caught:
        CALLS[call](value)
    check_message(caught.value, *parts)


BAD_COMBINES: dict[str, tuple[dict[str, Any], type[Exception], list[str]]] = {
    "weights too long": ({"weights": torch.ones(3)}, ValueError, ["weights", r"\[2\]", r"\[3\]"]),
    "weights scalar": ({"weights": torch.ones(())}, ValueError, ["weights", r"\[2\]", r"\[\]"]),
    "weights matrix": ({"weights": torch.ones(2, 1)}, ValueError, ["weights", r"\[2, 1\]"]),
    "weights complex": (
        {"weights": torch.ones(2, dtype=torch.complex64)},
        ValueError,
        ["weights", "real", "complex64"],
    ),
    "weights elsewhere": (
        {"weights": torch.ones(2, device="meta")},
        ValueError,
        ["weights", "meta", "cpu"],
    ),
    "weights list": ({"weights": [1.0, 2.0]}, TypeError, ["weights", "list"]),
    "weights None": ({"weights": None}, TypeError, ["weights", "NoneType"]),
    "out short": ({"out": torch.full((2,), 9.0)}, ValueError, ["out", r"\[3\]", r"\[2\]"]),
    "out matrix": ({"out": torch.full((1, 3), 9.0)}, ValueError, ["out", r"\[3\]", r"\[1, 3\]"]),
    "out float64": (
        {"out": torch.full((3,), 9.0, dtype=torch.float64)},
        TypeError,
        ["out", "float32", "float64"],
    ),
    "out elsewhere": ({"out": torch.ones(3, device="meta")}, ValueError, ["out", "meta", "cpu"]),
    "out list": ({"out": [0.0, 0.0, 0.0]}, TypeError, ["out", "list"]),
    "backend": (
        {"backend": "cuda"},
        ValueError,
        ["backend", "auto, torch, triton, native", "'cuda'"],
    ),
    "backend None": ({"backend": None}, ValueError, ["backend", "None"]),
}


@pytest.mark.parametrize("name", BAD_COMBINES)
def test_wrong_arguments_of_combine(name: str) -> None:
    """Refused by name; neither the rows nor `out` were written."""
    arguments, kind, parts = BAD_COMBINES[name]
    rows = ROWS.clone()
    out = arguments.get("out")
    kept = out.clone() if isinstance(out, Tensor) and out.device.type == "cpu" else None
    with pytest.raises(kind) as caught:
        combine(rows, **{"weights": torch.ones(2), **arguments})
    check_message(caught.value, *parts)
    assert torch.equal(rows, ROWS)
    if kept is not None:
        assert torch.equal(out, kept)


@pytest.mark.parametrize("backend", ["cuda", "", None, "Torch"])
def test_unknown_backend_of_gram(backend: Any) -> None:
    """ValueError that lists the backends."""
    with pytest.raises(ValueError, match="backend must be one of auto, torch, triton, native"):
        gram(ROWS, backend=backend)


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.bfloat16])
@pytest.mark.parametrize("step", [1, 2])
def test_out_with_gaps_is_written(backend: str, dtype: torch.dtype, step: int) -> None:
    """An `out` that is a strided view gets the result: no silent loss."""
    memory = torch.full((3 * step,), 7, dtype=dtype)
    out = memory[::step]
    found = combine(ROWS.to(dtype), torch.tensor([1.0, 2.0]), out=out, backend=backend)
    assert found is out
    assert torch.equal(memory[::step], torch.tensor([6, 9, 12], dtype=dtype))
    if step == 2:
        assert (memory[1::2] == 7).all()


@pytest.mark.parametrize(
    ("method", "kind", "part"),
    [("agss", ValueError, "'ags'"), (Sum, TypeError, r"Sum\(\)"), (None, TypeError, "None")],
)
def test_wrong_method_of_aggregate(method: Any, kind: type[Exception], part: str) -> None:
    """As in the plugin."""
    with pytest.raises(kind, match=part):
        aggregate(ROWS, method)


# ------------------------------------------------------------------ checkpoints


def fewer_groups(state: Any) -> None:
    """Two groups where the optimizer has one."""
    state["param_groups"].append({**state["param_groups"][0], "params": []})


def shorter_group(state: Any) -> None:
    """One parameter less."""
    state["param_groups"][0]["params"].pop()


def newer_version(state: Any) -> None:
    """Written by a later version of the library."""
    state["param_groups"][0]["gradient_surgery"]["version"] = 999


def damaged_order(state: Any) -> None:
    """A random stream that is cut short."""
    surgery = state["param_groups"][0]["gradient_surgery"]
    surgery["order"] = surgery["order"][:10].clone()


def missing_order(state: Any) -> None:
    """No random stream at all."""
    del state["param_groups"][0]["gradient_surgery"]["order"]


@pytest.mark.parametrize("waiting", [False, True])
@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (fewer_groups, "number of parameter groups"),
        (shorter_group, "size of optimizer's group"),
        (newer_version, "version 999"),
        (damaged_order, "order"),
        (missing_order, "order"),
    ],
)
def test_a_checkpoint_that_does_not_fit(
    damage: Callable[[Any], None], part: str, waiting: bool
) -> None:
    """Refused before anything changed: base, order stream, method's state, micro-batches."""
    other_model, other = pair(GRADVAC, seed=8)
    for index in range(5):
        other.zero_grad()
        other.backward(other_model.losses(batch(index)))
        other.step()
    other.param_groups[0]["lr"] = 0.5
    saved = copy.deepcopy(other.state_dict())
    damage(saved)
    run = Situation(waiting=waiting)
    with pytest.raises(ValueError, match=part):
        run.optimizer.load_state_dict(saved)
    run.assert_untouched()
    assert_same(run.finish(), untroubled(waiting=waiting))


def test_losses_that_reach_nothing_here_get_one_warning() -> None:
    """A copy's parameters, for one; the message points at the line of the call."""
    model, copied = GRADVAC.model(), GRADVAC.model()
    optimizer = AdaptiveGradientSurgery(torch.optim.SGD(copied.parameters(), lr=0.1))
    with pytest.warns(UserWarning, match="reach none of the parameters") as caught:
        optimizer.backward(model.losses(batch(0)))
    optimizer.backward(model.losses(batch(0)))
    assert [warning.filename for warning in caught] == [__file__]
    assert all(p.grad is None for p in copied.parameters())


def test_a_wrapper_around_other_tensors_is_refused_by_name() -> None:
    """Its gradient has no place in flat memory, and came out doubled."""
    from torch.testing._internal.two_tensor import TwoTensor

    values = torch.randn(3, 2)
    weight = torch.nn.Parameter(TwoTensor(values, values.clone()))
    other = torch.nn.Parameter(torch.ones(2))
    optimizer = AdaptiveGradientSurgery(torch.optim.SGD([weight, other], lr=0.1))
    y = weight @ other
    with pytest.raises(ValueError, match=r"0 of param_groups\[0\] .* is a TwoTensor"):
        optimizer.backward([y.sum(), y.square().sum()])
    assert weight.grad is None
    assert other.grad is None


@pytest.mark.parametrize(
    "method", [name for name in gradsurgery.methods.available() if name != "constant"]
)
def test_one_loss_among_calls_with_more_is_its_own_backward(method: str) -> None:
    """Whatever state the method keeps of its tasks: nothing is weighed, and nothing moves."""
    model, optimizer = pair(Case("SGD", (), method))
    optimizer.backward(values(model))
    optimizer.zero_grad()
    before = optimizer.method.state_dict()
    optimizer.backward(values(model)[:1])
    found = [p.grad for p in model.parameters()]
    optimizer.zero_grad()
    values(model)[0].backward()
    for p, grad in zip(model.parameters(), found, strict=True):
        assert (p.grad is None) == (grad is None)
        assert p.grad is None or torch.equal(p.grad, grad)
    assert optimizer.method.state_dict() == before
