"""Aligned-MTL: the principal components of the gradients, all brought to one length."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from gradsurgery.kernels import tasks
from gradsurgery.methods._base import Method
from gradsurgery.methods._projection import divide_or_zero
from gradsurgery.methods._quadratic import scale
from gradsurgery.methods._spectral import basis_of, gram_factor, rank_tolerance

__all__ = ["AlignedMTL"]


_POINTS = 320
_TAIL = 28.0
_SQUARINGS = 32


@tasks.step("aligned_mtl")
def align(gram: Tensor, tolerance: float) -> Tensor:
    """σ_min M^(-1/2) 1/T on the range of M: [..., T, T] -> [..., T].

    With M = L Lᵀ and K = LᵀL it is σ_min L K^(-1/2) L⁺ 1/T. Where the longest gradients are chosen
    first, K has rows and columns from large to small, and Cholesky's method then is accurate in
    each of them: so norms may lie far apart.
    """
    cosines, norms = scale(gram)
    most = norms.amax(-1, keepdim=True)
    size = divide_or_zero(norms, most)
    basis = basis_of(cosines, tolerance, size)
    kept = basis.kept & (size.gather(-1, basis.order) > 0)
    pivots = torch.where(kept, size.gather(-1, basis.order), 1.0)[..., None, :]
    lower = basis.lower * pivots.mT
    spread = torch.where(kept[..., None, :], basis.spread * size[..., None] / pivots, 0.0)
    both = gram_factor(spread, kept)
    ones = torch.ones_like(size)[..., None]
    x = torch.cholesky_solve(spread.mT @ ones, both)
    x = torch.linalg.solve_triangular(lower, x, upper=False)
    log_least = -_log_largest(lower, both, kept) / 2
    x = _inverse_root(lower, both, x, log_least)
    return (spread @ (lower @ x))[..., 0] * log_least.exp() / gram.shape[-1]


def _log_largest(lower: Tensor, both: Tensor, kept: Tensor) -> Tensor:
    """log of the largest eigenvalue of K⁻¹: squared again and again it is all that is left."""
    eye = torch.diag_embed(kept.to(lower))
    root = torch.linalg.solve_triangular(both.mT, eye, upper=True)
    root = torch.linalg.solve_triangular(lower, root, upper=False)
    power, log = root @ root.mT, torch.zeros_like(lower[..., 0, 0])
    for k in range(_SQUARINGS):
        trace = power.diagonal(dim1=-2, dim2=-1).sum(-1)
        trace = torch.where(kept.any(-1), trace, 1.0)
        log = log + trace.log() / 2**k
        power = power / trace[..., None, None]
        power = power @ power
    return log[..., None]


def _inverse_root(lower: Tensor, both: Tensor, x: Tensor, log_least: Tensor) -> Tensor:
    """K^(-1/2) x = 2/π ∫ t (K + t²)⁻¹ x d(log t), by the trapezoidal rule, all t at once.

    Its error falls as exp(-π² / distance of the points), and with the ends as exp(-_TAIL).

    Source: Hale, Higham and Trefethen, SIAM J. Numer. Anal. 46 (2008), for the integral.
    """
    count = lower.shape[-1]
    root = both.mT @ lower
    start, end = log_least - _TAIL, math.log(count) / 2 + _TAIL
    shares = torch.linspace(0, 1, _POINTS, dtype=lower.dtype, device=lower.device)
    t = (start + shares * (end - start)).exp()
    shifts = torch.diag_embed(t.square()[..., None].expand(*t.shape, count))
    factor, _ = torch.linalg.cholesky_ex((root.mT @ root)[..., None, :, :] + shifts)
    # cholesky_solve would take a copy of x for every t.
    solved = torch.linalg.solve_triangular(factor, x[..., None, :, :], upper=False)
    solved = torch.linalg.solve_triangular(factor.mT, solved, upper=True)
    total: Tensor = (t[..., None, None] * solved).sum(-3)
    return total * ((end - start) / (_POINTS - 1) * 2 / math.pi)[..., None]


class AlignedMTL(Method):
    """With G = U Σ Vᵀ: the mean of Ĝ = σ_min U Vᵀ, gradients orthogonal and equally long.

    So w = V (σ_min / Σ) Vᵀ 1/T, with V the eigenvectors of M and Σ² its eigenvalues, σ_min² being
    the smallest that is not zero. Everything is as long as the weakest component: a common factor
    of the result, which the learning rate has to make up for, or `Rescaled(AlignedMTL())`.

    Norms may lie far apart. A gradient counts as dependent on longer ones where the squared sine of
    the angle to their span is below 4 T times M's relative accuracy.

    Source: Senushkin et al., arXiv 2305.19000, algorithm 1, with equal preferences.

    Example:
        >>> import torch
        >>> AlignedMTL().weights(torch.tensor([[1.0, 0.0], [0.0, 16.0]]))
        tensor([0.5000, 0.1250], dtype=torch.float64)
    """

    name: ClassVar[str] = "aligned_mtl"

    def solve(
        self,
        gram: Tensor,
        losses: Tensor | None,
        generator: torch.Generator | None,
        relative_error: float,
    ) -> Tensor:
        return tasks.run("aligned_mtl", gram, numbers=(rank_tolerance(gram, relative_error, 0.0),))
