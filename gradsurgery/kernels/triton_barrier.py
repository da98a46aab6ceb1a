"""Nash-MTL's and FairGrad's step "balance" in one Triton launch, T <= 64, as `csrc/barrier.c`.

Importing this module needs Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gradsurgery.kernels.triton_linear import inverse, load_gram, product, scaled
from gradsurgery.kernels.triton_tasks import per_matrix

__all__ = ["STEPS"]


@triton.jit
def balance_one(
    gram, out, EXPONENT: tl.constexpr, RIDGE: tl.constexpr, T: tl.constexpr, P: tl.constexpr
):
    """C y = k y^(-p) by Newton's method, over moves from p = 1, where norms do not matter.

    What C may have: at most 4000 steps, of them 200 for a move, and a move ends early where C y is
    good to its rounding.
    """
    batch, i = tl.program_id(0), tl.arange(0, P)
    diagonal = i[:, None] == i[None, :]
    m, finite = load_gram(gram, batch, T, P)
    # What is not finite is solved as if there were no gradient.
    c, norms = scaled(tl.where(finite, m, 0.0), P)
    there = norms > 0
    p, ridge = tl.full([], EXPONENT, tl.float64), tl.full([], RIDGE, tl.float64)
    alpha = 1 / p
    c = tl.where(diagonal, 1 + ridge, c)
    count = tl.sum(there.to(tl.float64), axis=0)
    logs = tl.where(there, tl.log(tl.where(there, norms, 1.0)), 0.0)
    geometric = tl.sum(logs, axis=0) / tl.maximum(count, 1.0)
    logs = tl.where(there, logs - geometric, 0.0)
    spread = tl.max(tl.abs(logs), axis=0)
    moves = 1 + tl.floor(spread * tl.abs(alpha - 1) / 2 + 2 * tl.log(tl.maximum(p, 1.0)))
    if EXPONENT == 1:
        moves = p * 0
    total = tl.sum(tl.where(there, product(c, there.to(tl.float64)), 0.0), axis=0)
    y = tl.where(there, tl.sqrt(count / tl.maximum(total, ridge * tl.maximum(count, 1.0))), 1.0)
    now, move, log_k = p * 0 + 1, p * 0, logs * 0
    turn, since = 0, 0
    going = count > 0
    while going:
        pull, terms = product(c, y), product(tl.abs(c), y)
        log_push = log_k - now * tl.log(y)
        push = tl.exp(log_push)
        # A few units in the last place of C y beside the terms of its sum.
        missing = tl.where(there, tl.abs(pull - push) - 4e-15 * terms, 0.0)
        arrived = tl.max(missing, axis=0) <= 0
        if arrived == 0:
            # For log(C y) = log(k y^(-p)) where C y > 0: a large p makes the other form steep.
            mild = push < 10 * pull
            gap = tl.where(mild, pull * (log_push - tl.log(tl.where(mild, pull, 1.0))), push - pull)
            slope = tl.where(there, now * tl.where(mild, pull, push) / y, 0.0)
            hessian = c + tl.where(diagonal, slope[:, None], 0.0)
            # Pivots are at least the ridge, 1e-12 or more, but for rounding.
            step = product(inverse(hessian, 1e-14, T, P), tl.where(there, gap, 0.0))
            most = tl.max(tl.where(there, tl.abs(step) / y, 0.0), axis=0)
            # So short that the Hessian stays about what it is.
            y += step * tl.where(most > 0.7, 0.7 / most, 1.0)
            since += 1
            # Quadratic from here: the last step has squared the error.
            near = tl.where(move < moves, 0.3, 1e-7)
            arrived = (most * tl.maximum(now, 1.0) < near) | (since >= 200)
        turn += 1
        if arrived:
            going = move < moves
            move += 1
            share = move / tl.maximum(moves, 1.0)
            at = tl.where(alpha < 1, tl.exp(share * tl.log(alpha)), 1 + (alpha - 1) * share)
            now = tl.where(going, 1 / at, now)
            log_k = (now - 1) * logs
            since = 0
        going = going & (turn < 4000)
    # The geometric mean was taken out of k; y grows by its (1 + p)th root.
    unit = tl.exp((p - 1) * geometric / (1 + p))
    weights = tl.where(there, unit * y / tl.where(there, norms, 1.0), 0.0)
    tl.store(out + batch * T + i, tl.where(finite, weights, float("nan")), mask=i < T)


def balance(gram: Tensor, p: float, ridge: float) -> Tensor:
    """M w = w^(-p), [..., T, T] -> [..., T]. One launch."""
    return per_matrix(balance_one, gram, EXPONENT=p, RIDGE=ridge)


STEPS = {"balance": balance}
"""The steps of `tasks` that are here."""
