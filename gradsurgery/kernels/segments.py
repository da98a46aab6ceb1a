"""Tables that tell the programs of one launch which columns they take, for which part."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Table", "table_of"]


class Table(NamedTuple):
    """Segments cut into one chunk a program, those of a part side by side; on the device."""

    programs: int
    chunks: Tensor
    """[programs, 2] int64: first column and end."""
    parts: Tensor
    """[programs] int64: the part of each chunk."""
    firsts: Tensor
    """[part_count + 1] int64: the first chunk of each part."""


_MOST_TABLES = 64
_tables: dict[tuple[Any, ...], Table] = {}
# A captured graph goes on reading the tables that it was captured with.
_captured: list[Table] = []


def table_of(
    bounds: tuple[int, ...],
    parts: tuple[int, ...],
    part_count: int,
    columns: int,
    most: int,
    device: torch.device,
) -> Table:
    """The chunks of segments, made once and kept.

    Args:
        bounds: start, stop, start, ... of the segments.
        parts: the part of each segment.
        part_count: how many parts there are.
        columns: a chunk's length is a multiple of so many columns.
        most: about how many chunks there may be, and one more for each segment.
        device: parts the kernels run.
    """
    total = sum(bounds[1::2]) - sum(bounds[::2])
    # As long as `most` programs together have all columns, and the segments' ends besides.
    length = max(math.ceil(math.ceil(total / most) / columns), 1) * columns
    key = (bounds, parts, part_count, length, device)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if key not in _tables:
        if capturing:
            raise RuntimeError(
                "run one step of surgery on the same parameters before capturing it in a CUDA "
                "graph: what granularity= and metric= need on the device is copied there once, "
                "and cannot be copied while a graph is captured"
            )
        while len(_tables) >= _MOST_TABLES:
            _tables.pop(next(iter(_tables)))
        _tables[key] = _make_table(*key)
    if capturing:
        _captured.append(_tables[key])
    return _tables[key]


def _make_table(
    bounds: tuple[int, ...],
    parts: tuple[int, ...],
    part_count: int,
    length: int,
    device: torch.device,
) -> Table:
    """Chunks of at most `length` columns; one copy to the device holds all of them."""
    segments = sorted(zip(parts, bounds[::2], bounds[1::2], strict=True))
    chunks = [
        (start, min(start + length, stop), part)
        for part, begin, stop in segments
        for start in range(begin, stop, length)
    ]
    of_chunks = [part for _, _, part in chunks]
    firsts = [0] * (part_count + 1)
    for part in of_chunks:
        firsts[part + 1] += 1
    for part in range(part_count):
        firsts[part + 1] += firsts[part]
    flat = [end for start, stop, _ in chunks for end in (start, stop)]
    moved = torch.tensor([*flat, *of_chunks, *firsts], device="cpu").to(device, non_blocking=True)
    ends, rest = moved[: len(flat)], moved[len(flat) :]
    return Table(len(chunks), ends, rest[: len(of_chunks)], rest[len(of_chunks) :])
