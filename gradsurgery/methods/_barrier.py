"""M w = w^(-p), w > 0, by Newton's method: batched, in a fixed number of torch ops."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradsurgery.kernels import tasks
from gradsurgery.methods._projection import divide_or_zero
from gradsurgery.methods._quadratic import scale

__all__ = ["LEAST_ALPHA", "MOST_ALPHA", "balance", "ridge_of"]

# Within these the equation is solved to 1e-6 of its terms on every family of the tests, T <= 64.
# Norms 1e24 apart are the hardest: α = 15 leaves errors of 0.1 to 1 there, and 0.001 may overflow.
LEAST_ALPHA, MOST_ALPHA = 0.01, 10.0
# Of C y beside the terms of its sum: a few units in the last place.
_ROUNDING = 4e-15


def ridge_of(relative_error: float) -> float:
    """What is added to the diagonal of the scaled matrix, where its solution may be at infinity."""
    return max(1e-12, 4 * relative_error)


@tasks.step("balance")
def balance(gram: Tensor, p: float, ridge: float) -> Tensor:
    """C y = k y^(-p) in scaled variables y = n∘w, k_i = n_i^(p - 1): [..., T, T] -> [..., T].

    It is the minimum of a convex function whose Hessian is C + diag(p k y^(-p-1)).
    """
    cosines, norms = scale(gram)
    there = norms > 0
    count = there.sum(-1, keepdim=True).clamp(min=1)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    c = cosines + ridge * eye
    logs = torch.where(there, norms.clamp(min=1e-300).log(), 0.0)
    geometric = logs.sum(-1, keepdim=True) / count
    logs = torch.where(there, logs - geometric, 0.0)
    # Nash's bargain, p = 1, depends on no norm; the best multiple of ones, to begin with.
    square = c.sum((-1, -2))[..., None].clamp(min=ridge)
    y = (gram.shape[-1] / square).sqrt().expand(logs.shape)
    # From there to α = 1/p, move by move: the norms come in.
    alpha, now, move = 1 / p, torch.ones_like(geometric), torch.zeros_like(geometric)
    spread = logs.abs().amax(-1, keepdim=True)
    moves = (spread * abs(alpha - 1) / 2 + 2 * math.log(max(p, 1))).floor() + (p != 1)
    for _ in range(_steps_to(alpha)):
        y, arrived = _improve(c, (now - 1) * logs, now, y)
        move = torch.where(arrived & (move < moves), move + 1, move)
        share = move / moves.clamp(min=1)
        now = 1 / (alpha**share if alpha < 1 else 1 + (alpha - 1) * share)
    # The geometric mean was taken out of k; y grows by its (1 + p)th root.
    return divide_or_zero(y * ((p - 1) * geometric / (1 + p)).exp(), norms)


def _steps_to(alpha: float) -> int:
    """Half as many again as the hardest of the tests takes, norms 1e24 apart at T = 64."""
    if alpha < 1:
        return 100 - round(320 * math.log(alpha))
    return 100 + round(90 * (alpha - 1) + 18 * (alpha - 1) ** 2)


def _improve(c: Tensor, log_k: Tensor, p: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """One step of Newton's, and whether the next move may come: [..., T], [..., 1].

    For log(C y) = log(k y^(-p)) where C y > 0, as a large p makes the other form steep. The step is
    kept so short that the Hessian stays about what it is.
    """
    pull = (c @ y[..., None])[..., 0]
    log_push = log_k - p * y.log()
    push = log_push.exp()
    terms = (c.abs() @ y[..., None])[..., 0]
    exact = ((pull - push).abs() <= _ROUNDING * terms).all(-1, keepdim=True)
    mild = push < 10 * pull
    gap = torch.where(mild, pull * (log_push - pull.clamp(min=1e-300).log()), push - pull)
    slope = p * torch.where(mild, pull, push) / y
    factor, _ = torch.linalg.cholesky_ex(c + torch.diag_embed(slope))
    step = torch.cholesky_solve(gap[..., None], factor)[..., 0]
    most = (step.abs() / y).amax(-1, keepdim=True)
    stepped = y + step * (0.7 / most).clamp(max=1)
    return torch.where(exact, y, stepped), exact | (most * p.clamp(min=1) < 0.3)
