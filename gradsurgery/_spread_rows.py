"""SpreadRows: flat rows that are averaged over processes, each keeping its part of the columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gradsurgery.distributed import Ranks
from gradsurgery.kernels import combine, gram, resolution, spans
from gradsurgery.task_gradients import TaskGradients

__all__ = ["SpreadRows"]


class SpreadRows:
    """Flat rows of this rank's gradients, and this rank's columns of their mean over the ranks."""

    def __init__(self, ranks: Ranks) -> None:
        self.full = TaskGradients(parts=ranks.size)
        self.tasks = 0
        self._ranks = ranks
        self._own: list[Tensor] = []
        self._on_their_way: dict[int, list[Callable[[], None]]] = {}

    def arrange(
        self, parameters: list[Tensor], tasks: int, rows: int, ranks: list[int], *, keep: bool
    ) -> None:
        """`rows` full rows, and room for `tasks` parts; see `TaskGradients.arrange`."""
        self._on_their_way.clear()
        self.tasks = tasks
        self.full.arrange(parameters, rows, ranks, keep=keep, clear=rows == 1)
        shapes = [(tasks, buffer.shape[1] // self._ranks.size) for buffer in self.full.buffers]
        like = [(buffer.dtype, buffer.device) for buffer in self.full.buffers]
        if like != [(own.dtype, own.device) for own in self._own] or shapes != [
            tuple(own.shape) for own in self._own
        ]:
            self._own = [
                buffer.new_empty(shape)
                for buffer, shape in zip(self.full.buffers, shapes, strict=True)
            ]

    def send(self, task: int, row: int) -> None:
        """Begin: own part `task` = mean over the ranks of `row`."""
        self._on_their_way[row] = [
            self._ranks.average(buffer[row], own[task])
            for buffer, own in zip(self.full.buffers, self._own, strict=True)
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
        for own in self._own:
            accuracy = max(accuracy, resolution(own))
        for segment in self._segments(chosen):
            total += gram(segment).to(device, non_blocking=True)
        self._ranks.sum(total)
        return total, accuracy

    def grams(
        self,
        chosen: list[bool],
        parts: list[int],
        number: int,
        device: torch.device,
        roots: list[Tensor] | None = None,
    ) -> tuple[Tensor, float]:
        """M of each part, [number, T, T]; see `TaskGradients.grams`."""
        total = torch.zeros(number, self.tasks, self.tasks, dtype=torch.float64, device=device)
        accuracy = torch.finfo(torch.float64).eps
        for own in self._own:
            accuracy = max(accuracy, spans.resolution(own))
        for block, bounds, where in self._segments_of_parts(chosen, parts):
            own = self._own[block]
            factors = None
            if roots is not None:
                size = len(roots[block]) // self._ranks.size
                factors = roots[block][self._ranks.rank * size :][:size]
            found = spans.gram_spans(own, bounds, where, number, factors)
            total += found.to(device, non_blocking=True)
        self._ranks.sum(total)
        return total, accuracy

    def combine(self, chosen: list[bool], weights: Tensor) -> None:
        """Part 0 becomes Gᵀw over the chosen parameters."""
        for segment in self._segments(chosen):
            combine(segment, weights.to(segment.device, non_blocking=True), out=segment[0])

    def combine_parts(self, chosen: list[bool], parts: list[int], weights: Tensor) -> None:
        """The same with the weights of each parameter's part, [number, T]."""
        for block, bounds, where in self._segments_of_parts(chosen, parts):
            own = self._own[block]
            factors = weights.to(own.device, non_blocking=True)
            spans.combine_spans(own, factors, bounds, where, own[0])

    def pick(self, tasks: list[int]) -> None:
        """Part 0 becomes one task's for the parameters that say which, others say -1."""
        for task in set(tasks) - {-1, 0}:
            for segment in self._segments([task == each for each in tasks]):
                segment[0].copy_(segment[task])

    def gather(self) -> list[Callable[[], None]]:
        """Begin: row 0 = all ranks' parts 0; returns what waits for it."""
        return [
            self._ranks.gather(own[0], buffer[0])
            for buffer, own in zip(self.full.buffers, self._own, strict=True)
            if own.numel()
        ]

    def _segments(self, chosen: list[bool]) -> list[Tensor]:
        """The chosen parameters' columns as far as they are this rank's."""
        found: list[Tensor] = []
        for block, start, stop in self.full.spans(chosen):
            own = self._own[block]
            begin = self._ranks.rank * own.shape[1]
            start, stop = max(start - begin, 0), min(stop - begin, own.shape[1])
            if start < stop:
                found.append(own[:, start:stop])
        return found

    def _segments_of_parts(
        self, chosen: list[bool], parts: list[int]
    ) -> Iterator[tuple[int, list[tuple[int, int]], list[int]]]:
        """Buffer, columns and parts, as far as they are this rank's."""
        for block, (bounds, where) in self.full.spans_of_parts(chosen, parts).items():
            width = self._own[block].shape[1]
            begin = self._ranks.rank * width
            cut = [(max(a - begin, 0), min(b - begin, width)) for a, b in bounds]
            here = [i for i, (start, stop) in enumerate(cut) if start < stop]
            if here:
                yield block, [cut[i] for i in here], [where[i] for i in here]
