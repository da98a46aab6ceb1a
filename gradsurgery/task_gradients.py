"""TaskGradients: one row per task in flat buffers that autograd itself fills."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradsurgery.distributed import shard_groups, sum_over
from gradsurgery.kernels import combine, gram, resolution, spans

__all__ = ["TaskGradients", "local_part"]

# Parameters start at multiples of this, so that vectorised kernels find aligned gradients.
_ALIGNMENT_BYTES = 64


@dataclass
class _Slot:
    """Where one parameter's gradient lives: columns [start, start + length) of a block's rows."""

    block: int
    start: int
    length: int
    """With padding, which stays zero."""
    shape: torch.Size
    strides: tuple[int, ...]


class TaskGradients:
    """The task gradients G, [T, D], as one buffer for each dtype and device among the parameters.

    `view(t, i)` is the gradient of task t for parameter i: a tensor of the parameter's shape and
    strides that shares memory with row t. Given to autograd as p.grad it is filled in place. Its
    version counter, its own, tells whether anybody wrote, without looking at the numbers.

    Views are given away, and people do things to p.grad: keep it, resize it, swap its memory. So
    `arrange` looks who still holds a view, and replaces those that are no views any more.

    Of a DTensor the rows hold this process's part, and its views are DTensors; parts that are
    spread alike share a buffer.

    Args:
        parts: the width of every buffer is a multiple of this.
    """

    def __init__(self, parts: int = 1) -> None:
        # First here, and last in `_allocate`: what an interrupt leaves half-made is no layout.
        self._key: tuple[object, ...] = ()
        self.parameters: list[Tensor] = []
        self.parts = parts
        self.count = 0
        self.spare = False
        self.buffers: list[Tensor] = []
        """One for each kind of parameter, [count, width]."""
        self._padding: list[Tensor] = []
        """Of each buffer the columns that belong to no parameter, int64 on its device."""
        self._spread: list[tuple[object, ...]] = []
        self._slots: list[_Slot] = []
        self._views: list[list[Tensor]] = []
        self._places: list[list[tuple[int, int]]] = []
        self._published: list[tuple[int, int]] = []
        self._shares_at_rest: list[int] = []
        self._references_at_rest = 0

    def arrange(
        self,
        parameters: Sequence[Tensor],
        count: int,
        ranks: Sequence[int],
        *,
        keep: bool,
        clear: bool = True,
        spare: bool = False,
    ) -> None:
        """Make room for `count` rows over `parameters`, all zero unless `keep`.

        Args:
            parameters: the parameters, any dtypes and devices.
            count: T.
            ranks: for each parameter its place among those of its kind, in ascending order (so
                that surgery over those of one rank sees one contiguous piece).
            keep: gradients that are here already stay: parameters may only be added.
            clear: False where every gradient will be written: what is here may stay. Padding is
                zero all the same.
            spare: one more row for the combined gradient, so that all tasks' stay.
        """
        described = [
            (id(p), local_part(p).shape, local_part(p).stride(), p.dtype, p.device)
            for p in parameters
        ]
        key = (count, spare, *zip(described, ranks, strict=True))
        if keep and self._key:
            if key != self._key:
                self._extend(parameters, count, ranks, key, spare)
            return
        if key != self._key or not self._is_free():
            # The old memory goes first, unless a gradient that somebody holds still needs it.
            self.release()
            self._allocate(parameters, count, ranks, key, spare)
            clear = True
        else:
            self._mend_views()
        for buffer, padding in zip(self.buffers, self._padding, strict=True):
            if clear:
                buffer.zero_()
            else:
                # `combine` writes whole segments: weights that are not finite, into padding too.
                buffer.index_fill_(1, padding, 0)

    def release(self) -> None:
        """Forget everything; memory stays alive only as far as others hold views of it."""
        self.__init__(self.parts)  # type: ignore[misc]

    @property
    def combined(self) -> int:
        """The row that `combine` writes: row 0, or the spare one."""
        return self.count if self.spare else 0

    def gram(self, chosen: Sequence[bool], device: torch.device) -> tuple[Tensor, float]:
        """M over the chosen parameters, [T, T] float64 on `device`, and its relative accuracy.

        Parts of DTensors: of the whole ones, by one exchange of M for each way to be spread.
        """
        # A process may hold no element at all, and still takes part in every exchange.
        totals: dict[tuple[object, ...], Tensor | None] = dict.fromkeys(self._spread)
        accuracy = torch.finfo(torch.float64).eps
        for block, start, stop in self.spans(chosen):
            segment, spread = self.buffers[block][: self.count, start:stop], self._spread[block]
            part = gram(segment).to(device, non_blocking=True)
            # Nearly always there is one segment, and then nothing to add.
            before = totals[spread]
            totals[spread] = part if before is None else before.add_(part)
            accuracy = max(accuracy, resolution(segment))
        shape = (self.count, self.count)
        return _sum_spread(totals, torch.Size(shape), device), accuracy

    def grams(
        self,
        chosen: Sequence[bool],
        parts: Sequence[int],
        number: int,
        device: torch.device,
        roots: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, float]:
        """M of each part of the chosen parameters, [number, T, T], and its relative accuracy.

        Args:
            chosen: for each parameter whether it takes part.
            parts: for each parameter which part it is in.
            number: of parts.
            device: where the result is wanted.
            roots: for each buffer one factor per column, that all its rows are multiplied by.
        """
        totals: dict[tuple[object, ...], Tensor | None] = dict.fromkeys(self._spread)
        accuracy = torch.finfo(torch.float64).eps
        for block, (bounds, where) in self.spans_of_parts(chosen, parts).items():
            rows, spread = self.buffers[block][: self.count], self._spread[block]
            factors = None if roots is None else roots[block]
            found = spans.gram_spans(rows, bounds, where, number, factors)
            by_part = found.to(device, non_blocking=True)
            before = totals[spread]
            totals[spread] = by_part if before is None else before.add_(by_part)
            accuracy = max(accuracy, spans.resolution(rows))
        shape = (number, self.count, self.count)
        return _sum_spread(totals, torch.Size(shape), device), accuracy

    def combine(self, chosen: Sequence[bool], weights: Tensor) -> None:
        """Row `combined` becomes g = Gᵀw over the chosen parameters."""
        for block, start, stop in self.spans(chosen):
            segment = self.buffers[block][:, start:stop]
            factors = weights.to(segment.device, non_blocking=True)
            combine(segment[: self.count], factors, out=segment[self.combined])

    def combine_parts(self, chosen: Sequence[bool], parts: Sequence[int], weights: Tensor) -> None:
        """The same with the weights of each parameter's part, [number, T]."""
        for block, (bounds, where) in self.spans_of_parts(chosen, parts).items():
            buffer = self.buffers[block]
            factors = weights.to(buffer.device, non_blocking=True)
            rows, out = buffer[: self.count], buffer[self.combined]
            spans.combine_spans(rows, factors, bounds, where, out)

    def products(self, chosen: Sequence[bool], changes: Sequence[Tensor]) -> Tensor:
        """g_t·change over the chosen parameters, [T] float64; the rows must still be there."""
        total: Tensor | None = None
        flats = [torch.zeros_like(buffer[0]) for buffer in self.buffers]
        pairs = [(i, change) for i, change in enumerate(changes) if chosen[i]]
        if pairs:
            views = [self.flat_view(flats, i) for i, _ in pairs]
            torch._foreach_copy_(views, [local_part(change) for _, change in pairs])
        for block, start, stop in self.spans(chosen):
            both = torch.cat(
                [self.buffers[block][: self.count, start:stop], flats[block][None, start:stop]]
            )
            part = gram(both)[-1, :-1]
            sum_over(self._spread[block], part)
            total = part if total is None else total + part.to(total.device)
        return torch.zeros(self.count, dtype=torch.float64) if total is None else total

    def flat_view(self, flats: Sequence[Tensor], index: int) -> Tensor:
        """Where parameter `index` lies in memory that is like one row of every buffer."""
        slot = self._slots[index]
        return flats[slot.block].as_strided(slot.shape, slot.strides, slot.start)

    def flat_view_real(self, flats: Sequence[Tensor], index: int) -> Tensor:
        """The same in real memory, twice as long for complex parameters."""
        slot = self._slots[index]
        if not self.buffers[slot.block].is_complex():
            return self.flat_view(flats, index)
        strides = (*(2 * stride for stride in slot.strides), 1)
        return flats[slot.block].as_strided((*slot.shape, 2), strides, 2 * slot.start)

    def spans_of_parts(
        self, chosen: Sequence[bool], parts: Sequence[int]
    ) -> dict[int, tuple[list[tuple[int, int]], list[int]]]:
        """Buffer -> the chosen parameters' columns, those of one part joined, and their parts."""
        found: dict[int, tuple[list[tuple[int, int]], list[int]]] = {}
        for slot, wanted, part in zip(self._slots, chosen, parts, strict=True):
            if not wanted or slot.length == 0:
                continue
            bounds, where = found.setdefault(slot.block, ([], []))
            stop = slot.start + slot.length
            if bounds and bounds[-1][1] == slot.start and where[-1] == part:
                bounds[-1] = (bounds[-1][0], stop)
            else:
                bounds.append((slot.start, stop))
                where.append(part)
        return found

    def view(self, task: int, index: int) -> Tensor:
        """Row `task` as the gradient of parameter `index`."""
        return self._views[task][index]

    def version(self, task: int, index: int) -> int:
        """Changes with every write by way of the view."""
        return local_part(self._views[task][index])._version

    def publish(self, task: int, index: int) -> Tensor:
        """The same, to stay with the user as p.grad."""
        self._published.append((task, index))
        return self._views[task][index]

    def is_in_place(self, task: int, index: int) -> bool:
        """Whether the view still lies in the row: somebody may have given it other memory."""
        return _place(self._views[task][index]) == self._places[task][index]

    def replace_view(self, task: int, index: int) -> Tensor:
        """A new view; the old one belongs to whoever took it."""
        self._views[task][index] = self._make_view(task, index)
        return self._views[task][index]

    def spans(self, chosen: Sequence[bool]) -> list[list[int]]:
        """The chosen parameters' columns as [buffer, start, stop], neighbours joined."""
        spans: list[list[int]] = []
        for slot, wanted in zip(self._slots, chosen, strict=True):
            if not wanted or slot.length == 0:
                continue
            if spans and spans[-1][0] == slot.block and spans[-1][2] == slot.start:
                spans[-1][2] += slot.length
            else:
                spans.append([slot.block, slot.start, slot.start + slot.length])
        return spans

    def _allocate(
        self,
        parameters: Sequence[Tensor],
        count: int,
        ranks: Sequence[int],
        key: tuple[object, ...],
        spare: bool,
    ) -> None:
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for index, p in enumerate(parameters):
            kinds.setdefault((p.dtype, p.device, shard_groups(p)), []).append(index)
        slots: dict[int, _Slot] = {}
        for block, ((dtype, device, spread), indices) in enumerate(kinds.items()):
            width = 0
            padding: list[int] = []
            alignment = max(_ALIGNMENT_BYTES // dtype.itemsize, 1)
            for index in sorted(indices, key=lambda i: ranks[i]):
                p = local_part(parameters[index])
                length = -(-p.numel() // alignment) * alignment
                strides = p.stride() if _is_dense(p) else _contiguous_strides(p.shape)
                slots[index] = _Slot(block, width, length, p.shape, tuple(strides))
                padding += range(width + p.numel(), width + length)
                width += length
            begin, width = width, width + -width % (alignment * self.parts)
            padding += range(begin, width)
            self.buffers.append(torch.empty(count + spare, width, dtype=dtype, device=device))
            columns = torch.tensor(padding, dtype=torch.int64)
            self._padding.append(columns.to(device, non_blocking=True))
            self._spread.append(spread)
        # In the order of memory, so that neighbours in the list are neighbours in the buffer.
        order = sorted(slots, key=lambda i: (slots[i].block, slots[i].start))
        self.parameters = [parameters[i] for i in order]
        self._slots = [slots[i] for i in order]
        tasks = range(count + spare)
        self._views = [[self._make_view(t, i) for i in range(len(order))] for t in tasks]
        self._places = [[_place(view) for view in row] for row in self._views]
        self.count, self.spare = count, spare
        self._shares_at_rest = [_shares(buffer) for buffer in self.buffers]
        self._references_at_rest = max(max(_references(row), default=0) for row in self._views)
        self._key = key

    def _make_view(self, task: int, index: int) -> Tensor:
        slot = self._slots[index]
        buffer = self.buffers[slot.block]
        start = task * buffer.shape[1] + slot.start
        # .data: no view in autograd's eyes, so p.grad can be detached or changed in place.
        view = buffer.as_strided(slot.shape, slot.strides, start).data
        return _as_gradient_of(self.parameters[index], view)

    def _extend(
        self,
        parameters: Sequence[Tensor],
        count: int,
        ranks: Sequence[int],
        key: tuple[object, ...],
        spare: bool,
    ) -> None:
        """A larger layout that starts with what the rows hold now. Rare: it copies."""
        tasks = range(count)
        old = {
            id(p): [self._make_view(task, i) for task in tasks]
            for i, p in enumerate(self.parameters)
        }
        self.release()
        self._allocate(parameters, count, ranks, key, spare)
        for buffer in self.buffers:
            buffer.zero_()
        for index, p in enumerate(self.parameters):
            for task, gradient in enumerate(old.get(id(p), ())):
                self._views[task][index].copy_(gradient)

    def _is_free(self) -> bool:
        """Whether nobody reads the rows any more, so that they can be written again.

        A view that is still a p.grad (zero_grad was not called, or only set it to zero) or in
        somebody's variable gets memory of its own: D elements, not T rows. A tensor made from a
        view shares its memory beyond our reach: then the rows are not free.
        """
        shares = zip(self.buffers, self._shares_at_rest, strict=True)
        if any(_shares(buffer) > at_rest for buffer, at_rest in shares):
            return False
        for task, row in enumerate(self._views):
            for index, count in enumerate(_references(row)):
                if count > self._references_at_rest:
                    view = local_part(row[index])
                    view.data = view.clone()
                    self.replace_view(task, index)
        return True

    def _mend_views(self) -> None:
        """Replace views that somebody has made something else."""
        published, self._published = self._published, []
        for task, index in published:
            view, slot = local_part(self._views[task][index]), self._slots[index]
            same_form = view.shape == slot.shape and view.stride() == slot.strides
            same_kind = view.dtype == self.buffers[slot.block].dtype and not view.requires_grad
            if not (same_form and same_kind):
                self.replace_view(task, index)
        for task in range(len(self._views)):
            for index in range(len(self.parameters)):
                if not self.is_in_place(task, index):
                    self.replace_view(task, index)


def _sum_spread(
    totals: dict[tuple[object, ...], Tensor | None], shape: torch.Size, device: torch.device
) -> Tensor:
    """The sum over the ways to be spread, each summed over its processes."""
    total: Tensor | None = None
    for spread, part_or_none in totals.items():
        part = part_or_none
        if part is None:
            part = torch.zeros(shape, dtype=torch.float64, device=device)
        sum_over(spread, part)
        total = part if total is None else total.add_(part)
    return torch.zeros(shape, dtype=torch.float64, device=device) if total is None else total


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a DTensor; any other tensor itself."""
    part: Tensor = getattr(tensor, "_local_tensor", tensor)
    return part


def _as_gradient_of(parameter: Tensor, view: Tensor) -> Tensor:
    """The view, as a DTensor where the parameter is one."""
    if not hasattr(parameter, "device_mesh"):
        return view
    from torch.distributed.tensor import DTensor

    gradient: Tensor = DTensor.from_local(
        view,
        parameter.device_mesh,
        parameter.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return gradient


def _place(tensor: Tensor) -> tuple[int, int]:
    """Which memory a tensor lies in, and where: data_ptr, but fake tensors have it too."""
    tensor = local_part(tensor)
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


def _references(row: list[Tensor]) -> list[int]:
    """How many references each view has: Python's, of which p.grad counts as one."""
    return [sys.getrefcount(view) for view in row]


def _shares(buffer: Tensor) -> int:
    """How many tensors share the buffer's memory; torch counts them, and nobody else can."""
    return int(torch._C._storage_Use_Count(buffer.untyped_storage()._cdata))


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill memory without overlap or hole: then p.grad has p's strides."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _contiguous_strides(shape: torch.Size) -> list[int]:
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return strides[::-1]
