"""Triton kernels for the projections between gram and combine, T <= 64: PCGrad, AGS, GradVac.

Rows of the coefficient matrix do not depend on each other, since every projection is onto an
original gradient. Importing this module needs Triton.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradsurgery.kernels.triton_linear import load_gram, product
from gradsurgery.kernels.triton_rows import launch

__all__ = ["STEPS", "draw_orders", "per_matrix"]

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
def _projected(gram, orders, T: tl.constexpr, P: tl.constexpr):
    """[P]: the coefficients of Σ_i ĝ_i, all i at once, each i in its own order of the others."""
    i = tl.arange(0, P)
    row, k = i[:, None], i[None, :]
    mine = tl.where((row == k) & (row < T), 1.0, 0.0).to(tl.float64)
    for step in range(T):
        j = i * 0 + step
        if T > 2:
            j = tl.load(orders + i * T + step, mask=i < T, other=0).to(tl.int32)
        column = tl.load(gram + j[:, None] * T + k, mask=(row < T) & (k < T), other=0.0)
        square = tl.load(gram + j * (T + 1), mask=i < T, other=0.0)
        dot = tl.sum(mine * column, axis=1)
        wanted = (dot < 0) & (j != i) & (square != 0)
        removed = tl.where(wanted, -dot / tl.where(wanted, square, 1.0), 0.0)
        mine += tl.where(k == j[:, None], removed[:, None], 0.0)
    return tl.sum(mine, axis=0)


@triton.jit
def _rescaled(m, w, LIMIT: tl.constexpr, NOISE: tl.constexpr, P: tl.constexpr):
    """w · sqrt(1ᵀM1 / wᵀMw), up to `limit`; w itself where only noise is left."""
    i, j = tl.arange(0, P)[:, None], tl.arange(0, P)[None, :]
    square = tl.sum(tl.where(i == j, m, 0.0), axis=1)
    before = tl.maximum(tl.sum(tl.sum(m, axis=1), axis=0), 0.0)
    after = tl.sum(w * product(m, w), axis=0)
    size = tl.sum(tl.abs(w) * tl.sqrt(tl.maximum(square, 0.0)), axis=0)
    usable = after > tl.full([], NOISE, tl.float64) * size * size
    factor = tl.sqrt(before / tl.where(usable, after, 1.0))
    # Of float64: a number of the host's, as it stands, would be one of float32.
    limit = tl.full([], LIMIT, tl.float64)
    return w * tl.where(usable, tl.where(factor > limit, limit, factor), 1.0)


@triton.jit
def project_all(
    gram, orders, out,
    LIMIT: tl.constexpr, NOISE: tl.constexpr, RESCALE: tl.constexpr,
    T: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """PCGrad's weights, or with RESCALE those of AGS; NaN where M is not finite."""
    batch, i = tl.program_id(0), tl.arange(0, P)
    m, finite = load_gram(gram, batch, T, P)
    w = _projected(gram + batch * T * T, orders + batch * T * T, T, P)
    if RESCALE:
        w = _rescaled(m, w, LIMIT, NOISE, P)
    tl.store(out + batch * T + i, tl.where(finite, w, float("nan")), mask=i < T)


@triton.jit
def vaccinate_row(
    gram, orders, target, altered,
    BETA: tl.constexpr, MOST: tl.constexpr, T: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """GradVac for row i: its altered gradient's coefficients; its target cosines move in place.

    Where M is not finite the coefficients are NaN, and the targets stay.
    """
    batch, i = tl.program_id(0), tl.program_id(1)
    k = tl.arange(0, P)
    start = gram + batch * T * T
    m, finite = load_gram(gram, batch, T, P)
    # Of float64: a number of the host's, as it stands, would be one of float32.
    most = tl.full([], MOST, tl.float64)
    at = (batch * T + i) * T
    wanted_all = tl.load(target + at + k, mask=k < T, other=0.0)
    before = wanted_all
    mine = tl.where(k == i, 1.0, 0.0).to(tl.float64)
    for step in range(T):
        j = tl.load(orders + at + step)
        column = tl.load(start + j * T + k, mask=k < T, other=0.0)
        norm = tl.sqrt(tl.load(start + j * T + j))
        length = tl.sqrt(tl.maximum(tl.sum(product(m, mine) * mine, axis=0), 0.0))
        defined = (j != i) & (length > 0) & (norm > 0)
        scale = tl.where(defined, length * norm, 1.0)
        cosine = tl.sum(mine * column, axis=0) / scale
        cosine = tl.minimum(tl.maximum(cosine, -1.0), 1.0)
        wanted = tl.sum(tl.where(k == j, wanted_all, 0.0), axis=0)
        limited = tl.where(wanted > most, most, tl.where(wanted < -most, -most, wanted))
        sine = tl.sqrt(1 - limited * limited)
        pull = limited * tl.sqrt(1 - cosine * cosine) - cosine * sine
        added = length * pull / tl.where(defined, norm * sine, 1.0)
        added = tl.where(defined, tl.where(cosine < wanted, added, 0.0), 0.0)
        change = tl.where(defined, BETA * (cosine - wanted), 0.0)
        mine += tl.where(k == j, added, 0.0)
        wanted_all += tl.where(k == j, change, 0.0)
    tl.store(altered + at + k, tl.where(finite, mine, float("nan")), mask=k < T)
    tl.store(target + at + k, tl.where(finite, wanted_all, before), mask=k < T)


@triton.jit
def sum_rows(altered, out, T: tl.constexpr, P: tl.constexpr):
    """out[batch] = column sums: the coefficients of Σ_i ĝ_i."""
    batch, column = tl.program_id(0), tl.arange(0, P)
    rows, _ = load_gram(altered, batch, T, P)
    tl.store(out + batch * T + column, tl.sum(rows, axis=0), mask=column < T)


@triton.jit
def rescale_one(
    gram, weights, out, LIMIT: tl.constexpr, NOISE: tl.constexpr, T: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """`_rescaled` of given weights; NaN where M is not finite."""
    batch, i = tl.program_id(0), tl.arange(0, P)
    m, finite = load_gram(gram, batch, T, P)
    w = tl.load(weights + batch * T + i, mask=i < T, other=0.0)
    w = tl.where(finite, _rescaled(m, w, LIMIT, NOISE, P), float("nan"))
    tl.store(out + batch * T + i, w, mask=i < T)


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
    """PCGrad's coefficients, [..., T, T] float64 and orders -> [..., T]. One launch."""
    return _project(gram, orders, math.inf, 0.0, rescaled=False)


def ags(gram: Tensor, orders: Tensor, limit: float, noise: float) -> Tensor:
    """`project` and `rescale` in one launch."""
    return _project(gram, orders, limit, noise, rescaled=True)


def _project(gram: Tensor, orders: Tensor, limit: float, noise: float, *, rescaled: bool) -> Tensor:
    # Two tasks meet each other in one order only, which the kernel does not read.
    orders = orders if gram.shape[-1] <= 2 else orders.contiguous()
    return per_matrix(project_all, gram, orders, LIMIT=limit, NOISE=noise, RESCALE=rescaled)


def vaccinate(gram: Tensor, orders: Tensor, target: Tensor, beta: float, most: float) -> Tensor:
    """GradVac's coefficients [..., T]; `target`, [..., T, T], moves in place. Two launches."""
    gram, orders = gram.contiguous(), orders.contiguous()
    moved, altered = target.contiguous(), torch.empty_like(gram)
    count = gram.shape[-1]
    grid, constants = (gram.numel() // count**2, count), {"BETA": beta, "MOST": most}
    launch(vaccinate_row, grid, gram, orders, moved, altered, **constants, **_sizes(count))
    if moved is not target:
        target.copy_(moved)
    return per_matrix(sum_rows, altered)


def rescale(gram: Tensor, weights: Tensor, limit: float, noise: float) -> Tensor:
    """w · sqrt(1ᵀM1 / wᵀMw), with a factor of at most `limit`. One launch."""
    return per_matrix(rescale_one, gram, weights.contiguous(), LIMIT=limit, NOISE=noise)


def per_matrix(kernel: Any, gram: Tensor, *tensors: Tensor, **constants: Any) -> Tensor:
    """Launch a kernel (gram, *tensors, out), one program a matrix: [..., T, T] -> [..., T].

    Hyperparameters are constants of the kernel: as arguments they would arrive as float32.
    """
    gram = gram.contiguous()
    count = gram.shape[-1]
    out = gram.new_empty(gram.shape[:-1])
    batch = out.numel() // count
    if batch:
        launch(kernel, (batch,), gram, *tensors, out, **constants, **_sizes(count))
    return out


def _sizes(count: int) -> dict[str, int]:
    padded = triton.next_power_of_2(count)
    return {"T": count, "P": padded, "num_warps": max(min(padded * padded // 256, 8), 1)}


STEPS = {"ags": ags, "project": project, "rescale": rescale, "vaccinate": vaccinate}
"""The steps of `tasks` that have a Triton version."""
