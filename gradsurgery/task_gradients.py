"""TaskGradients: one row per task in flat buffers that autograd itself fills."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradsurgery.distributed import shard_groups, sum_over
from gradsurgery.kernels import combine, gram, resolution

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
        self.buffers: list[Tensor] = []
        """One for each kind of parameter, [count, width]."""
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
        together: Sequence[bool],
        *,
        keep: bool,
        clear: bool = True,
    ) -> None:
        """Make room for `count` rows over `parameters`, all zero unless `keep`.

        Args:
            parameters: the parameters, any dtypes and devices.
            count: T.
            together: for each parameter whether it should lie beside the others of its kind
                that say so (so that surgery over them sees one contiguous piece).
            keep: gradients that are here already stay: parameters may only be added.
            clear: False where every column will be written: what is here may stay.
        """
        described = [
            (id(p), local_part(p).shape, local_part(p).stride(), p.dtype, p.device)
            for p in parameters
        ]
        key = (count, *zip(described, together, strict=True))
        if keep and self._key:
            if key != self._key:
                self._extend(parameters, count, together, key)
            return
        if key != self._key or not self._is_free():
            # The old memory goes first, unless a gradient that somebody holds still needs it.
            self.release()
            self._allocate(parameters, count, together, key)
            clear = True
        else:
            self._mend_views()
        if clear:
            for buffer in self.buffers:
                buffer.zero_()

    def release(self) -> None:
        """Forget everything; memory stays alive only as far as others hold views of it."""
        self.__init__(self.parts)  # type: ignore[misc]

    def gram(self, chosen: Sequence[bool], device: torch.device) -> tuple[Tensor, float]:
        """M over the chosen parameters, [T, T] float64 on `device`, and its relative accuracy.

        Parts of DTensors: of the whole ones, by one exchange of M for each way to be spread.
        """
        # A process may hold no element at all, and still takes part in every exchange.
        totals: dict[tuple[object, ...], Tensor | None] = dict.fromkeys(self._spread)
        accuracy = torch.finfo(torch.float64).eps
        for block, start, stop in self.spans(chosen):
            segment, spread = self.buffers[block][:, start:stop], self._spread[block]
            part = gram(segment).to(device, non_blocking=True)
            # Nearly always there is one segment, and then nothing to add.
            before = totals[spread]
            totals[spread] = part if before is None else before.add_(part)
            accuracy = max(accuracy, resolution(segment))
        total: Tensor | None = None
        for spread, part_or_none in totals.items():
            part = self._no_products(device) if part_or_none is None else part_or_none
            sum_over(spread, part)
            total = part if total is None else total.add_(part)
        return self._no_products(device) if total is None else total, accuracy

    def _no_products(self, device: torch.device) -> Tensor:
        return torch.zeros(self.count, self.count, dtype=torch.float64, device=device)

    def combine(self, chosen: Sequence[bool], weights: Tensor) -> None:
        """Row 0 becomes g = Gᵀw over the chosen parameters."""
        for block, start, stop in self.spans(chosen):
            segment = self.buffers[block][:, start:stop]
            combine(segment, weights.to(segment.device, non_blocking=True), out=segment[0])

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
        together: Sequence[bool],
        key: tuple[object, ...],
    ) -> None:
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for index, p in enumerate(parameters):
            kinds.setdefault((p.dtype, p.device, shard_groups(p)), []).append(index)
        slots: dict[int, _Slot] = {}
        for block, ((dtype, device, spread), indices) in enumerate(kinds.items()):
            width = 0
            alignment = max(_ALIGNMENT_BYTES // dtype.itemsize, 1)
            for index in sorted(indices, key=lambda i: not together[i]):
                p = local_part(parameters[index])
                length = -(-p.numel() // alignment) * alignment
                strides = p.stride() if _is_dense(p) else _contiguous_strides(p.shape)
                slots[index] = _Slot(block, width, length, p.shape, tuple(strides))
                width += length
            width += -width % (alignment * self.parts)
            self.buffers.append(torch.empty(count, width, dtype=dtype, device=device))
            self._spread.append(spread)
        # In the order of memory, so that neighbours in the list are neighbours in the buffer.
        order = sorted(slots, key=lambda i: (slots[i].block, slots[i].start))
        self.parameters = [parameters[i] for i in order]
        self._slots = [slots[i] for i in order]
        self._views = [[self._make_view(t, i) for i in range(len(order))] for t in range(count)]
        self._places = [[_place(view) for view in row] for row in self._views]
        self.count = count
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
        together: Sequence[bool],
        key: tuple[object, ...],
    ) -> None:
        """A larger layout that starts with what the rows hold now. Rare: it copies."""
        tasks = range(count)
        old = {
            id(p): [self._make_view(task, i) for task in tasks]
            for i, p in enumerate(self.parameters)
        }
        self.release()
        self._allocate(parameters, count, together, key)
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
        for task in range(self.count):
            for index in range(len(self.parameters)):
                if not self.is_in_place(task, index):
                    self.replace_view(task, index)


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
