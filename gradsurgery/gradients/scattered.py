"""ScatteredRows: flat rows that are averaged over processes, each keeping a part of the columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gradsurgery.distributed.group import Group
from gradsurgery.gradients.layout import Layout, PartSpans
from gradsurgery.gradients.storage import TaskGradients
from gradsurgery.kernels import combine, gram, relative_error, spans

__all__ = ["ScatteredRows"]


class ScatteredRows:
    """Flat rows of this rank's gradients, and this rank's columns of their mean over the ranks."""

    def __init__(self, group: Group) -> None:
        self.full = TaskGradients(shards=group.size)
        self.tasks = 0
        self.columns: list[Tensor] = []
        """For each buffer this rank's columns of every task's mean, [T, width / ranks]."""
        self._group = group
        self._on_their_way: dict[int, list[Callable[[], None]]] = {}

    @property
    def layout(self) -> Layout:
        """Of the full rows."""
        return self.full.layout

    def arrange(
        self, parameters: list[Tensor], tasks: int, rows: int, sort_keys: list[int], *, keep: bool
    ) -> None:
        """`rows` full rows, and room for `tasks` parts; see `TaskGradients.arrange`."""
        self._on_their_way.clear()
        self.tasks = tasks
        self.full.arrange(parameters, rows, sort_keys, keep=keep, clear=rows == 1)
        shapes = [(tasks, buffer.shape[1] // self._group.size) for buffer in self.full.buffers]
        like = [(buffer.dtype, buffer.device) for buffer in self.full.buffers]
        if like != [(own.dtype, own.device) for own in self.columns] or shapes != [
            tuple(own.shape) for own in self.columns
        ]:
            self.columns = [
                buffer.new_empty(shape)
                for buffer, shape in zip(self.full.buffers, shapes, strict=True)
            ]

    def send(self, task: int, row: int) -> None:
        """Begin: this rank's columns of `task` = the mean over the ranks of `row`."""
        self._on_their_way[row] = [
            self._group.average(buffer[row], own[task])
            for buffer, own in zip(self.full.buffers, self.columns, strict=True)
            if own.numel()
        ]

    def settle(self, row: int | None = None) -> None:
        """Until `row`, or every row, may be written again."""
        for each in list(self._on_their_way) if row is None else [row]:
            for finish in self._on_their_way.pop(each, ()):
                finish()

    def gram(self, chosen: list[bool], device: torch.device) -> tuple[Tensor, float]:
        """M over the chosen parameters, and its relative accuracy; equal on all ranks."""
        total = torch.zeros(self.tasks, self.tasks, dtype=torch.float64, device=device)
        accuracy = torch.finfo(torch.float64).eps
        for own in self.columns:
            accuracy = max(accuracy, relative_error(own))
        for segment in self._segments(chosen):
            total += gram(segment).to(device, non_blocking=True)
        self._group.sum(total)
        return total, accuracy

    def grams(
        self,
        chosen: list[bool],
        parts: list[int],
        part_count: int,
        device: torch.device,
        roots: list[Tensor] | None = None,
    ) -> tuple[Tensor, float]:
        """M of each part, [part_count, T, T]; see `TaskGradients.grams`."""
        total = torch.zeros(part_count, self.tasks, self.tasks, dtype=torch.float64, device=device)
        accuracy = torch.finfo(torch.float64).eps
        for own in self.columns:
            accuracy = max(accuracy, spans.relative_error(own))
        for buffer, (bounds, of_spans) in self._segments_by_part(chosen, parts):
            factors = None
            if roots is not None:
                size = len(roots[buffer]) // self._group.size
                factors = roots[buffer][self._group.rank * size :][:size]
            own = self.columns[buffer]
            found = spans.gram_spans(own, bounds, of_spans, part_count, factors)
            total += found.to(device, non_blocking=True)
        self._group.sum(total)
        return total, accuracy

    def combine(self, chosen: list[bool], weights: Tensor) -> None:
        """Row 0 of the columns becomes Gᵀw over the chosen parameters."""
        for segment in self._segments(chosen):
            combine(segment, weights.to(segment.device, non_blocking=True), out=segment[0])

    def combine_parts(self, chosen: list[bool], parts: list[int], weights: Tensor) -> None:
        """The same with the weights of each parameter's part, [part_count, T]."""
        for buffer, (bounds, of_spans) in self._segments_by_part(chosen, parts):
            own = self.columns[buffer]
            factors = weights.to(own.device, non_blocking=True)
            spans.combine_spans(own, factors, bounds, of_spans, own[0])

    def pick(self, tasks: list[int]) -> None:
        """Row 0 becomes one task's for the parameters that say which, others say -1."""
        for task in set(tasks) - {-1, 0}:
            for segment in self._segments([task == each for each in tasks]):
                segment[0].copy_(segment[task])

    def gather(self) -> list[Callable[[], None]]:
        """Begin: full row 0 = all ranks' columns of row 0; returns what waits for it."""
        return [
            self._group.gather(own[0], buffer[0])
            for buffer, own in zip(self.full.buffers, self.columns, strict=True)
            if own.numel()
        ]

    def _segments(self, chosen: list[bool]) -> list[Tensor]:
        """The chosen parameters' columns as far as they are this rank's."""
        found: list[Tensor] = []
        for buffer, start, stop in self.layout.spans(chosen):
            own = self.columns[buffer]
            begin = self._group.rank * own.shape[1]
            start, stop = max(start - begin, 0), min(stop - begin, own.shape[1])
            if start < stop:
                found.append(own[:, start:stop])
        return found

    def _segments_by_part(
        self, chosen: list[bool], parts: list[int]
    ) -> Iterator[tuple[int, PartSpans]]:
        """Buffer, and the columns as far as they are this rank's."""
        for buffer, (bounds, of_spans) in self.layout.spans_by_part(chosen, parts).items():
            width = self.columns[buffer].shape[1]
            begin = self._group.rank * width
            cut = [(max(a - begin, 0), min(b - begin, width)) for a, b in bounds]
            here = [i for i, (start, stop) in enumerate(cut) if start < stop]
            if here:
                yield buffer, PartSpans([cut[i] for i in here], [of_spans[i] for i in here])
