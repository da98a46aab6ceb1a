"""Triton kernels for what touches size D: gram in two deterministic stages, combine in one pass.

Importing this module needs Triton, which comes with the CUDA builds of torch.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradsurgery.kernels.blocked import SMALL

__all__ = ["combine_into", "gram", "launch", "resolution"]

# Programs of the first stage. Fixed, so that the sums do not depend on the device's size: 8 blocks
# of 128 threads for each of an H100's 132 processors, or 2 where the tile of M is large.
_PROGRAMS_SMALL = 1056
_PROGRAMS_LARGE = 264
# Columns of a tile, by the padded number of rows; above 8 rows the products are matrix products.
_COLUMNS = {1: 512, 2: 512, 4: 256, 8: 128, 16: 128, 32: 64, 64: 64}
# Tiles that are summed in float32 before they are added up in float64.
_INNER = 32
_COMBINE_COLUMNS = 1024


@triton.jit
def gram_by_lanes(
    rows, partial, width, row_stride, column_stride,
    T: tl.constexpr, P: tl.constexpr, B: tl.constexpr, INNER: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Up to 8 rows: every thread sums all P×P products of its own columns in registers.

    partial[program] = M over every `programs`-th tile of B columns, float64.
    """
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    i, j = tl.arange(0, P)[:, None, None], tl.arange(0, P)[None, :, None]
    lane = tl.arange(0, B)[None, None, :]
    first, second = rows + i.to(tl.int64) * row_stride, rows + j.to(tl.int64) * row_stride
    total = tl.zeros([P, P], tl.float64)
    tiles = tl.cdiv(width, B)
    for outer in range(program, tiles, programs * INNER):
        sums = tl.zeros([P, P, B], ACC)
        for tile in range(outer, tl.minimum(outer + programs * INNER, tiles), programs):
            column = tile * B + lane
            here = column < width
            x = tl.load(first + column * column_stride, mask=(i < T) & here, other=0.0)
            y = tl.load(second + column * column_stride, mask=(j < T) & here, other=0.0)
            sums += x.to(ACC) * y.to(ACC)
        total += tl.sum(sums.to(tl.float64), axis=2)
    at = tl.arange(0, P)[:, None] * P + tl.arange(0, P)[None, :]
    tl.store(partial + program * P * P + at, total)


@triton.jit
def gram_by_products(
    rows, partial, width, row_stride, column_stride,
    T: tl.constexpr, P: tl.constexpr, B: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """More rows: one matrix product for each tile, on tensor cores, added up in float64.

    float16 and bfloat16 are exact in TF32; float32 goes in as three TF32 products, of the high and
    low halves of its numbers.
    """
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    row, lane = tl.arange(0, P)[:, None], tl.arange(0, B)[None, :]
    start = rows + row.to(tl.int64) * row_stride
    total = tl.zeros([P, P], tl.float64)
    for tile in range(program, tl.cdiv(width, B), programs):
        column = tile * B + lane
        here = (row < T) & (column < width)
        x = tl.load(start + column * column_stride, mask=here, other=0.0).to(ACC)
        product = tl.dot(x, tl.trans(x), input_precision=PRECISION, out_dtype=ACC)
        total += product.to(tl.float64)
    at = row * P + tl.arange(0, P)[None, :]
    tl.store(partial + program * P * P + at, total)


@triton.jit
def sum_partials(partial, out, programs, T: tl.constexpr, P: tl.constexpr, N: tl.constexpr):
    """Second stage, one program for each row of M: out[i] = Σ over programs, in a fixed order."""
    i, j = tl.program_id(0), tl.arange(0, P)[None, :]
    total = tl.zeros([N, P], tl.float64)
    for start in range(0, programs, N):
        which = start + tl.arange(0, N)[:, None]
        total += tl.load(partial + (which * P + i) * P + j, mask=which < programs, other=0.0)
    column = tl.arange(0, P)
    tl.store(out + i * T + column, tl.sum(total, axis=0), mask=column < T)


@triton.jit
def combine_rows(
    rows, weights, out, width, row_stride, column_stride, out_stride,
    T: tl.constexpr, B: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out = Gᵀ w. A program reads its columns of all rows before it writes: in place is safe."""
    column = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    here = column < width
    start = rows + column * column_stride
    total = tl.zeros([B], ACC)
    for t in tl.range(0, T, loop_unroll_factor=8):
        weight = tl.load(weights + t).to(ACC)
        total += weight * tl.load(start, mask=here, other=0.0).to(ACC)
        start += row_stride
    tl.store(out + column * out_stride, total.to(out.dtype.element_ty), mask=here)


def gram(rows: Tensor) -> Tensor:
    """M = G Gᵀ: real [T, D] with any strides, T <= 64 -> float64 [T, T]. Two launches."""
    count, width = rows.shape
    padded = triton.next_power_of_2(count)
    wide = _in_float64(rows)
    columns = _COLUMNS[padded] // (2 if wide else 1)
    most = _PROGRAMS_LARGE if padded > 8 else _PROGRAMS_SMALL
    programs = max(min(triton.cdiv(width, columns), most), 1)
    partial = rows.new_empty(programs, padded, padded, dtype=torch.float64)
    out = rows.new_empty(count, count, dtype=torch.float64)
    sizes = {"T": count, "P": padded, "B": columns, "ACC": tl.float64 if wide else tl.float32}
    where = (rows, partial, width, rows.stride(0), rows.stride(1))
    if padded > 8:
        precision = "tf32" if rows.dtype.itemsize == 2 else "tf32x3"
        launch(gram_by_products, (programs,), *where, PRECISION=precision, **sizes)
    else:
        launch(gram_by_lanes, (programs,), *where, INNER=_INNER, **sizes)
    launch(sum_partials, (count,), partial, out, programs, T=count, P=padded, N=1024 // padded)
    return out


def combine_into(rows: Tensor, weights: Tensor, out: Tensor) -> None:
    """out = Gᵀ w: real [T, D], [T] -> [D], any strides; `out` may be a row of G. One launch."""
    count, width = rows.shape
    if width == 0:
        return
    wide = tl.float64 if rows.dtype in (torch.float32, torch.float64) else tl.float32
    grid = (triton.cdiv(width, _COMBINE_COLUMNS),)
    sizes = {"T": count, "B": _COMBINE_COLUMNS, "ACC": wide}
    strides = (*rows.stride(), out.stride(0))
    launch(combine_rows, grid, rows, weights.contiguous(), out, width, *strides, **sizes)


def resolution(rows: Tensor) -> float:
    """How accurate `gram` is, relative to the product of two rows' norms."""
    if _in_float64(rows):
        return torch.finfo(torch.float64).eps
    # Tensor cores round towards zero, so that errors of a tile do not cancel.
    return 1e-6 if rows.shape[0] > 8 else 4e-7 if rows.dtype.itemsize == 2 else 1e-8


def _in_float64(rows: Tensor) -> bool:
    # A few columns in float64 cost next to nothing, and their rounding would not average out. A
    # matrix product of float64 cannot be compiled where 16-bit numbers are loaded for it.
    halves_on_tensor_cores = rows.dtype.itemsize == 2 and rows.shape[0] > 8
    return rows.dtype == torch.float64 or (rows.shape[1] <= SMALL and not halves_on_tensor_cores)


def launch(kernel: Any, grid: tuple[int, ...], first: Tensor, *rest: Any, **constants: Any) -> None:
    """Run a kernel on the device of its first argument, which need not be the current one."""
    on_cuda = first.device.type == "cuda"
    with torch.cuda.device(first.device) if on_cuda else nullcontext():
        kernel[grid](first, *rest, **constants)
