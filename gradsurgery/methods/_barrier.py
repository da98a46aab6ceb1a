"""M w = w^(-p), w > 0, by Newton's method: batched, in a fixed number of torch ops."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradsurgery.kernels import tasks
from gradsurgery.methods._projection import divide_or_zero
from gradsurgery.methods._quadratic import scale

__all__ = ["balance", "ridge_of"]

_STEPS = 60
_MOST_MOVES = 300


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
    y = _follow(c, torch.zeros_like(y), 1.0, y, _STEPS)
    # From there to α = 1/p, step by step: the norms come in. With 1e24 between them y may change by
    # 1e24 for each 1 of α.
    moves = min(math.ceil(56 * abs(1 / p - 1)), _MOST_MOVES)
    for move in range(1, moves + 1):
        now = 1 / (1 + (1 / p - 1) * move / moves)
        steps = _STEPS if move == moves else 3 if p < 1 else 6
        y = _follow(c, (now - 1) * logs, now, y, steps)
    # The geometric mean was taken out of k; y grows by its (1 + p)th root.
    return divide_or_zero(y * ((p - 1) * geometric / (1 + p)).exp(), norms)


def _follow(c: Tensor, log_k: Tensor, p: float, y: Tensor, steps: int) -> Tensor:
    """Newton from y. Steps are kept so short that the Hessian stays about what it is.

    For log(C y) = log(k y^(-p)) where C y > 0, as a large p makes the other form steep.
    """
    for _ in range(steps):
        pull = (c @ y[..., None])[..., 0]
        log_push = log_k - p * y.log()
        push = log_push.exp()
        mild = push < 10 * pull
        gap = torch.where(mild, pull * (log_push - pull.clamp(min=1e-300).log()), push - pull)
        slope = p * torch.where(mild, pull, push) / y
        factor, _ = torch.linalg.cholesky_ex(c + torch.diag_embed(slope))
        step = torch.cholesky_solve(gap[..., None], factor)[..., 0]
        most = (step.abs() / y).amax(-1, keepdim=True)
        y = y + step * (0.7 / most).clamp(max=1)
    return y
