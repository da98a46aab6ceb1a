"""TaskGradients: one row per task in flat buffers that autograd itself fills."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from gradsurgery.distributed.group import sum_over
from gradsurgery.gradients.layout import Layout, local_part
from gradsurgery.kernels import combine, gram, relative_error, spans

__all__ = ["TaskGradients"]


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
        shards: see `Layout`.
    """

    def __init__(self, shards: int = 1) -> None:
        # The key is set first here and last in `_allocate`: where an interrupt comes in between,
        # it matches no request, and the next call allocates anew.
        self._key: tuple[object, ...] = ()
        self.shards = shards
        self.layout = Layout()
        self.count = 0
        self.spare = False
        self.buffers: list[Tensor] = []
        """One for each kind of parameter, [count, width], or one row more where `spare`."""
        self._views: list[list[Tensor]] = []
        self._places: list[list[tuple[int, int]]] = []
        self._published: list[tuple[int, int]] = []
        self._shares_at_rest: list[int] = []
        self._references_at_rest = 0

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters that have rows, in the order of memory."""
        return self.layout.parameters

    def arrange(
        self,
        parameters: Sequence[Tensor],
        count: int,
        sort_keys: Sequence[int],
        *,
        keep: bool,
        clear: bool = True,
        spare: bool = False,
    ) -> None:
        """Make room for `count` rows over `parameters`, all zero unless `keep`.

        Args:
            parameters: the parameters, any dtypes and devices.
            count: T.
            sort_keys: see `Layout`.
            keep: gradients that are here already stay: parameters may only be added.
            clear: False where every gradient will be written: what is here may stay. Padding is
                zero all the same.
            spare: one more row for the combined gradient, so that all tasks' stay.
        """
        described = [
            (id(p), local_part(p).shape, local_part(p).stride(), p.dtype, p.device)
            for p in parameters
        ]
        key = (count, spare, *zip(described, sort_keys, strict=True))
        if keep and self._key:
            if key != self._key:
                self._extend(parameters, count, sort_keys, key, spare)
            return
        if key != self._key or not self._is_free():
            # The old memory goes first, unless a gradient that somebody holds still needs it.
            self.release()
            self._allocate(parameters, count, sort_keys, key, spare)
            clear = True
        else:
            self._mend_views()
        for buffer, padding in zip(self.buffers, self.layout.padding, strict=True):
            if clear:
                buffer.zero_()
            else:
                # `combine` writes whole segments: weights that are not finite, into padding too.
                buffer.index_fill_(1, padding, 0)

    def release(self) -> None:
        """Forget everything; memory stays alive only as far as others hold views of it."""
        self.__init__(self.shards)  # type: ignore[misc]

    @property
    def combined(self) -> int:
        """The row that `combine` writes: row 0, or the spare one."""
        return self.count if self.spare else 0

    def gram(self, chosen: Sequence[bool], device: torch.device) -> tuple[Tensor, float]:
        """M over the chosen parameters, [T, T] float64 on `device`, and its relative accuracy.

        Parts of DTensors: of the whole ones, by one exchange of M for each way to be spread.
        """
        totals = self._totals()
        accuracy = torch.finfo(torch.float64).eps
        for buffer, start, stop in self.layout.spans(chosen):
            segment = self.buffers[buffer][: self.count, start:stop]
            _add(totals, self.layout.groups[buffer], gram(segment), device)
            accuracy = max(accuracy, relative_error(segment))
        return _sum_spread(totals, torch.Size((self.count, self.count)), device), accuracy

    def grams(
        self,
        chosen: Sequence[bool],
        parts: Sequence[int],
        part_count: int,
        device: torch.device,
        roots: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, float]:
        """M of each part of the model, [part_count, T, T], and its relative accuracy.

        Args:
            chosen: for each parameter whether it takes part.
            parts: for each parameter which part it is in.
            part_count: how many parts there are.
            device: where the result is wanted.
            roots: for each buffer one factor per column, that all its rows are multiplied by.
        """
        totals = self._totals()
        accuracy = torch.finfo(torch.float64).eps
        for buffer, (bounds, of_spans) in self.layout.spans_by_part(chosen, parts).items():
            rows = self.buffers[buffer][: self.count]
            factors = None if roots is None else roots[buffer]
            found = spans.gram_spans(rows, bounds, of_spans, part_count, factors)
            _add(totals, self.layout.groups[buffer], found, device)
            accuracy = max(accuracy, spans.relative_error(rows))
        shape = torch.Size((part_count, self.count, self.count))
        return _sum_spread(totals, shape, device), accuracy

    def combine(self, chosen: Sequence[bool], weights: Tensor) -> None:
        """Row `combined` becomes g = Gᵀw over the chosen parameters."""
        for buffer, start, stop in self.layout.spans(chosen):
            segment = self.buffers[buffer][:, start:stop]
            factors = weights.to(segment.device, non_blocking=True)
            combine(segment[: self.count], factors, out=segment[self.combined])

    def combine_parts(self, chosen: Sequence[bool], parts: Sequence[int], weights: Tensor) -> None:
        """The same with the weights of each parameter's part, [part_count, T]."""
        for index, (bounds, of_spans) in self.layout.spans_by_part(chosen, parts).items():
            buffer = self.buffers[index]
            factors = weights.to(buffer.device, non_blocking=True)
            rows, out = buffer[: self.count], buffer[self.combined]
            spans.combine_spans(rows, factors, bounds, of_spans, out)

    def products(self, chosen: Sequence[bool], changes: Sequence[Tensor]) -> Tensor:
        """g_t·change over the chosen parameters, [T] float64; the rows must still be there."""
        total: Tensor | None = None
        flats = [torch.zeros_like(buffer[0]) for buffer in self.buffers]
        pairs = [(i, change) for i, change in enumerate(changes) if chosen[i]]
        if pairs:
            views = [self.layout.view(flats, i) for i, _ in pairs]
            torch._foreach_copy_(views, [local_part(change) for _, change in pairs])
        for buffer, start, stop in self.layout.spans(chosen):
            both = torch.cat(
                [self.buffers[buffer][: self.count, start:stop], flats[buffer][None, start:stop]]
            )
            part = gram(both)[-1, :-1]
            sum_over(self.layout.groups[buffer], part)
            total = part if total is None else total + part.to(total.device)
        return torch.zeros(self.count, dtype=torch.float64) if total is None else total

    def view(self, task: int, index: int) -> Tensor:
        """The gradient of a task for a parameter."""
        return self._views[task][index]

    def version(self, task: int, index: int) -> tuple[int, int]:
        """Changes with every write by way of the view.

        Of a DTensor tensor-parallel layers write to the whole, `fully_shard` to the part.
        """
        view = self._views[task][index]
        return view._version, local_part(view)._version

    def publish(self, task: int, index: int) -> Tensor:
        """The same view, to stay with the user as p.grad."""
        self._published.append((task, index))
        return self._views[task][index]

    def is_in_place(self, task: int, index: int) -> bool:
        """Whether the view still lies in the row: somebody may have given it other memory."""
        return _place(self._views[task][index]) == self._places[task][index]

    def replace_view(self, task: int, index: int) -> Tensor:
        """A new view; the old one belongs to whoever took it."""
        self._views[task][index] = self._make_view(task, index)
        return self._views[task][index]

    def _allocate(
        self,
        parameters: Sequence[Tensor],
        count: int,
        sort_keys: Sequence[int],
        key: tuple[object, ...],
        spare: bool,
    ) -> None:
        self.layout = Layout(parameters, sort_keys, self.shards)
        self.buffers = [
            torch.empty(count + spare, width, dtype=dtype, device=device)
            for width, (dtype, device) in zip(self.layout.widths, self.layout.kinds, strict=True)
        ]
        tasks, places = range(count + spare), range(len(self.parameters))
        self._views = [[self._make_view(t, i) for i in places] for t in tasks]
        self._places = [[_place(view) for view in row] for row in self._views]
        self.count, self.spare = count, spare
        self._shares_at_rest = [_shares(buffer) for buffer in self.buffers]
        self._references_at_rest = max(max(_references(row), default=0) for row in self._views)
        self._key = key

    def _totals(self) -> dict[tuple[object, ...], Tensor | None]:
        # A process may hold no element at all, and still takes part in every exchange.
        return dict.fromkeys(self.layout.groups)

    def _make_view(self, task: int, index: int) -> Tensor:
        slot = self.layout.slots[index]
        buffer = self.buffers[slot.buffer]
        start = task * buffer.shape[1] + slot.start
        # .data: no view in autograd's eyes, so p.grad can be detached or changed in place.
        view = buffer.as_strided(slot.shape, slot.strides, start).data
        return _as_gradient_of(self.parameters[index], view)

    def _extend(
        self,
        parameters: Sequence[Tensor],
        count: int,
        sort_keys: Sequence[int],
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
        self._allocate(parameters, count, sort_keys, key, spare)
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
            view, slot = local_part(self._views[task][index]), self.layout.slots[index]
            same_form = view.shape == slot.shape and view.stride() == slot.strides
            same_kind = view.dtype == self.buffers[slot.buffer].dtype and not view.requires_grad
            if not (same_form and same_kind):
                self.replace_view(task, index)
        for task in range(len(self._views)):
            for index in range(len(self.parameters)):
                if not self.is_in_place(task, index):
                    self.replace_view(task, index)


def _add(
    totals: dict[tuple[object, ...], Tensor | None],
    groups: tuple[object, ...],
    found: Tensor,
    device: torch.device,
) -> None:
    part, before = found.to(device, non_blocking=True), totals[groups]
    totals[groups] = part if before is None else before.add_(part)


def _sum_spread(
    totals: dict[tuple[object, ...], Tensor | None], shape: torch.Size, device: torch.device
) -> Tensor:
    """The sum over the ways to be spread, each summed over its processes."""
    total: Tensor | None = None
    for groups, part_or_none in totals.items():
        part = part_or_none
        if part is None:
            part = torch.zeros(shape, dtype=torch.float64, device=device)
        sum_over(groups, part)
        total = part if total is None else total.add_(part)
    return torch.zeros(shape, dtype=torch.float64, device=device) if total is None else total


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
