"""Solver: from rows to task weights and the combined row; the only reader of the method."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradsurgery.gradients.layout import Layout
from gradsurgery.methods import Method
from gradsurgery.options import Options
from gradsurgery.report import SurgeryReport
from gradsurgery.weights.partition import Partition
from gradsurgery.weights.preconditioner import check_metric, root_preconditioner

__all__ = ["Rows", "Solver", "TaskNames"]


@dataclass(frozen=True)
class TaskNames:
    """The tasks that have been seen, in the order in which the method's running state has them."""

    names: tuple[str, ...] = ()
    named: bool = False
    """Whether losses came as a mapping; else a task is known by its place."""

    def with_tasks(self, names: Sequence[str], *, named: bool) -> TaskNames:
        """With those of another call. Names that are new come last; places are counted anew."""
        if not named:
            return TaskNames(tuple(names), named=False)
        known = self.names if self.named else ()
        return TaskNames((*known, *(name for name in names if name not in known)), named=True)

    def places(self, names: Sequence[str]) -> list[int]:
        """Where some of them stand among all."""
        place = {name: number for number, name in enumerate(self.names)}
        return [place[name] for name in names]


class Rows(Protocol):
    """What has the task gradients: `TaskGradients` of one process, `ScatteredRows` of several."""

    @property
    def layout(self) -> Layout:
        """Where each parameter's gradient lies."""

    def gram(self, chosen: list[bool], device: torch.device) -> tuple[Tensor, float]:
        """M and its relative accuracy."""

    def grams(
        self,
        chosen: list[bool],
        parts: list[int],
        part_count: int,
        device: torch.device,
        roots: list[Tensor] | None = None,
    ) -> tuple[Tensor, float]:
        """M of each part of the model, and its relative accuracy."""

    def combine(self, chosen: list[bool], weights: Tensor) -> None:
        """One row becomes Gᵀw."""

    def combine_parts(self, chosen: list[bool], parts: list[int], weights: Tensor) -> None:
        """The same, each part with its own weights."""


class Solver:
    """Measures M, asks the method, and applies its weights.

    Args:
        optimizer: the wrapped optimizer.
        method: the rule M -> w.
        options: scope, granularity, metric.
        seed: of the order in which tasks meet.
    """

    def __init__(self, optimizer: Optimizer, method: Method, options: Options, seed: int) -> None:
        if options.metric == "optimizer":
            check_metric(optimizer)
        self.method = method
        self.generator = torch.Generator().manual_seed(seed)
        self.partition = Partition(options, optimizer)
        self.tasks = TaskNames()
        self._total = 0
        self._optimizer, self._metric = optimizer, options.metric

    @property
    def knows_weights(self) -> bool:
        """Whether the method needs no gradients, so that one backward pass does."""
        return self.method.known_beforehand

    def check(
        self,
        tasks: TaskNames,
        names: tuple[str, ...],
        trainable: Sequence[Tensor],
        held: Sequence[Tensor],
    ) -> None:
        """Raise ValueError where the method's running state does not fit these tasks.

        Args:
            tasks: all, as they are to be known from now on.
            names: those that are there.
            trainable: the optimizer's parameters that require grad.
            held: parameters that have rows.
        """
        if len(names) == 1:
            # Nothing is to be weighed: the method and its state are not asked.
            return
        parts = () if self.knows_weights else self.partition.parts(trainable, held).names
        total = len(tasks.names)
        self.method.check(torch.Size([len(parts), total] if parts else [total]), grow=tasks.named)

    def solve(
        self,
        rows: Rows,
        operated: list[bool],
        trainable: Sequence[Tensor],
        names: tuple[str, ...],
        device: torch.device,
        values: Tensor | None,
    ) -> SurgeryReport:
        """M of the rows, and the method's answer.

        Args:
            rows: filled.
            operated: for each parameter of their layout whether it is under surgery.
            trainable: the optimizer's parameters that require grad.
            names: of the tasks.
            device: where M and w are wanted.
            values: the losses' values, [T] float64, where the method reads them.
        """
        layout = rows.layout
        parts = self.partition.parts(trainable, layout.parameters)
        roots = None
        if self._metric == "optimizer":
            roots = root_preconditioner(self._optimizer, layout, operated)
        if self.partition.whole and roots is None:
            gram, relative_error = rows.gram(operated, device)
        else:
            of = parts.of(layout.parameters)
            gram, relative_error = rows.grams(operated, of, len(parts), device, roots)
            if self.partition.whole:
                gram = gram[0]
        weights = self.weights(names, gram, values, relative_error)
        return SurgeryReport(names, gram, weights, parts.names)

    def weights(
        self,
        names: tuple[str, ...],
        gram: Tensor,
        values: Tensor | None,
        relative_error: float | None,
    ) -> Tensor:
        """The method's answer to M; what it keeps of tasks that are not there rests."""
        present, total = self.tasks.places(names), len(self.tasks.names)
        # Running state is of all tasks: some of them rest, or new ones have come.
        differs = len(present) < total or (self.tasks.named and total != self._total)
        self._total = total
        with self.method.only(present, total) if differs else nullcontext():
            return self.method.weights(
                gram, losses=values, generator=self.generator, relative_error=relative_error
            )

    def ask(
        self, names: tuple[str, ...], device: torch.device, values: Tensor | None
    ) -> SurgeryReport:
        """The weights of a method that needs no gradients; the Gram matrix is NaN, not measured."""
        gram = torch.full((len(names), len(names)), torch.nan, dtype=torch.float64, device=device)
        return SurgeryReport(names, gram, self.weights(names, gram, values, None))

    def combine(
        self, rows: Rows, operated: list[bool], trainable: Sequence[Tensor], weights: Tensor
    ) -> None:
        """The combined row becomes Gᵀw, each part of the model with its own weights."""
        if weights.dim() == 1:
            rows.combine(operated, weights)
            return
        layout = rows.layout
        parts = self.partition.parts(trainable, layout.parameters)
        rows.combine_parts(operated, parts.of(layout.parameters), weights)

    def snapshot(self) -> tuple[Tensor, dict[str, Any]]:
        """What `restore` needs to take back what a call draws and moves."""
        return self.generator.get_state(), self.method.snapshot()

    def restore(self, taken: tuple[Tensor, dict[str, Any]]) -> None:
        """Be what `snapshot` saw."""
        self.generator.set_state(taken[0])
        self.method.restore(taken[1])
