"""M w = w^(-p), w > 0, by Newton's method: batched, in a fixed number of torch ops."""

from __future__ import annotations

import torch
from torch import Tensor

from gradsurgery.kernels import tasks
from gradsurgery.methods._quadratic import scale, unscale

__all__ = ["balance", "ridge_of"]

_STEPS = 60
_MOVES = 60


def ridge_of(resolution: float) -> float:
    """What is added to the diagonal of the scaled matrix, where its solution may be at infinity."""
    return max(1e-12, 4 * resolution)


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
    y = _follow(c, torch.ones_like(y), 1.0, y, _STEPS)
    # From there to p, step by step: the norms come in.
    for move in range(1, _MOVES + 1) if p != 1 else ():
        now = 1 + (p - 1) * move / _MOVES
        y = _follow(c, ((now - 1) * logs).exp(), now, y, _STEPS if move == _MOVES else 3)
    # The geometric mean was taken out of k; y grows by its (1 + p)th root.
    y = y * ((p - 1) * geometric / (1 + p)).exp()
    return unscale(y, norms)


def _follow(c: Tensor, k: Tensor, p: float, y: Tensor, steps: int) -> Tensor:
    """Newton from y. Steps are kept so short that the Hessian stays about what it is."""
    for _ in range(steps):
        push = k * y**-p
        gap = push - (c @ y[..., None])[..., 0]
        factor, _ = torch.linalg.cholesky_ex(c + torch.diag_embed(p * push / y))
        step = torch.cholesky_solve(gap[..., None], factor)[..., 0]
        most = (step.abs() / y).amax(-1, keepdim=True)
        y = y + step * (0.7 / most).clamp(max=1)
    return y
