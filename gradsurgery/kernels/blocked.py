"""Both kernels in plain torch ops, block by block, so that each block is read once while it is hot.

Why blocks: one float32 product over D = 1e7 sums a million terms into one float32 accumulator
(error 3e-4 measured) and the CPU's matrix product is slow at such shapes. Products of blocks,
added up in float64, are as fast as the memory and exact to about 1e-7.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["combine_into", "gram", "relative_error"]

# Columns of one float32 product. Short, because its float32 sum decides how accurate M is where
# two gradients nearly cancel; long enough to amortise a call.
_GRAM_BLOCK = 512
# Up to here everything is summed in float64, which then costs next to nothing.
SMALL = 1 << 16
# Elements that the products of blocks may take up at a time (4 MiB).
_PRODUCTS = 1 << 20
# Elements that are converted to a wider type at a time: on the CPU they stay in the cache.
_SCRATCH_ELEMENTS = {"cpu": 1 << 19, "default": 1 << 24}
# Columns of row 0 that stay in the CPU's second-level cache between scaling and accumulation.
_COMBINE_CHUNK = 1 << 20


def gram(rows: Tensor) -> Tensor:
    """M = G Gᵀ: real [T, D] -> float64 [T, T]; products in float32 or better."""
    count, width = rows.shape
    if width <= SMALL or not _products_are_exact(rows):
        return _gram_widened(rows, torch.float64)
    if rows.dtype in (torch.float16, torch.bfloat16):
        return _gram_widened(rows, torch.float32)
    total = torch.zeros(count, count, dtype=torch.float64, device=rows.device)
    size = max(_PRODUCTS // count**2, 1) * _GRAM_BLOCK
    for columns in _chunks(rows, size):
        total += _sum_of_block_products(rows[:, columns])
    return total


def relative_error(rows: Tensor) -> float:
    """How accurate `gram` is, relative to the product of two norms."""
    if rows.shape[1] <= SMALL or rows.dtype == torch.float64 or not _products_are_exact(rows):
        return torch.finfo(torch.float64).eps
    # float32 sums over blocks of 512, their errors averaged over at least 128 blocks. Products of
    # 16-bit numbers fall on a coarse grid, so that errors repeat and average less: 1.9e-7 measured
    # where the BLAS adds up one after the other.
    return 4e-7 if rows.dtype in (torch.float16, torch.bfloat16) else 1e-8


def _gram_widened(rows: Tensor, dtype: torch.dtype) -> Tensor:
    total = torch.zeros(rows.shape[0], rows.shape[0], dtype=torch.float64, device=rows.device)
    for _, chunk in _widened_chunks(rows, dtype):
        total += chunk @ chunk.T if dtype == torch.float64 else _sum_of_block_products(chunk)
    return total


def _sum_of_block_products(rows: Tensor) -> Tensor:
    count, width = rows.shape
    along, across = rows.stride(1), rows.stride(0)
    blocks = width // _GRAM_BLOCK
    # [blocks, T, block]: a view, whatever the distance between the rows.
    tiles = rows.as_strided((blocks, count, _GRAM_BLOCK), (_GRAM_BLOCK * along, across, along))
    total = torch.bmm(tiles, tiles.mT).sum(0, dtype=torch.float64)
    if blocks * _GRAM_BLOCK < width:
        tail = rows[:, blocks * _GRAM_BLOCK :].to(torch.float64)
        total += tail @ tail.T
    return total


def _products_are_exact(rows: Tensor) -> bool:
    # On CUDA, and on the CPU after torch.set_float32_matmul_precision("medium"), a float32 matrix
    # product may run in TF32 or bfloat16 (measured: 5e-5 off). float64 products never do.
    if rows.device.type != "cpu":
        return rows.dtype == torch.float64
    if rows.dtype == torch.float64:
        return True
    precision: str = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    return precision in ("none", "ieee")


def combine_into(rows: Tensor, weights: Tensor, out: Tensor) -> None:
    """out = Gᵀ w: real [T, D], [T] -> [D]; `out` may be row 0 of G, but no other part of it."""
    count, _ = rows.shape
    exact = rows.device.type == "cpu" and _products_are_exact(rows)
    direct = exact and rows.dtype in (torch.float32, torch.float64)
    if direct:
        first, rest = weights[0].to(rows.dtype), weights[1:].to(rows.dtype)
        others = rows[1:].T
        for columns in _chunks(rows, _COMBINE_CHUNK):
            target = out[columns]
            torch.mul(rows[0, columns], first, out=target)
            if count > 1:
                target.addmv_(others[columns], rest)
        return
    # Accumulating in the rows' own 16-bit type would round T times.
    wide = torch.float32 if exact and rows.dtype != torch.float64 else torch.float64
    factors = weights.to(wide)
    for columns, chunk in _widened_chunks(rows, wide):
        out[columns].copy_(torch.mv(chunk.T, factors))


def _widened_chunks(rows: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Copies of successive columns in a wider type, all in one small buffer that is used again."""
    count, width = rows.shape
    elements = _SCRATCH_ELEMENTS.get(rows.device.type, _SCRATCH_ELEMENTS["default"])
    size = max(elements // count // _GRAM_BLOCK, 1) * _GRAM_BLOCK
    scratch = torch.empty(count, min(size, width), dtype=dtype, device=rows.device)
    for columns in _chunks(rows, size):
        chunk = scratch[:, : columns.stop - columns.start]
        chunk.copy_(rows[:, columns])
        yield columns, chunk


def _chunks(rows: Tensor, size: int) -> list[slice]:
    width = rows.shape[1]
    return [slice(start, min(start + size, width)) for start in range(0, width, size)]
