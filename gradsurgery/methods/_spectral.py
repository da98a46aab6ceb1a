"""Which gradients depend on each other, by Cholesky's method with pivots, and what rests on it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gradsurgery.methods._quadratic import scale

__all__ = [
    "Basis",
    "basis_of",
    "equal_angles",
    "gram_factor",
    "pseudo_solve",
    "rank_tolerance",
    "sum_rounding",
]


def rank_tolerance(gram: Tensor, relative_error: float, least: float = 1e-10) -> float:
    """Squared sine of the angle to the span of others up to which a gradient counts as in it.

    Args:
        gram: [..., T, T].
        relative_error: of its entries.
        least: the rounding of what is smaller would make an error of 1e-6 in the result.
    """
    return max(4 * gram.shape[-1] * relative_error, least)


def sum_rounding(gram: Tensor, relative_error: float) -> float:
    """What rounding of M may be in a sum of T cosines, [..., T, T] -> a number."""
    return 4 * gram.shape[-1] * relative_error


class Basis(NamedTuple):
    """C = F Fᵀ up to the tolerance, F = W F_1, with F_1 the rows of F of r independent gradients.

    Every matrix is [..., T, T]: columns from r on are zero, and those of F_1 unit vectors.
    """

    factor: Tensor
    """F, rows in the order of the tasks."""

    lower: Tensor
    """F_1, lower triangular."""

    spread: Tensor
    """W: every gradient from the independent ones."""

    order: Tensor
    """[..., T]: which task the k-th independent gradient is; from r on, the dependent ones."""

    kept: Tensor
    """[..., T]: k < r."""

    least: Tensor
    """[..., 1]: the least squared sine of the angle between one of them and those before."""


def basis_of(cosines: Tensor, tolerance: float, size: Tensor | None = None) -> Basis:
    """Choose independent gradients one by one, in T steps.

    Args:
        cosines: C, [..., T, T] with ones on its diagonal.
        tolerance: see `rank_tolerance`.
        size: [..., T]. The next one is that with most left of size², not of 1, and no gradient
            is made of shorter ones.
    """
    count = cosines.shape[-1]
    left, free = torch.ones_like(cosines[..., 0]), torch.ones_like(cosines[..., 0]).bool()
    square = left if size is None else size.square()
    factor, chosen, pivots = torch.zeros_like(cosines), [], []
    for k in range(count):
        worth = torch.where(left > tolerance, left * square, -1.0)
        at = torch.where(free, worth, -2.0).argmax(-1, keepdim=True)
        pivot = left.gather(-1, at)
        row = at[..., None].expand(*at.shape, count)
        done = (factor @ factor.gather(-2, row).mT)[..., 0]
        column = (cosines.gather(-2, row)[..., 0, :] - done) / pivot.clamp(min=tolerance).sqrt()
        column = torch.where((pivot > tolerance) & free, column, 0.0)
        if size is not None:
            # What has nothing left stays out: its part along a far shorter gradient would be that
            # times a number without bound.
            column = torch.where(left > tolerance, column, 0.0)
        factor[..., k] = column
        left = left - column.square()
        free = free.scatter(-1, at, False)
        chosen.append(at)
        pivots.append(pivot)
    order, sines = torch.cat(chosen, -1), torch.cat(pivots, -1)
    kept = sines > tolerance
    least = torch.where(kept, sines, torch.inf).amin(-1, keepdim=True)
    rows = factor.gather(-2, order[..., None].expand_as(factor))
    eye = torch.eye(count, dtype=cosines.dtype, device=cosines.device)
    lower = torch.where(kept[..., None], rows.tril(), eye)
    spread = torch.linalg.solve_triangular(lower, factor, upper=False, left=False)
    return Basis(factor, lower, spread, order, kept, least)


def equal_angles(
    gram: Tensor, tolerance: float, noise: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """C⁺1 for the gradients that are not zero, and what goes with it.

    Args:
        gram: [..., T, T].
        tolerance: see `rank_tolerance`.
        noise: see `sum_rounding`.

    Returns:
        y = C⁺1, C y and n, each [..., T]; and up to which share of its terms a sum of y is
        rounding, [..., 1]: that of M, or what was counted as dependent, beside the least pivot.
        Where 1, projected on the range of C, is no longer than that, y is zero.
    """
    cosines, norms = scale(gram)
    there = (norms > 0).to(gram.dtype)
    basis = basis_of(cosines, tolerance)
    deficient = ~basis.kept.all(-1, keepdim=True)
    doubt = torch.where(deficient, tolerance, noise) / basis.least
    total = basis.spread.mT @ there[..., None]
    inner = torch.cholesky_solve(total, gram_factor(basis.spread, basis.kept))
    square = (total * inner).sum(-2)
    defined = ~deficient | (square > there.sum(-1, keepdim=True) * doubt.square())
    y = torch.where(defined, pseudo_solve(basis, there), 0.0)
    along = torch.where(deficient, (cosines @ y[..., None])[..., 0], there)
    return y, along, norms, doubt


def pseudo_solve(basis: Basis, right: Tensor) -> Tensor:
    """The least-squares solution of least norm: C⁺ right, [..., T]."""
    both = gram_factor(basis.spread, basis.kept)
    x = torch.cholesky_solve(basis.spread.mT @ right[..., None], both)
    x = torch.cholesky_solve(x, basis.lower)
    return (basis.spread @ torch.cholesky_solve(x, both))[..., 0]


def gram_factor(spread: Tensor, kept: Tensor) -> Tensor:
    """Cholesky's factor of WᵀW, which W's unit rows keep away from singular: [..., T, T]."""
    both = spread.mT @ spread + torch.diag_embed((~kept).to(spread))
    factor: Tensor = torch.linalg.cholesky_ex(both)[0]
    return factor
