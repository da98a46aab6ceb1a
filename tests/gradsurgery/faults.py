"""What the tests of faults share: a run in the middle, its traces, and a fresh plugin's answer."""

from __future__ import annotations

import copy

from contract import Case, Net, assert_same, batch
from torch import Tensor

from gradsurgery import AdaptiveGradientSurgery
from gradsurgery.methods import Method

__all__ = ["FaultError", "InterruptError", "Run", "fresh", "values"]


class FaultError(Exception):
    """Told apart from everything else."""


class InterruptError(KeyboardInterrupt):
    """A keyboard interrupt, told apart from a real one."""


class Run:
    """Training in the middle: gradients there or not, micro-batches waiting or not."""

    def __init__(self, method: str | Method = "gradvac", *, there: bool, waiting: bool) -> None:
        case = Case("AdamW")
        self.model = case.model()
        self.optimizer = AdaptiveGradientSurgery(case.base(self.model.parameters()), method)
        for index in range(2):
            self.optimizer.zero_grad()
            self.optimizer.backward(self.model.losses(batch(index)))
            self.optimizer.step()
        if not there:
            self.optimizer.zero_grad()
        if waiting:
            self.optimizer.backward(self.model.losses(batch(2)), accumulate=True)
        self.last = self.optimizer.last
        self.grads = [p.grad for p in self.model.parameters()]
        self.values = values(self.model)
        self.state = copy.deepcopy(self.optimizer.state_dict())

    def assert_untouched(self) -> None:
        """p.grad is the same objects with the same values; state, order and report stay."""
        for p, grad, value in zip(self.model.parameters(), self.grads, self.values, strict=True):
            assert p.grad is grad
            assert_same(p.grad, value)
        assert_same(self.optimizer.state_dict(), self.state)
        assert self.optimizer.last is self.last

    def call(self, *, accumulate: bool = False) -> None:
        """The next call, and the right one."""
        self.optimizer.backward(self.model.losses(batch(4)), accumulate=accumulate)


def values(model: Net) -> list[Tensor | None]:
    """Copies of all gradients."""
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def fresh(run: Run, accumulated: list[int], method: str | Method) -> list[Tensor | None]:
    """What the next call gives under a new plugin with the same gradients, model and state."""
    model = copy.deepcopy(run.model)
    optimizer = AdaptiveGradientSurgery(Case("AdamW").base(model.parameters()), method)
    optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    for p, own in zip(model.parameters(), run.model.parameters(), strict=True):
        p.grad = None if own.grad is None else own.grad.clone()
    for index in accumulated:
        optimizer.backward(model.losses(batch(index)), accumulate=True)
    optimizer.backward(model.losses(batch(4)))
    return values(model)
