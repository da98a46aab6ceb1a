"""Fifty training steps beside plainly written loops, and resuming in the middle to the bit."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence

import pytest
import reference
import torch
from torch import Tensor, nn

from gradsurgery import AdaptiveGradientSurgery
from gradsurgery.methods import AGS, GradVac, Method, PCGrad

STEPS = 50

# How far the parameters may be apart at any step, relative to their own length. The definition is
# evaluated in float64 on the very gradients that autograd gives, so a step differs by the rounding
# of the combined gradient to the training dtype, about 1e-16 or 6e-8, and by the Gram matrix,
# 1e-7 in float32. A learning rate of 1e-2 takes two powers of ten off that, and fifty steps may
# put them back: 1e-6 is what AGS has been specified to keep.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}

OPTIMIZERS: dict[str, Callable[[Sequence[Tensor]], torch.optim.Optimizer]] = {
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
}


def make_model(dtype: torch.dtype) -> nn.Module:
    """A small network, the same for every call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)


class Problem:
    """Regression tasks on one network, with targets that pull against each other."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, tasks: int) -> None:
        self.model = model
        generator = torch.Generator().manual_seed(1)
        # float32 numbers in both dtypes, so that both dtypes train on the same data.
        self.inputs = torch.randn(STEPS, 10, 6, generator=generator).to(dtype)
        targets = torch.randn(tasks, 10, 4, generator=generator)
        targets[1:2] = -2 * targets[:1]
        self.targets = targets.to(dtype)

    def losses(self, step: int) -> list[Tensor]:
        """One loss per task, on the same outputs; sizes differ, so that AGS has work to do."""
        out = self.model(self.inputs[step])
        return [
            (task + 1) * (out - target).square().mean() for task, target in enumerate(self.targets)
        ]


def distance(one: nn.Module, other: nn.Module) -> float:
    """‖θ - θ'‖ / ‖θ'‖ over all parameters."""
    mine = torch.cat([p.detach().double().flatten() for p in one.parameters()])
    theirs = torch.cat([p.detach().double().flatten() for p in other.parameters()])
    return float((mine - theirs).norm() / theirs.norm())


def train(
    optimizer: AdaptiveGradientSurgery,
    problem: Problem,
    steps: range,
    watch: Callable[[int], None] = lambda step: None,
) -> None:
    """The loop that a user of the library writes."""
    for step in steps:
        optimizer.zero_grad()
        optimizer.backward(problem.losses(step))
        watch(step)
        optimizer.step()


@pytest.mark.parametrize("scope", ["shared", "all"])
@pytest.mark.parametrize("method", ["ags", "pcgrad"])
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_two_tasks_follow_the_published_loop(
    dtype: torch.dtype, name: str, method: str, scope: str
) -> None:
    """The trajectory of the loop as published, with conflicts at nearly every step."""
    model, twin = make_model(dtype), make_model(dtype)
    base = OPTIMIZERS[name](list(model.parameters()))
    optimizer = AdaptiveGradientSurgery(base, method, scope=scope)
    conflicts: list[int] = []
    snapshots: list[nn.Module] = []

    def watch(step: int) -> None:
        conflicts.append(int(optimizer.last.conflicts))
        snapshots.append(copy.deepcopy(model))

    train(optimizer, Problem(model, dtype, 2), range(STEPS), watch)
    problem = Problem(twin, dtype, 2)
    worst: list[float] = []

    def losses_at(step: int) -> list[Tensor]:
        worst.append(distance(snapshots[step], twin))
        return problem.losses(step)

    plain = OPTIMIZERS[name](list(twin.parameters()))
    reference.published_ags_loop(
        list(twin.parameters()), plain, losses_at, STEPS, rescale=method == "ags"
    )
    worst.append(distance(model, twin))
    assert sum(conflicts) >= STEPS // 2
    assert distance(twin, make_model(dtype)) > 0.1
    assert max(worst) <= TOLERANCE[dtype]


RULES: dict[str, tuple[Callable[[], Method], Callable[[], reference.Method]]] = {
    "ags": (AGS, lambda: reference.ags),
    "pcgrad": (PCGrad, lambda: reference.pcgrad),
    "gradvac": (lambda: GradVac(beta=0.1), lambda: reference.GradVac(beta=0.1)),
}


@pytest.mark.parametrize("method", sorted(RULES))
@pytest.mark.parametrize("tasks", [2, 4])
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_trajectories_follow_the_definition_with_the_same_orders(
    dtype: torch.dtype, name: str, tasks: int, method: str
) -> None:
    """Any number of tasks: both sides draw the same random orders from equal generators."""
    model, twin = make_model(dtype), make_model(dtype)
    make_rule, make_reference = RULES[method]
    base = OPTIMIZERS[name](list(model.parameters()))
    optimizer = AdaptiveGradientSurgery(base, make_rule(), seed=5)
    plain = OPTIMIZERS[name](list(twin.parameters()))
    problem, twin_problem = Problem(model, dtype, tasks), Problem(twin, dtype, tasks)
    generator = torch.Generator().manual_seed(5)
    rule, parameters = make_reference(), list(twin.parameters())
    altered = 0
    for step in range(STEPS):
        train(optimizer, problem, range(step, step + 1))
        rows = reference.task_gradients(twin_problem.losses(step), parameters)
        orders = reference.draw_orders(generator, tasks, shared=method == "ags")
        answer = reference.surgery(rows, parameters, rule, scope="shared", orders=orders)
        for p, gradient in zip(parameters, answer.gradients, strict=True):
            p.grad = gradient.to(dtype)
        altered += int((optimizer.last.weights - 1).abs().max() > 1e-3)
        plain.step()
        assert distance(model, twin) <= TOLERANCE[dtype]
    assert altered >= STEPS // 2


def test_the_random_order_matters_with_four_tasks() -> None:
    """Otherwise the tests with drawn orders would show nothing."""
    ends: list[nn.Module] = []
    for seed in (5, 6):
        model = make_model(torch.float64)
        base = OPTIMIZERS["adam"](list(model.parameters()))
        optimizer = AdaptiveGradientSurgery(base, "pcgrad", seed=seed)
        train(optimizer, Problem(model, torch.float64, 4), range(STEPS))
        ends.append(model)
    assert distance(*ends) > 1e-6


@pytest.mark.parametrize("method", ["sum", "mean", *sorted(RULES)])
@pytest.mark.parametrize("tasks", [1, 2, 4])
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_resuming_gives_the_same_bits(name: str, tasks: int, method: str) -> None:
    """Saved and loaded with weights_only in the middle, into objects made from another seed."""
    model = make_model(torch.float32)
    optimizer = _optimizer(model, name, method, seed=3)
    train(optimizer, Problem(model, torch.float32, tasks), range(STEPS // 2))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(optimizer, Problem(model, torch.float32, tasks), range(STEPS // 2, STEPS))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    continued = _optimizer(resumed, name, method, seed=99)
    resumed.load_state_dict(saved["model"])
    continued.load_state_dict(saved["optimizer"])
    assert distance(resumed, model) > 1e-3
    train(continued, Problem(resumed, torch.float32, tasks), range(STEPS // 2, STEPS))
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p.grad, q.grad)
    if tasks > 1:
        assert torch.equal(optimizer.last.weights, continued.last.weights)
    first, second = optimizer.state_dict(), continued.state_dict()
    _assert_equal(first, second)


def test_resuming_without_the_surgerys_state_differs() -> None:
    """What the state holds is needed: otherwise the test above could not fail."""
    model = make_model(torch.float32)
    optimizer = _optimizer(model, "adam", "gradvac", seed=3)
    train(optimizer, Problem(model, torch.float32, 4), range(STEPS // 2))
    forgetful = make_model(torch.float32)
    forgetful.load_state_dict(model.state_dict())
    fresh = _optimizer(forgetful, "adam", "gradvac", seed=3)
    # A checkpoint of the wrapped optimizer: it loads, and knows nothing of the surgery.
    fresh.load_state_dict(copy.deepcopy(_plain_state(optimizer)))
    for each, net in ((optimizer, model), (fresh, forgetful)):
        train(each, Problem(net, torch.float32, 4), range(STEPS // 2, STEPS))
    assert distance(model, forgetful) > 1e-6


def test_the_saved_state_does_not_change_with_later_steps() -> None:
    """A state_dict kept in memory is the state of its own moment."""
    model = make_model(torch.float32)
    optimizer = _optimizer(model, "sgd-momentum", "gradvac", seed=3)
    train(optimizer, Problem(model, torch.float32, 4), range(3))
    state = optimizer.state_dict()["param_groups"][0]["gradient_surgery"]
    kept = copy.deepcopy(state)
    train(optimizer, Problem(model, torch.float32, 4), range(3, 6))
    _assert_equal(state, kept)


def _optimizer(model: nn.Module, name: str, method: str, seed: int) -> AdaptiveGradientSurgery:
    rule = RULES[method][0]() if method in RULES else method
    base = OPTIMIZERS[name](list(model.parameters()))
    return AdaptiveGradientSurgery(base, rule, seed=seed)


def _plain_state(optimizer: AdaptiveGradientSurgery) -> dict[str, object]:
    state = optimizer.state_dict()
    groups = [
        {key: value for key, value in group.items() if key != "gradient_surgery"}
        for group in state["param_groups"]
    ]
    return {**state, "param_groups": groups}


def _assert_equal(one: object, other: object) -> None:
    """Equal nested dictionaries and lists, tensors to the bit."""
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            _assert_equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            _assert_equal(a, b)
    else:
        assert one == other
