"""What one call of `backward` is about: as it was asked for, and as all processes agreed on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradsurgery.backward.features import SharedFeatures
from gradsurgery.backward.graph import GraphSurvey
from gradsurgery.backward.losses import Losses
from gradsurgery.weights.solver import TaskNames

__all__ = ["MicroBatches", "Request", "Settings", "Tasks", "leave_out", "trainable"]

Settings = Callable[[tuple[str, ...], bool], dict[str, Any]]
"""(names of the tasks, accumulate) -> what must be the same in all processes."""


@dataclass(frozen=True)
class Request:
    """The arguments of `backward`."""

    losses: Losses
    accumulate: bool = False
    retain_graph: bool = False
    features: Any = None
    inputs: Sequence[Tensor] | None = None
    """The only leaves that get a gradient; None: all that the losses reach."""


@dataclass
class MicroBatches:
    """What waits between calls with accumulate=True, until a plain call ends the step."""

    names: tuple[str, ...]
    in_rows: bool
    """Whether gradients wait in the rows, and not in p.grad or the single row of known weights."""
    weights: Tensor | None
    """Known from the first of them on, [T]."""
    values: Tensor | None
    """The losses' values so far, [T] float64, where the method reads them."""
    reach: dict[int, int]
    """id(parameter) -> the tasks that have reached it so far."""
    solved: bool = False
    """Whether the weights were found in this step, and not in an earlier one."""

    def check(self, names: tuple[str, ...]) -> None:
        """Raise ValueError where the next call is about other tasks."""
        if names != self.names:
            raise ValueError(
                f"losses has the tasks {', '.join(names)}, but micro-batches of "
                f"{', '.join(self.names)} are waiting: micro-batches of one step have the "
                "same tasks; zero_grad() drops those that wait"
            )


@dataclass
class Tasks:
    """One call's tasks. Sets of tasks are bit masks: bit t stands for task t."""

    known: TaskNames
    """All tasks that have been seen, with those of this call."""
    names: tuple[str, ...]
    losses: list[Tensor | None]
    """None where this process has no sample of the task."""
    graph: GraphSurvey
    reach: dict[int, int]
    """id(parameter) -> the tasks that the graph shows to reach it, on any process."""
    opaque: int
    """Tasks that may reach what the graph does not show, on any process."""
    request: Request
    values: Tensor | None = None
    features: SharedFeatures | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where M and w are wanted."""

    def retain(self, task: int) -> bool:
        """Whether a task's backward must leave its graph in place."""
        return self.request.retain_graph or self.graph.retain[task]


def trainable(optimizer: Optimizer) -> list[Tensor]:
    """The parameters of an optimizer that require grad, each once, as they are now."""
    groups = optimizer.param_groups
    unique = {id(p): p for group in groups for p in group["params"] if p.requires_grad}
    return list(unique.values())


def leave_out(tasks: Tasks) -> None:
    """Of the leaves only `inputs` get a gradient, where they are given."""
    if tasks.request.inputs is not None:
        wanted = set(map(id, tasks.request.inputs))
        leaves = tasks.graph.leaves
        tasks.graph.leaves = {key: found for key, found in leaves.items() if key in wanted}
