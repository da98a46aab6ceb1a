"""The part of `backward` between filled rows and p.grad, for tests that look at it alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradsurgery import AdaptiveGradientSurgery
from gradsurgery.backward.selection import Plan
from gradsurgery.backward.tasks import trainable
from gradsurgery.gradients.storage import TaskGradients
from gradsurgery.weights.solver import TaskNames

__all__ = ["arrange", "operate", "rows_of"]


def rows_of(optimizer: AdaptiveGradientSurgery) -> TaskGradients:
    """The rows of a plugin."""
    surgery = optimizer._surgery
    return surgery._source_of(trainable(surgery.optimizer)).rows  # type: ignore[return-value]


def arrange(optimizer: AdaptiveGradientSurgery, parameters: Sequence[Tensor], tasks: int) -> None:
    """Rows of zeros over the parameters."""
    rows_of(optimizer).arrange(parameters, tasks, [0] * len(parameters), keep=False)


def operate(optimizer: AdaptiveGradientSurgery, tasks: int, device: torch.device) -> None:
    """M, w and g of rows that every task has reached; p.grad are views of g."""
    surgery = optimizer._surgery
    parameters = trainable(surgery.optimizer)
    source, solver = surgery._source_of(parameters), surgery.solver
    targets = source.held()
    plan = Plan(targets, [(1 << tasks) - 1] * len(targets), [])
    operated = plan.operated(surgery.options.scope)
    names = tuple(map(str, range(tasks)))
    solver.tasks = TaskNames(names)
    if solver.knows_weights:
        report = solver.ask(names, device, None)
    else:
        report = solver.solve(source.rows, operated, parameters, names, device, None)
    solver.combine(source.rows, operated, parameters, report.weights)
    source.publish(plan, operated)
