"""Triton kernels for what touches size D: gram in two deterministic stages, combine in one pass.

Both take all columns with one Gram matrix, or segments of columns with one each (`granularity=`,
`metric=`): the same two launches and one launch, whatever the number of segments.

Importing this module needs Triton, which comes with the CUDA builds of torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradsurgery.kernels.blocked import SMALL
from gradsurgery.kernels.segments import Table, table_of

__all__ = [
    "combine_into",
    "combine_segments",
    "gram",
    "gram_segments",
    "launch",
    "relative_error",
]


class Tile(NamedTuple):
    """How the first stage of gram cuts its columns; `benchmarks tune` measures these."""

    columns: int
    """Columns that a program takes at a time."""
    warps: int
    programs: int
    """Most programs. Fixed, so that the sums do not depend on the device's size."""
    inner: int = 32
    """Tiles that are summed in float32 before they are added up in float64."""
    stages: int = 3
    """Tiles on their way from memory at a time, where the products are matrix products."""


# By the padded number of rows; above 8 rows the products are matrix products.
GRAM_TILES = {
    1: Tile(512, 4, 1056),
    2: Tile(512, 4, 1056),
    4: Tile(256, 4, 1056),
    8: Tile(128, 4, 1056),
    16: Tile(128, 4, 264),
    32: Tile(64, 4, 264),
    64: Tile(64, 4, 264),
}
COMBINE_COLUMNS, COMBINE_WARPS = 1024, 4
_COMBINE_PROGRAMS = 8448


@triton.jit
def _columns_of(program, programs, starts, width, B: tl.constexpr, SEGMENTED: tl.constexpr):
    """First column, end and step of a program: its chunk of a segment, or every n-th tile.

    Segments begin and end at multiples of 64 bytes, of which 8 numbers of any type are sure.
    """
    if SEGMENTED:
        begin = tl.multiple_of(tl.load(starts + 2 * program), 8)
        end = tl.multiple_of(tl.load(starts + 2 * program + 1), 8)
        step = program * 0 + B
    else:
        begin, end, step = program * B, program * 0 + width, programs.to(tl.int64) * B
    return begin, end, step


@triton.jit(do_not_specialize=["count"])
def gram_by_lanes(
    rows, roots, chunks, partial, width, row_stride, column_stride, count,
    P: tl.constexpr, B: tl.constexpr, INNER: tl.constexpr, ACC: tl.constexpr,
    SEGMENTED: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Up to 8 rows: every thread sums all P×P products of its own columns in registers.

    partial[program] = M over the program's columns, float64.
    """
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    begin, end, step = _columns_of(program, programs, chunks, width, B, SEGMENTED)
    i, j = tl.arange(0, P)[:, None, None], tl.arange(0, P)[None, :, None]
    lane = tl.arange(0, B)[None, None, :]
    first, second = rows + i.to(tl.int64) * row_stride, rows + j.to(tl.int64) * row_stride
    total = tl.zeros([P, P], tl.float64)
    for outer in range(begin, end, step * INNER):
        sums = tl.zeros([P, P, B], ACC)
        for start in range(outer, tl.minimum(outer + step * INNER, end), step):
            column = start + lane
            here = column < end
            x = tl.load(first + column * column_stride, mask=(i < count) & here, other=0.0).to(ACC)
            y = tl.load(second + column * column_stride, mask=(j < count) & here, other=0.0).to(ACC)
            if WEIGHTED:
                root = tl.load(roots + column, mask=here, other=0.0).to(ACC)
                x *= root
                y *= root
            sums += x * y
        total += tl.sum(sums.to(tl.float64), axis=2)
    at = tl.arange(0, P)[:, None] * P + tl.arange(0, P)[None, :]
    tl.store(partial + program * P * P + at, total)


@triton.jit(do_not_specialize=["count"])
def gram_by_products(
    rows, roots, chunks, partial, width, row_stride, column_stride, count,
    P: tl.constexpr, B: tl.constexpr, INNER: tl.constexpr, ACC: tl.constexpr,
    SEGMENTED: tl.constexpr, WEIGHTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """More rows: one matrix product for each tile, on tensor cores, added up in float64.

    float16 and bfloat16 are exact in TF32; float32 goes in as three TF32 products, of the high and
    low halves of its numbers.
    """
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    begin, end, step = _columns_of(program, programs, chunks, width, B, SEGMENTED)
    row, lane = tl.arange(0, P)[:, None], tl.arange(0, B)[None, :]
    first = rows + row.to(tl.int64) * row_stride
    total = tl.zeros([P, P], tl.float64)
    for start in range(begin, end, step):
        column = start + lane
        here = (row < count) & (column < end)
        x = tl.load(first + column * column_stride, mask=here, other=0.0).to(ACC)
        if WEIGHTED:
            x *= tl.load(roots + column, mask=column < end, other=0.0).to(ACC)
        product = tl.dot(x, tl.trans(x), input_precision=PRECISION, out_dtype=ACC)
        total += product.to(tl.float64)
    at = row * P + tl.arange(0, P)[None, :]
    tl.store(partial + program * P * P + at, total)


@triton.jit(do_not_specialize=["count", "programs"])
def sum_partials(
    partial, out, firsts, programs, count,
    P: tl.constexpr, N: tl.constexpr, SEGMENTED: tl.constexpr,
):  # fmt: skip
    """Second stage, one program for each row of each M: the sum over programs, in a fixed order."""
    i, segment, j = tl.program_id(0), tl.program_id(1), tl.arange(0, P)[None, :]
    begin, end = 0, programs
    if SEGMENTED:
        begin = tl.load(firsts + segment).to(tl.int32)
        end = tl.load(firsts + segment + 1).to(tl.int32)
    total = tl.zeros([N, P], tl.float64)
    for start in range(begin, end, N):
        which = start + tl.arange(0, N)[:, None]
        at = (which.to(tl.int64) * P + i) * P + j
        total += tl.load(partial + at, mask=which < end, other=0.0)
    column = tl.arange(0, P)
    to = (segment * count + i) * count + column
    tl.store(out + to, tl.sum(total, axis=0), mask=column < count)


@triton.jit(do_not_specialize=["count"])
def combine_rows(
    rows, weights, out, chunks, parts, width, row_stride, column_stride, out_stride, count,
    B: tl.constexpr, ACC: tl.constexpr, SEGMENTED: tl.constexpr,
):  # fmt: skip
    """out = Gᵀ w. A program reads its columns of all rows before it writes: in place is safe."""
    program = tl.program_id(0).to(tl.int64)
    if SEGMENTED:
        begin = tl.multiple_of(tl.load(chunks + 2 * program), 8)
        end = tl.multiple_of(tl.load(chunks + 2 * program + 1), 8)
        weights += tl.load(parts + program) * count
    else:
        begin, end = program * B, tl.minimum(program * B + B, width)
    for first in range(begin, end, B):
        column = first + tl.arange(0, B)
        here = column < end
        start = rows + column * column_stride
        total = tl.zeros([B], ACC)
        for t in tl.range(0, count, loop_unroll_factor=8):
            weight = tl.load(weights + t).to(ACC)
            total += weight * tl.load(start, mask=here, other=0.0).to(ACC)
            start += row_stride
        tl.store(out + column * out_stride, total.to(out.dtype.element_ty), mask=here)


def gram(rows: Tensor) -> Tensor:
    """M = G Gᵀ: real [T, D] with any strides, T <= 64 -> float64 [T, T]. Two launches."""
    count, width = rows.shape
    wide = _in_float64(rows)
    tile = _tile(count, wide)
    programs = max(min(triton.cdiv(width, tile.columns), tile.programs), 1)
    return _gram(rows, None, programs, None, 1, tile, wide)[0]


def gram_segments(
    rows: Tensor,
    bounds: Sequence[int],
    parts: Sequence[int],
    part_count: int,
    roots: Tensor | None,
) -> Tensor:
    """M of each part, summed in float64: [T, D] -> [part_count, T, T]. Two launches.

    Args:
        rows: real, T <= 64.
        bounds: start, stop, start, ... of segments, at multiples of 64 bytes.
        parts: the part of each segment.
        part_count: how many parts there are.
        roots: None, or [D]: a factor for each column of all rows.
    """
    wide = not _halves_on_tensor_cores(rows)
    tile = _tile(len(rows), wide)
    table = table_of(
        tuple(bounds), tuple(parts), part_count, tile.columns, tile.programs, rows.device
    )
    return _gram(rows, table, table.programs, roots, part_count, tile, wide)


def _gram(
    rows: Tensor,
    table: Table | None,
    programs: int,
    roots: Tensor | None,
    part_count: int,
    tile: Tile,
    wide: bool,
) -> Tensor:
    count, width = rows.shape
    padded = triton.next_power_of_2(count)
    partial = rows.new_empty(programs, padded, padded, dtype=torch.float64)
    out = rows.new_empty(part_count, count, count, dtype=torch.float64)
    chunks = partial if table is None else table.chunks
    weighted = roots is not None
    constants: dict[str, Any] = {
        "P": padded,
        "B": tile.columns,
        "INNER": tile.inner,
        "ACC": tl.float64 if wide else tl.float32,
        "SEGMENTED": table is not None,
        "WEIGHTED": weighted,
    }
    kernel = gram_by_lanes
    if padded > 8:
        kernel = gram_by_products
        # What was multiplied by a factor is no 16-bit number any more.
        short = rows.dtype.itemsize == 2 and not weighted
        constants["PRECISION"] = "tf32" if short else "tf32x3"
    factors = rows if roots is None else roots
    shape: tuple[Any, ...] = (width, *rows.stride(), count)
    if programs:
        constants |= {"num_warps": tile.warps, "num_stages": tile.stages}
        launch(kernel, (programs,), rows, factors, chunks, partial, *shape, **constants)
    firsts = partial if table is None else table.firsts
    sizes = {"P": padded, "N": 1024 // padded, "SEGMENTED": table is not None}
    launch(sum_partials, (count, part_count), partial, out, firsts, programs, count, **sizes)
    return out


def combine_into(rows: Tensor, weights: Tensor, out: Tensor) -> None:
    """out = Gᵀ w: real [T, D], [T] -> [D], any strides; `out` may be a row of G. One launch."""
    width = rows.shape[1]
    if width:
        _combine(rows, weights, out, None, triton.cdiv(width, COMBINE_COLUMNS))


def combine_segments(
    rows: Tensor, weights: Tensor, bounds: Sequence[int], parts: Sequence[int], out: Tensor
) -> None:
    """Over each segment out = Gᵀ w with its part's weights, [part_count, T]. One launch.

    The arguments are those of `gram_segments`; `out` is [D] without gaps, and may be a row of G.
    """
    part_count = len(weights)
    columns, most = COMBINE_COLUMNS, _COMBINE_PROGRAMS
    table = table_of(tuple(bounds), tuple(parts), part_count, columns, most, rows.device)
    if table.programs:
        _combine(rows, weights, out, table, table.programs)


def _combine(
    rows: Tensor, weights: Tensor, out: Tensor, table: Table | None, programs: int
) -> None:
    count, width = rows.shape
    weights = weights.contiguous()
    tables = (weights, weights) if table is None else (table.chunks, table.parts)
    shape: tuple[Any, ...] = (width, *rows.stride(), out.stride(0), count)
    wide = tl.float64 if rows.dtype in (torch.float32, torch.float64) else tl.float32
    constants = {"B": COMBINE_COLUMNS, "ACC": wide, "SEGMENTED": table is not None}
    arguments: tuple[Any, ...] = (weights, out, *tables, *shape)
    launch(combine_rows, (programs,), rows, *arguments, **constants, num_warps=COMBINE_WARPS)


def relative_error(rows: Tensor) -> float:
    """How accurate `gram` is, relative to the product of two rows' norms."""
    if _in_float64(rows):
        return torch.finfo(torch.float64).eps
    # Tensor cores round towards zero, so that errors of a tile do not cancel.
    return 1e-6 if rows.shape[0] > 8 else 4e-7 if rows.dtype.itemsize == 2 else 1e-8


def segments_relative_error(rows: Tensor) -> float:
    """The same of `gram_segments`."""
    return 1e-6 if _halves_on_tensor_cores(rows) else torch.finfo(torch.float64).eps


def _halves_on_tensor_cores(rows: Tensor) -> bool:
    # A matrix product of float64 cannot be compiled where 16-bit numbers are loaded for it.
    return rows.dtype.itemsize == 2 and rows.shape[0] > 8


def _in_float64(rows: Tensor) -> bool:
    # A few columns in float64 cost next to nothing, and their rounding would not average out.
    few = rows.shape[1] <= SMALL and not _halves_on_tensor_cores(rows)
    return rows.dtype == torch.float64 or few


def _tile(count: int, wide: bool) -> Tile:
    tile = GRAM_TILES[triton.next_power_of_2(count)]
    return tile._replace(columns=tile.columns // 2) if wide else tile


def launch(kernel: Any, grid: tuple[int, ...], first: Tensor, *rest: Any, **constants: Any) -> None:
    """Run a kernel on the device of its first argument, which need not be the current one."""
    on_cuda = first.device.type == "cuda"
    with torch.cuda.device(first.device) if on_cuda else nullcontext():
        kernel[grid](first, *rest, **constants)
