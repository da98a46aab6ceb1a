"""Solver: from rows to task weights and the combined row; the only reader of the method."""

from __future__ import annotations

from collections.abc import Sequence
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

__all__ = ["Rows", "Solver"]


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
        self._optimizer, self._metric = optimizer, options.metric

    @property
    def knows_weights(self) -> bool:
        """Whether the method needs no gradients, so that one backward pass does."""
        return self.method.one_backward

    def check(self, tasks: int, trainable: Sequence[Tensor], held: Sequence[Tensor]) -> None:
        """Raise ValueError where the method's running state does not fit so many tasks."""
        if tasks == 1:
            # Nothing is to be weighed: the method and its state are not asked.
            return
        parts = () if self.knows_weights else self.partition.parts(trainable, held).names
        self.method.check(torch.Size([len(parts), tasks] if parts else [tasks]))

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
            gram, resolution = rows.gram(operated, device)
        else:
            of = parts.of(layout.parameters)
            gram, resolution = rows.grams(operated, of, len(parts), device, roots)
            if self.partition.whole:
                gram = gram[0]
        weights = self.weights(gram, values, resolution)
        return SurgeryReport(names, gram, weights, parts.names)

    def weights(self, gram: Tensor, values: Tensor | None, resolution: float) -> Tensor:
        """The method's answer to M."""
        return self.method.weights(
            gram, losses=values, generator=self.generator, resolution=resolution
        )

    def ask(
        self, names: tuple[str, ...], device: torch.device, values: Tensor | None
    ) -> SurgeryReport:
        """The weights of a method that needs no gradients; the Gram matrix is NaN, not measured."""
        gram = torch.full((len(names), len(names)), torch.nan, dtype=torch.float64, device=device)
        weights = self.method.weights(gram, losses=values, generator=self.generator)
        return SurgeryReport(names, gram, weights)

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
