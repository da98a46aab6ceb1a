"""IMTL-G, ConFIG, GradOPS and Aligned-MTL in one Triton launch each, T <= 64: `csrc/spectral.c`.

Cholesky's method with pivots becomes sweeps with pivots (see `triton_linear.inverse`): for chosen
gradients R and the others N they leave -A⁻¹, W and what is left of N in one matrix, with A = C_RR
and W = C_NR A⁻¹. Importing this module needs Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gradsurgery.kernels.triton_linear import at, load_gram, product, scaled
from gradsurgery.kernels.triton_tasks import per_matrix

__all__ = ["STEPS"]


@triton.jit
def _swept(matrix, k, P: tl.constexpr):
    """The matrix after a sweep at k; row k as it was, and the pivot."""
    i = tl.arange(0, P)
    row, column = i[:, None], i[None, :]
    down = tl.sum(tl.where(column == k, matrix, 0.0), axis=1)
    across = tl.sum(tl.where(row == k, matrix, 0.0), axis=0)
    pivot = at(across, k, P)
    share = across / pivot
    rest = matrix - down[:, None] * share[None, :]
    rest = tl.where(row == k, share[None, :], rest)
    rest = tl.where(column == k, (down / pivot)[:, None], rest)
    return tl.where((row == k) & (column == k), -1 / pivot, rest), across, pivot


@triton.jit
def _choose(
    c, weight, there,
    TOLERANCE: tl.constexpr, FACTOR: tl.constexpr, T: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Take one gradient after the other, that with most left of weight_i.

    Returns C swept over the chosen; which are; the least pivot; with FACTOR, F's columns as rows.
    """
    i = tl.arange(0, P)
    row, column = i[:, None], i[None, :]
    tolerance = tl.full([], TOLERANCE, tl.float64)
    swept, factor = c, c * 0
    free = there
    least = tolerance * 0 + float("inf")
    k, going = 0, tolerance >= 0
    while going:
        left = tl.sum(tl.where(row == column, swept, 0.0), axis=1)
        worth = tl.where(free & (left > tolerance), left * weight, 0.0)
        going = tl.max(worth, axis=0) > 0
        if going:
            best = tl.argmax(worth, axis=0)
            swept, across, pivot = _swept(swept, best, P)
            if FACTOR:
                across = tl.where(free, across, 0.0) / tl.sqrt(pivot)
                factor = tl.where(row == k, across[None, :], factor)
            free = free & (i != best)
            least = tl.minimum(least, pivot)
            k += 1
            going = k < T
    return swept, there & (free == 0), least, factor


@triton.jit
def _equal_angles(
    gram, batch, TOLERANCE: tl.constexpr, NOISE: tl.constexpr, T: tl.constexpr, P: tl.constexpr
):
    """y = C⁺1, C y, n, up to which share of its terms a sum of y is rounding; is M finite."""
    i = tl.arange(0, P)
    row, column = i[:, None], i[None, :]
    m, finite = load_gram(gram, batch, T, P)
    # What is not finite is solved as if there were no gradient.
    m = tl.where(finite, m, 0.0)
    c, norms = scaled(m, P)
    there = norms > 0
    ones = tl.where(there, 1.0, 0.0).to(tl.float64)
    swept, chosen, least, _ = _choose(c, ones, there, TOLERANCE, False, T, P)
    count, rank = tl.sum(ones, axis=0), tl.sum(tl.where(chosen, ones, 0.0), axis=0)
    kept = chosen[:, None] & chosen[None, :]
    back = tl.where(kept, -swept, 0.0)
    doubt = tl.full([], NOISE, tl.float64) / least
    y = product(back, ones)
    # Refined by one step with C itself.
    y += product(back, ones - product(c, y))
    along = ones
    if rank < count:
        doubt = tl.full([], TOLERANCE, tl.float64) / least
        # (WᵀW)⁻¹, with a row of ones for each chosen gradient in W, is a block of the inverse of
        # [[1, Wᵀ], [W, -1]], whose pivots are at least 1 or at most -1 in any order.
        crossing = there[:, None] & there[None, :] & (chosen[:, None] != chosen[None, :])
        spread = tl.where(crossing, swept, 0.0)
        sign = tl.where(chosen[:, None], 1.0, -1.0).to(tl.float64)
        both = spread + tl.where(row == column, sign, 0.0)
        for k in range(T):
            both = _swept(both, k, P)[0]
        both = tl.where(kept, -both, 0.0)
        taken = tl.where(chosen, ones, 0.0)
        # Wᵀ1, and the square of 1 projected on the range of C.
        total = taken + tl.where(chosen, product(spread, ones - taken), 0.0)
        inner = product(both, total)
        square = tl.sum(total * inner, axis=0)
        inner = product(both, product(back, inner))
        y = inner + tl.where(chosen, 0.0, product(spread, inner))
        y = tl.where(square > count * doubt * doubt, y, 0.0)
        along = product(c, y)
    return y, along, norms, doubt, finite


@triton.jit
def imtl_g_one(
    gram, out, TOLERANCE: tl.constexpr, NOISE: tl.constexpr, T: tl.constexpr, P: tl.constexpr
):
    """Equal projections on every unit gradient, weights that sum to 1."""
    batch, i = tl.program_id(0), tl.arange(0, P)
    y, _, norms, doubt, finite = _equal_angles(gram, batch, TOLERANCE, NOISE, T, P)
    w = tl.where(norms > 0, y / tl.where(norms > 0, norms, 1.0), 0.0)
    total, size = tl.sum(w, axis=0), tl.sum(tl.abs(w), axis=0)
    sure = tl.abs(total) > doubt * size
    w = tl.where(sure, w / tl.where(sure, total, 1.0), 0.0)
    tl.store(out + batch * T + i, tl.where(finite, w, float("nan")), mask=i < T)


@triton.jit
def config_one(
    gram, out, TOLERANCE: tl.constexpr, NOISE: tl.constexpr, T: tl.constexpr, P: tl.constexpr
):
    """Equal cosines with every gradient, as long as the projections on it together."""
    batch, i = tl.program_id(0), tl.arange(0, P)
    y, along, norms, _, finite = _equal_angles(gram, batch, TOLERANCE, NOISE, T, P)
    square = tl.sum(y * along, axis=0)
    sure = square > tl.full([], NOISE, tl.float64) * tl.sum(y * y, axis=0)
    length = tl.sum(norms * along, axis=0)
    y = tl.where(sure, length / tl.where(sure, square, 1.0), 0.0) * y
    w = tl.where(norms > 0, y / tl.where(norms > 0, norms, 1.0), 0.0)
    tl.store(out + batch * T + i, tl.where(finite, w, float("nan")), mask=i < T)


@triton.jit
def gradops_one(
    gram, out, TOLERANCE: tl.constexpr, NOISE: tl.constexpr, T: tl.constexpr, P: tl.constexpr
):
    """Σ_i g_i, each that conflicts with any other without its part in the span of all others."""
    batch, i = tl.program_id(0), tl.arange(0, P)
    row, column = i[:, None], i[None, :]
    m, finite = load_gram(gram, batch, T, P)
    m = tl.where(finite, m, 0.0)
    c, norms = scaled(m, P)
    there, noise = norms > 0, tl.full([], NOISE, tl.float64)
    conflicts = tl.min(c, axis=1) < -noise
    sums = tl.where(conflicts, 0.0, norms)
    if tl.max(conflicts.to(tl.int32), axis=0) > 0:
        ones = tl.where(there, 1.0, 0.0).to(tl.float64)
        swept, chosen, _, _ = _choose(c, ones, there, TOLERANCE, False, T, P)
        # One that a dependent gradient is made of lies in the span of the others itself.
        crossing = chosen[:, None] & (there & (chosen == 0))[None, :]
        most = tl.max(tl.where(crossing, tl.abs(swept), 0.0), axis=1)
        apart = conflicts & chosen & (most <= tl.sqrt(noise))
        back = tl.where(chosen[:, None] & chosen[None, :], -swept, 0.0)
        own = tl.sum(tl.where(row == column, back, 0.0), axis=1)
        # What is left of each is a row of A⁻¹ over its diagonal.
        sums += product(back, tl.where(apart, norms / tl.where(apart, own, 1.0), 0.0))
    w = tl.where(there, sums / tl.where(there, norms, 1.0), 1.0)
    tl.store(out + batch * T + i, tl.where(finite, w, float("nan")), mask=i < T)


@triton.jit
def aligned_mtl_one(gram, out, TOLERANCE: tl.constexpr, T: tl.constexpr, P: tl.constexpr):
    """σ_min M^(-1/2) 1/T: columns of M's factor, made orthogonal, are u_k σ_k."""
    batch, i = tl.program_id(0), tl.arange(0, P)
    row, column = i[:, None], i[None, :]
    m, finite = load_gram(gram, batch, T, P)
    m = tl.where(finite, m, 0.0)
    c, norms = scaled(m, P)
    longest = tl.max(norms, axis=0)
    size = tl.where(longest > 0, norms / tl.where(longest > 0, longest, 1.0), 0.0)
    _, _, _, lines = _choose(c, size * size, norms > 0, TOLERANCE, True, T, P)
    lines = lines * size[None, :]
    # One-sided Jacobi: rows k and k ^ step turn together, for all steps, so each meets each.
    sweep, going = 0, longest > 0
    while going:
        worst = longest * 0
        for step in range(1, P):
            partner = i ^ step
            others = tl.gather(lines, (row ^ step) + column * 0, 0)
            square = tl.sum(lines * lines, axis=1)
            their = tl.gather(square, partner, 0)
            between = tl.sum(lines * others, axis=1)
            # Beside the terms of the sum, whose rounding stays; or beside the shorter row's square,
            # as the longer row's task hears of the shorter one by it alone.
            beside = tl.sum(tl.abs(lines * others), axis=1)
            beside = tl.maximum(beside, tl.minimum(square, their))
            turns = tl.abs(between) > 1e-15 * beside
            twice = tl.where(turns, 2 * between, 1.0)
            slope = (their - square) / twice
            first = (slope > 0) | ((slope == 0) & (i < partner))
            t = tl.where(first, 1.0, -1.0) / (tl.abs(slope) + tl.sqrt(slope * slope + 1))
            t = tl.where(turns, t, 0.0)
            cosine = 1 / tl.sqrt(t * t + 1)
            lines = cosine[:, None] * lines - (t * cosine)[:, None] * others
            ratio = tl.where(turns, tl.abs(between) / tl.where(turns, beside, 1.0), 0.0)
            worst = tl.maximum(worst, tl.max(ratio, axis=0))
        sweep += 1
        # Quadratic from here: this sweep has squared what was left.
        going = (worst > 1e-8) & (sweep < 40)
    square = tl.sum(lines * lines, axis=1)
    least = tl.min(tl.where(square > 0, square, float("inf")), axis=0)
    square = tl.where(square > 0, square, float("inf"))
    share = tl.sqrt(least / square) * tl.sum(lines, axis=1) / square
    share = tl.where(square < float("inf"), share, 0.0)
    w = tl.sum(share[:, None] * lines, axis=0) / T
    tl.store(out + batch * T + i, tl.where(finite, w, float("nan")), mask=i < T)


def imtl_g(gram: Tensor, tolerance: float, noise: float) -> Tensor:
    """C⁺1 / n, divided by its sum: [..., T, T] -> [..., T]. One launch."""
    return per_matrix(imtl_g_one, gram, TOLERANCE=tolerance, NOISE=noise)


def config(gram: Tensor, tolerance: float, noise: float) -> Tensor:
    """C⁺1 / n, as long as the projections together: [..., T, T] -> [..., T]. One launch."""
    return per_matrix(config_one, gram, TOLERANCE=tolerance, NOISE=noise)


def gradops(gram: Tensor, tolerance: float, noise: float) -> Tensor:
    """Coefficients of Σ_i g_i': [..., T, T] -> [..., T]. One launch."""
    return per_matrix(gradops_one, gram, TOLERANCE=tolerance, NOISE=noise)


def aligned_mtl(gram: Tensor, tolerance: float) -> Tensor:
    """σ_min M^(-1/2) 1/T on the range of M: [..., T, T] -> [..., T]. One launch."""
    return per_matrix(aligned_mtl_one, gram, TOLERANCE=tolerance)


STEPS = {"aligned_mtl": aligned_mtl, "config": config, "gradops": gradops, "imtl_g": imtl_g}
"""The steps of `tasks` that are here."""
