"""Layout: which columns of which buffer belong to which parameter; computed once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradsurgery.distributed.group import shard_groups

__all__ = ["Layout", "PartSpans", "Slot", "Span", "local_part", "name_of"]

# Parameters start at multiples of this, so that vectorised kernels find aligned gradients.
_ALIGNMENT_BYTES = 64
_MOST_SELECTIONS = 8
# Of float32 up to 4,096 numbers, beside 250,000 and more.
_SMALL_BYTES = 1 << 14
_LARGE_BYTES = 1_000_000


@dataclass(frozen=True)
class Slot:
    """Where one parameter's gradient lies: columns [start, start + length) of a buffer's rows."""

    buffer: int
    start: int
    length: int
    """With padding, which is zero whenever somebody reads it."""
    shape: torch.Size
    strides: tuple[int, ...]


class Span(NamedTuple):
    """Neighbouring columns of one buffer."""

    buffer: int
    start: int
    stop: int


class PartSpans(NamedTuple):
    """Columns of one buffer as [start, stop), and the part of the model that each belongs to."""

    bounds: list[tuple[int, int]]
    parts: list[int]


class Layout:
    """Parameters side by side in one buffer for each dtype, device and way of being sharded.

    Args:
        parameters: of any dtypes and devices. Of a DTensor the buffers hold this process's part.
        sort_keys: for each parameter its place among those of its buffer, in ascending order, so
            that surgery on those of one key sees one contiguous piece.
        shards: every buffer's width is a multiple of so many times 64 bytes.
    """

    def __init__(
        self, parameters: Sequence[Tensor] = (), sort_keys: Sequence[int] = (), shards: int = 1
    ) -> None:
        self.widths: list[int] = []
        self.kinds: list[tuple[torch.dtype, torch.device]] = []
        self.groups: list[tuple[Any, ...]] = []
        """For each buffer the process groups over which its columns are spread."""
        self.padding: list[Tensor] = []
        """For each buffer the columns that belong to no parameter, int64 on its device."""
        placed: dict[int, Slot] = {}
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for index, p in enumerate(parameters):
            kinds.setdefault((p.dtype, p.device, shard_groups(p)), []).append(index)
        if shards == 1:
            kinds = _apart(parameters, kinds)
        for buffer, ((dtype, device, groups, *_), indices) in enumerate(kinds.items()):
            width = 0
            padding: list[int] = []
            alignment = max(_ALIGNMENT_BYTES // dtype.itemsize, 1)
            for index in sorted(indices, key=lambda i: sort_keys[i]):
                p = local_part(parameters[index])
                length = -(-p.numel() // alignment) * alignment
                strides = p.stride() if _is_dense(p) else _contiguous_strides(p.shape)
                placed[index] = Slot(buffer, width, length, p.shape, tuple(strides))
                padding += range(width + p.numel(), width + length)
                width += length
            end = width + -width % (alignment * shards)
            padding += range(width, end)
            self.widths.append(end)
            self.kinds.append((dtype, device))
            self.groups.append(groups)
            columns = torch.tensor(padding, dtype=torch.int64, device="cpu")
            self.padding.append(columns.to(device, non_blocking=True))
        # In the order of memory, so that neighbours in the list are neighbours in the buffer.
        order = sorted(placed, key=lambda i: (placed[i].buffer, placed[i].start))
        self.parameters = [parameters[i] for i in order]
        self.slots = [placed[i] for i in order]
        self._selections: dict[tuple[object, ...], Any] = {}

    def spans(self, chosen: Sequence[bool]) -> list[Span]:
        """The chosen parameters' columns, neighbours joined."""
        key = ("spans", *chosen)
        if key not in self._selections:
            joined = self._joined(chosen, [0] * len(self.slots))
            self._remember(key, [span for span, _ in joined])
        found: list[Span] = self._selections[key]
        return found

    def spans_by_part(self, chosen: Sequence[bool], parts: Sequence[int]) -> dict[int, PartSpans]:
        """Buffer -> the chosen parameters' columns, those of one part joined, and their parts."""
        key = ("parts", *chosen, *parts)
        if key not in self._selections:
            found: dict[int, PartSpans] = {}
            for (buffer, start, stop), part in self._joined(chosen, parts):
                bounds, own = found.setdefault(buffer, PartSpans([], []))
                bounds.append((start, stop))
                own.append(part)
            self._remember(key, found)
        result: dict[int, PartSpans] = self._selections[key]
        return result

    def view(self, flats: Sequence[Tensor], index: int) -> Tensor:
        """Where parameter `index` lies in memory that is like one row of every buffer."""
        slot = self.slots[index]
        return flats[slot.buffer].as_strided(slot.shape, slot.strides, slot.start)

    def view_as_real(self, flats: Sequence[Tensor], index: int) -> Tensor:
        """The same in real memory, twice as long for complex parameters."""
        slot = self.slots[index]
        if not self.kinds[slot.buffer][0].is_complex:
            return self.view(flats, index)
        strides = (*(2 * stride for stride in slot.strides), 1)
        return flats[slot.buffer].as_strided((*slot.shape, 2), strides, 2 * slot.start)

    def _joined(self, chosen: Sequence[bool], parts: Sequence[int]) -> Iterable[tuple[Span, int]]:
        joined: list[tuple[Span, int]] = []
        for slot, wanted, part in zip(self.slots, chosen, parts, strict=True):
            if not wanted or slot.length == 0:
                continue
            start, stop = slot.start, slot.start + slot.length
            if joined:
                last, last_part = joined[-1]
                if last.buffer == slot.buffer and last.stop == start and last_part == part:
                    joined[-1] = last._replace(stop=stop), part
                    continue
            joined.append((Span(slot.buffer, start, stop), part))
        return joined

    def _remember(self, key: tuple[object, ...], found: object) -> None:
        while len(self._selections) >= _MOST_SELECTIONS:
            self._selections.pop(next(iter(self._selections)))
        self._selections[key] = found


def _apart(
    parameters: Sequence[Tensor], kinds: dict[tuple[Any, ...], list[int]]
) -> dict[tuple[Any, ...], list[int]]:
    """Small parameters in buffers of their own, where the others are large together.

    Who keeps the gradient of a bias, for a log or in a file, keeps the memory of its whole buffer.
    """
    found: dict[tuple[Any, ...], list[int]] = {}
    for kind, indices in kinds.items():
        sizes = {i: local_part(parameters[i]).numel() * kind[0].itemsize for i in indices}
        large = sum(sizes.values()) >= _LARGE_BYTES
        for i in indices:
            small = large and sizes[i] <= _SMALL_BYTES
            found.setdefault((*kind, small), []).append(i)
    return found


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a DTensor; any other tensor itself."""
    part: Tensor = getattr(tensor, "_local_tensor", tensor)
    return part


def name_of(parameter: Tensor, optimizer: Optimizer) -> str:
    """What to call a parameter in messages: its name where the optimizer knows it, or its place."""
    for number, group in enumerate(optimizer.param_groups):
        for index, p in enumerate(group["params"]):
            if p is parameter:
                names = group.get("param_names")
                name = f"{names[index]!r}" if names else f"{index} of param_groups[{number}]"
                return f"{name} (shape {list(p.shape)})"
    return f"of shape {list(parameter.shape)}"


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
