"""Exceptions in a loss's backward, in the method, in the kernels: they leave no trace."""

from __future__ import annotations

import functools
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from contract import assert_same, batch
from faults import FaultError, InterruptError, Run, fresh, values
from torch import Tensor

from gradsurgery.gradients import storage
from gradsurgery.methods import PCGrad

TASKS = ("near", "far", "odd")
METHODS = ("ags", "pcgrad", "gradvac")


# ------------------------------------------------------------------ inside autograd


class Raises(torch.autograd.Function):
    """The identity, whose backward fails."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, error: BaseException) -> Tensor:
        """A copy."""
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """The fault."""
        raise ctx.error


@contextmanager
def fails_inside(
    run: Run, task: int, where: str, error: BaseException
) -> Iterator[dict[str, Tensor]]:
    """Losses of which one fails in its backward, at its beginning or at its end."""
    model, count = run.model, [0]

    def hook(_: Tensor) -> None:
        count[0] += 1
        if count[0] == task + 1:
            raise error

    # All tasks reach the trunk, each once, so the hooks there count tasks.
    handles = []
    losses = model.losses(batch(3))
    name = TASKS[task]
    if where == "function":
        losses[name] = Raises.apply(losses[name], error)
    elif where == "hook on a loss":
        losses[name] = losses[name] * 1
        count[0] = task
        losses[name].register_hook(hook)
    elif where == "hook on a parameter":
        handles.append(model.trunk.weight.register_hook(hook))
    else:
        handles.append(model.trunk.weight.register_post_accumulate_grad_hook(hook))
    yield losses
    for handle in handles:
        handle.remove()


PLACES = ("function", "hook on a loss", "hook on a parameter", "post-accumulate hook")


@pytest.mark.parametrize(
    "error", [FaultError("boom"), InterruptError("stop")], ids=["error", "interrupt"]
)
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("task", range(3))
@pytest.mark.parametrize("method", METHODS)
def test_a_fault_in_one_tasks_backward_leaves_no_trace(
    method: str, task: int, where: str, error: BaseException
) -> None:
    """Gradients, state, order and report stay; the next call is the one it would have been.

    Micro-batches that wait are dropped: their rows may hold a part of the call that failed.
    """
    for there in (False, True):
        for waiting in (False, True):
            for accumulate in (False, True):
                run = Run(method, there=there, waiting=waiting)
                with fails_inside(run, task, where, error) as losses:
                    with pytest.raises(type(error), match=str(error)):
                        run.optimizer.backward(losses, accumulate=accumulate)
                    run.assert_untouched()
                twin = Run(method, there=there, waiting=False)
                for each in (run, twin):
                    each.call()
                assert_same(values(run.model), values(twin.model))
                assert_same(run.optimizer.state_dict(), twin.optimizer.state_dict())
                assert_same(run.optimizer.last.weights, twin.optimizer.last.weights)
                for each in (run, twin):
                    each.optimizer.step()
                assert_same(run.model.state_dict(), twin.model.state_dict())


@pytest.mark.parametrize("where", ["function", "post-accumulate hook"])
@pytest.mark.parametrize("there", [False, True])
def test_a_fault_under_a_single_loss_is_that_of_a_plain_backward(where: str, there: bool) -> None:
    """One loss is `loss.backward()`, and what that leaves behind is what is left."""
    left = []
    for plain in (True, False):
        run = Run("ags", there=there, waiting=False)
        with fails_inside(run, 0, where, FaultError("boom")) as losses:
            loss = losses["near"]
            call = loss.backward if plain else functools.partial(run.optimizer.backward, [loss])
            with pytest.raises(FaultError):
                call()
        left.append(values(run.model))
        assert run.optimizer.last is run.last
        assert_same(run.optimizer.state_dict(), run.state)
    assert_same(left[1], left[0])


# ------------------------------------------------------------------ in the method, in the kernels


class Broken(PCGrad):
    """Draws its orders as PCGrad does, and then fails when told to."""

    broken = False

    def weights(self, gram: Tensor, **options: Any) -> Tensor:
        """PCGrad's, or none."""
        found = super().weights(gram, **options)
        if self.broken:
            raise FaultError("no weights")
        return found


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("waiting", [False, True])
def test_a_method_that_raises(there: bool, waiting: bool) -> None:
    """Nothing moves, and the method may work again at the next call."""
    method = Broken()
    run = Run(method, there=there, waiting=waiting)
    method.broken = True
    with pytest.raises(FaultError):
        run.optimizer.backward(run.model.losses(batch(3)))
    method.broken = False
    expected = fresh(run, [], Broken())
    run.assert_untouched()
    run.call()
    assert_same(values(run.model), expected)


@pytest.mark.parametrize("kernel", ["gram", "combine"])
@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("waiting", [False, True])
def test_no_memory_in_a_kernel(
    kernel: str, there: bool, waiting: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing moves, and with memory again the next call is right."""
    run = Run(there=there, waiting=waiting)
    losses = run.model.losses(batch(3))

    def no_memory(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("simulated")

    with monkeypatch.context() as patch:
        patch.setattr(storage, kernel, no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            run.optimizer.backward(losses)
    expected = fresh(run, [], "gradvac")
    run.assert_untouched()
    run.call()
    assert_same(values(run.model), expected)


@pytest.mark.parametrize("task", range(3))
@pytest.mark.parametrize("where", ["hook on a loss", "post-accumulate hook"])
def test_a_signal_that_arrives_in_a_hook(task: int, where: str) -> None:
    """SIGINT, as Ctrl-C sends it, while a task's backward runs."""
    run = Run(there=True, waiting=True)
    count = [0]

    def send(_: Tensor) -> None:
        count[0] += 1
        if count[0] == task + 1:
            signal.raise_signal(signal.SIGINT)

    losses = run.model.losses(batch(3))
    if where == "hook on a loss":
        handles = [loss.register_hook(send) for loss in losses.values()]
    else:
        handles = [run.model.trunk.weight.register_post_accumulate_grad_hook(send)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run.optimizer.backward(losses)
    finally:
        signal.signal(signal.SIGINT, before)
    for handle in handles:
        handle.remove()
    run.assert_untouched()
    expected = fresh(run, [], "gradvac")
    run.call()
    assert_same(values(run.model), expected)
