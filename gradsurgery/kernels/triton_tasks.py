"""Triton kernels for the T×T work between gram and combine: one small launch for each step.

Rows of the coefficient matrix do not depend on each other (every projection is onto an original
gradient), so each is a program of its own; T <= 64. Importing this module needs Triton.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradsurgery.kernels.triton_rows import launch

__all__ = ["ags", "draw_orders", "guard", "project", "rescale", "vaccinate"]

# How often each device's captured graphs have been replayed: the seed is frozen into a graph.
_replays: dict[torch.device, Tensor] = {}


@triton.jit(do_not_specialize=["seed", "captured"])
def random_orders(
    orders, seed, replays, captured, T: tl.constexpr, P: tl.constexpr, SHARED: tl.constexpr
):
    """orders[batch, i] = a random permutation of the tasks: each task's rank among random keys."""
    batch, i = tl.program_id(0), tl.program_id(1)
    row = batch * T + (0 if SHARED else i)
    row += captured * tl.load(replays).to(tl.int32) * tl.num_programs(0) * T
    j = tl.arange(0, P)
    key = tl.where(
        j < T, tl.randint(seed, row * P + j).to(tl.uint32, bitcast=True).to(tl.int64), 1 << 40
    )
    mine, other = tl.expand_dims(key, 1), tl.expand_dims(key, 0)
    before = (other < mine) | ((other == mine) & (j[None, :] < j[:, None]))
    rank = tl.sum(before.to(tl.int32), axis=1)
    tl.store(orders + (batch * T + i) * T + rank, j.to(tl.int64), mask=j < T)


@triton.jit
def project_row(gram, orders, altered, T: tl.constexpr, P: tl.constexpr):
    """altered[batch, i] = the coefficients of ĝ_i, conflicts with the others projected away."""
    batch, i = tl.program_id(0), tl.program_id(1)
    k = tl.arange(0, P)
    start = gram + batch * T * T
    mine = tl.where(k == i, 1.0, 0.0).to(tl.float64)
    for step in range(T):
        j = tl.load(orders + (batch * T + i) * T + step)
        column = tl.load(start + j * T + k, mask=k < T, other=0.0)
        square = tl.load(start + j * T + j)
        dot = tl.sum(mine * column, axis=0)
        wanted = (dot < 0) & (j != i) & (square != 0)
        removed = tl.where(wanted, -dot / tl.where(wanted, square, 1.0), 0.0)
        mine += tl.where(k == j, removed, 0.0)
    tl.store(altered + (batch * T + i) * T + k, mine, mask=k < T)


@triton.jit
def vaccinate_row(
    gram, orders, target, altered, moved,
    BETA: tl.constexpr, MOST: tl.constexpr, T: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """GradVac for row i: its altered gradient's coefficients, and its new target cosines."""
    batch, i = tl.program_id(0), tl.program_id(1)
    k, l = tl.arange(0, P), tl.arange(0, P)[:, None]
    start = gram + batch * T * T
    m = tl.load(start + l * T + k[None, :], mask=(l < T) & (k[None, :] < T), other=0.0)
    at = (batch * T + i) * T
    wanted_all = tl.load(target + at + k, mask=k < T, other=0.0)
    before = wanted_all
    mine = tl.where(k == i, 1.0, 0.0).to(tl.float64)
    for step in range(T):
        j = tl.load(orders + at + step)
        column = tl.load(start + j * T + k, mask=k < T, other=0.0)
        norm = tl.sqrt(tl.load(start + j * T + j))
        # m is symmetric: the sum over l of m[l, k] c[k] serves as the product with a row of c.
        product = tl.sum(m * mine[None, :], axis=1)
        length = tl.sqrt(tl.maximum(tl.sum(product * mine, axis=0), 0.0))
        defined = (j != i) & (length > 0) & (norm > 0)
        scale = tl.where(defined, length * norm, 1.0)
        cosine = tl.sum(mine * column, axis=0) / scale
        cosine = tl.minimum(tl.maximum(cosine, -1.0), 1.0)
        wanted = tl.sum(tl.where(k == j, wanted_all, 0.0), axis=0)
        limited = tl.minimum(tl.maximum(wanted, -MOST), MOST)
        sine = tl.sqrt(1 - limited * limited)
        pull = limited * tl.sqrt(1 - cosine * cosine) - cosine * sine
        added = length * pull / tl.where(defined, norm * sine, 1.0)
        added = tl.where(defined, tl.where(cosine < wanted, added, 0.0), 0.0)
        change = tl.where(defined, BETA * (cosine - wanted), 0.0)
        mine += tl.where(k == j, added, 0.0)
        wanted_all += tl.where(k == j, change, 0.0)
    finite = tl.sum(tl.sum(m - m, axis=1), axis=0) == 0
    tl.store(altered + at + k, mine, mask=k < T)
    tl.store(moved + at + k, tl.where(finite, wanted_all, before), mask=k < T)


@triton.jit
def sum_rows(altered, out, T: tl.constexpr, P: tl.constexpr):
    """out[batch] = column sums: the coefficients of Σ_i ĝ_i."""
    batch = tl.program_id(0)
    i, k = tl.arange(0, P)[:, None], tl.arange(0, P)[None, :]
    mask = (i < T) & (k < T)
    rows = tl.load(altered + (batch * T + i) * T + k, mask=mask, other=0.0)
    column = tl.arange(0, P)
    tl.store(out + batch * T + column, tl.sum(rows, axis=0), mask=column < T)


@triton.jit
def rescale_one(
    gram, weights, out,
    LIMIT: tl.constexpr, NOISE: tl.constexpr, T: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """out = w · sqrt(1ᵀM1 / wᵀMw), up to LIMIT; w itself where only noise is left."""
    batch = tl.program_id(0)
    i, k = tl.arange(0, P), tl.arange(0, P)[None, :]
    mask = (i[:, None] < T) & (k < T)
    m = tl.load(gram + (batch * T + i[:, None]) * T + k, mask=mask, other=0.0)
    w = tl.load(weights + batch * T + i, mask=i < T, other=0.0)
    square = tl.load(gram + (batch * T + i) * T + i, mask=i < T, other=0.0)
    before = tl.maximum(tl.sum(tl.sum(m, axis=1), axis=0), 0.0)
    after = tl.sum(w * tl.sum(m * w[None, :], axis=1), axis=0)
    size = tl.sum(tl.abs(w) * tl.sqrt(tl.maximum(square, 0.0)), axis=0)
    usable = after > NOISE * size * size
    factor = tl.sqrt(before / tl.where(usable, after, 1.0))
    if LIMIT is not None:
        factor = tl.where(factor > LIMIT, LIMIT, factor)
    tl.store(out + batch * T + i, w * tl.where(usable, factor, 1.0), mask=i < T)


@triton.jit
def guard_one(gram, weights, out, T: tl.constexpr, P: tl.constexpr):
    """out = w, and NaN where any entry of M is not finite."""
    batch = tl.program_id(0)
    i, k = tl.arange(0, P), tl.arange(0, P)[None, :]
    mask = (i[:, None] < T) & (k < T)
    m = tl.load(gram + (batch * T + i[:, None]) * T + k, mask=mask, other=0.0)
    w = tl.load(weights + batch * T + i, mask=i < T, other=0.0)
    # x - x is 0 for a number, NaN for infinity and NaN.
    tl.store(out + batch * T + i, w + tl.sum(tl.sum(m - m, axis=1), axis=0), mask=i < T)


def draw_orders(shape: torch.Size, device: torch.device, *, shared: bool, seed: int) -> Tensor:
    """Random orders, [..., T] -> [..., T, T] int64 on the device, from a seed below 2^31.

    In a captured CUDA graph the seed is frozen; there each replay adds its number.
    """
    count = shape[-1]
    captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if device not in _replays and not captured:
        _replays[device] = torch.zeros((), dtype=torch.int64, device=device)
    if device not in _replays:
        raise RuntimeError("run one step of surgery on this device before capturing a CUDA graph")
    replays = _replays[device]
    orders = torch.empty(*shape, count, dtype=torch.int64, device=device)
    batch = orders.numel() // count**2
    sizes = {"T": count, "P": triton.next_power_of_2(count)}
    # An argument, not a constant: a kernel of its own would be loaded while a graph is captured.
    where = (orders, seed, replays, int(captured))
    launch(random_orders, (batch, count), *where, SHARED=shared, **sizes)
    if captured:
        replays.add_(1)
    return orders


def project(gram: Tensor, orders: Tensor) -> Tensor:
    """PCGrad's coefficients, [..., T, T] float64 and orders -> [..., T]. Two launches."""
    gram, orders = gram.contiguous(), orders.contiguous()
    altered = torch.empty_like(gram)
    batch, sizes = _sizes(gram)
    launch(project_row, (batch, gram.shape[-1]), gram, orders, altered, **sizes)
    return _sum_rows(altered)


def vaccinate(
    gram: Tensor, orders: Tensor, target: Tensor, beta: float, most: float
) -> tuple[Tensor, Tensor]:
    """GradVac's coefficients [..., T] and new targets [..., T, T]. Two launches."""
    gram, orders, target = gram.contiguous(), orders.contiguous(), target.contiguous()
    altered, moved = torch.empty_like(gram), torch.empty_like(target)
    batch, sizes = _sizes(gram)
    grid, constants = (batch, gram.shape[-1]), {"BETA": beta, "MOST": most, **sizes}
    launch(vaccinate_row, grid, gram, orders, target, altered, moved, **constants)
    return _sum_rows(altered), moved


def ags(gram: Tensor, orders: Tensor, limit: float, noise: float) -> Tensor:
    """`project` and `rescale`: three launches."""
    return rescale(gram, project(gram, orders), limit, noise)


def rescale(gram: Tensor, weights: Tensor, limit: float, noise: float) -> Tensor:
    """w · sqrt(1ᵀM1 / wᵀMw), with a factor of at most `limit`. One launch."""
    most = None if math.isinf(limit) else limit
    return _one_by_one(rescale_one, gram, weights, LIMIT=most, NOISE=noise)


def guard(gram: Tensor, weights: Tensor) -> Tensor:
    """w, and NaN where M is not finite. One launch."""
    return _one_by_one(guard_one, gram, weights)


def _one_by_one(kernel: Any, gram: Tensor, weights: Tensor, **constants: Any) -> Tensor:
    gram, weights = gram.contiguous(), weights.contiguous()
    out = torch.empty_like(weights)
    batch, sizes = _sizes(gram)
    launch(kernel, (batch,), gram, weights, out, **constants, **sizes)
    return out


def _sum_rows(altered: Tensor) -> Tensor:
    out = altered.new_empty(altered.shape[:-1])
    batch, sizes = _sizes(altered)
    launch(sum_rows, (batch,), altered, out, **sizes)
    return out


def _sizes(gram: Tensor) -> tuple[int, dict[str, int]]:
    count = gram.shape[-1]
    return gram.numel() // count**2, {"T": count, "P": triton.next_power_of_2(count)}
