"""Nonnegative quadratic programs on the Gram matrix, batched, in a fixed number of torch ops."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["best_worst", "idle", "scale", "solve_program", "unscale"]

_STEPS = 40
# Added to the diagonal: what Cholesky needs where a passive set is nearly dependent. It changes a
# condition by this times z, which is far below the accuracy that is promised.
_RIDGE = 1e-13
_POINTS = 24
_ROUNDS = 8


def scale(gram: Tensor) -> tuple[Tensor, Tensor]:
    """C_ij = M_ij / (n_i n_j) and n, so that norms however far apart are no matter.

    Args:
        gram: [..., T, T] float64.

    Returns:
        [..., T, T] with ones on the diagonal, and zeros beside it for a task without gradient;
        [..., T], norms, 0 for such a task.
    """
    norms = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    divisors = torch.where(norms > 0, norms, torch.inf)
    cosines = (gram / divisors[..., None] / divisors[..., None, :]).clamp(-1, 1)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.where(eye.bool(), 1.0, cosines), norms


def unscale(values: Tensor, norms: Tensor) -> Tensor:
    """y / n, and 0 for a task without gradient."""
    return torch.where(norms > 0, values / torch.where(norms > 0, norms, 1.0), 0.0)


def solve_program(a: Tensor, q: Tensor) -> Tensor:
    """min ½ zᵀAz + qᵀz over z >= 0, by a primal-dual interior point method.

    Args:
        a: [..., T, T], positive semidefinite.
        q: [..., T], in its range.

    Returns:
        z, [..., T].

    Source: Mehrotra's predictor and corrector, as in Nocedal and Wright, "Numerical Optimization",
    algorithm 16.4.
    """
    size = q.abs().amax(-1, keepdim=True)
    size = torch.where(size > 0, size, 1.0)
    q = q / size
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    z, dual = torch.ones_like(q), torch.ones_like(q)
    for _ in range(_STEPS):
        ratio = dual / z
        factor, _ = torch.linalg.cholesky_ex(a + torch.diag_embed(ratio) + _RIDGE * eye)
        gap = dual - q - (a @ z[..., None])[..., 0]
        mean = (z * dual).mean(-1, keepdim=True)
        step_z, step_dual = _newton(factor, gap, -z * dual, z, ratio)
        share = _share(z, step_z, dual, step_dual)
        predicted = ((z + share * step_z) * (dual + share * step_dual)).mean(-1, keepdim=True)
        centre = (predicted / mean).clamp(0, 1) ** 3
        target = centre * mean - z * dual - step_z * step_dual
        step_z, step_dual = _newton(factor, gap, target, z, ratio)
        share = (1 - 1e-3) * _share(z, step_z, dual, step_dual)
        moved_z, moved_dual = z + share * step_z, dual + share * step_dual
        # Where it has come to an end, rounding may spoil the next step.
        good = (moved_z > 0) & (moved_dual > 0) & (mean > 1e-26)
        good = good.all(-1, keepdim=True)
        z, dual = torch.where(good, moved_z, z), torch.where(good, moved_dual, dual)
    # The smaller of a pair is what is left of its zero.
    return torch.where(z > dual, z, 0.0) * size


def _newton(
    factor: Tensor, gap: Tensor, target: Tensor, z: Tensor, ratio: Tensor
) -> tuple[Tensor, Tensor]:
    right = (gap + target / z)[..., None]
    step = torch.cholesky_solve(right, factor)[..., 0]
    return step, target / z - ratio * step


def _share(z: Tensor, step_z: Tensor, dual: Tensor, step_dual: Tensor) -> Tensor:
    """How much of a step leaves both positive, at most 1: [..., 1]."""
    both, steps = torch.cat([z, dual], -1), torch.cat([step_z, step_dual], -1)
    limits = torch.where(steps < 0, -both / torch.where(steps < 0, steps, -1.0), torch.inf)
    return limits.amin(-1, keepdim=True).clamp(max=1)


def idle(b: Tensor, there: Tensor, one: Tensor, radius: Tensor) -> Tensor:
    """b for `best_worst`, so large where a task is not there that it asks for nothing."""
    level = torch.where(there, b / one, -torch.inf).amax(-1, keepdim=True)
    level = torch.where(level.isinf(), 0.0, level)
    return torch.where(there, b, 4 * (level.abs() + 2 * radius[..., None] + 1) * one)


def best_worst(a: Tensor, b: Tensor, one: Tensor, radius: Tensor) -> Tensor:
    """z >= 0 of u = Σ z_i a_i, ‖u‖ <= radius, with the largest min_i (b_i + a_i·u) / one_i.

    For a level s, z(s) solves the program with q = b - s 1, and ‖u(s)‖ rises with s: the level at
    which it is the radius lies between those at which nothing is asked for and too much. A round
    looks at some levels in between at once.

    Args:
        a: [..., T, T], products of the a_i.
        b: [..., T].
        one: [..., T], positive: the scale of each condition.
        radius: [...].
    """
    low = (b / one).amin(-1)
    sizes = a.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    high = ((b + radius[..., None] * sizes) / one).amin(-1)
    shares = torch.linspace(0, 1, _POINTS, dtype=a.dtype, device=a.device)
    best = torch.zeros_like(b)
    for _ in range(_ROUNDS):
        levels = low[..., None] + shares * (high - low)[..., None]
        q = b[..., None, :] - levels[..., None] * one[..., None, :]
        z = solve_program(a[..., None, :, :], q)
        lengths = (z * (a[..., None, :, :] @ z[..., None])[..., 0]).sum(-1).clamp(min=0).sqrt()
        inside = lengths <= radius[..., None]
        # The last level inside; the first is always, as it asks for nothing.
        last = (inside.cumprod(-1).sum(-1) - 1).clamp(min=0)
        best = z.gather(-2, last[..., None, None].expand(*last.shape, 1, z.shape[-1]))[..., 0, :]
        following = (last + 1).clamp(max=_POINTS - 1)
        low = levels.gather(-1, last[..., None])[..., 0]
        high = levels.gather(-1, following[..., None])[..., 0]
    return best
