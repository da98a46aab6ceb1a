"""Which gradients depend on each other, by Cholesky's method with pivots, and what rests on it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Basis", "basis_of", "gram_factor", "pseudo_solve", "rank_tolerance"]


def rank_tolerance(gram: Tensor, relative_error: float, least: float = 1e-10) -> float:
    """Squared sine of the angle to the span of others up to which a gradient counts as in it.

    Args:
        gram: [..., T, T].
        relative_error: of its entries.
        least: the rounding of what is smaller would make an error of 1e-6 in the result.
    """
    return max(4 * gram.shape[-1] * relative_error, least)


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
    """[..., T]: which task the k-th independent gradient is; the dependent ones follow."""

    kept: Tensor
    """[..., T]: k < r."""


def basis_of(cosines: Tensor, tolerance: float, size: Tensor | None = None) -> Basis:
    """Choose independent gradients one by one, in T steps.

    Args:
        cosines: C, [..., T, T] with ones on its diagonal.
        tolerance: see `rank_tolerance`.
        size: [..., T]. The next one is that with most left of size², not of 1.
    """
    count = cosines.shape[-1]
    left, free = torch.ones_like(cosines[..., 0]), torch.ones_like(cosines[..., 0]).bool()
    square = left if size is None else size.square()
    factor, chosen, pivots = torch.zeros_like(cosines), [], []
    for k in range(count):
        # Independent ones first, then the dependent ones: a permutation in the end.
        most = torch.where(left > tolerance, left * square, -1.0)
        at = torch.where(free, most, -2.0).argmax(-1, keepdim=True)
        pivot = torch.where(free, left, 0.0).gather(-1, at)
        row = at[..., None].expand(*at.shape, count)
        done = (factor @ factor.gather(-2, row).mT)[..., 0]
        column = (cosines.gather(-2, row)[..., 0, :] - done) / pivot.clamp(min=tolerance).sqrt()
        column = torch.where((pivot > tolerance) & free, column, 0.0)
        factor[..., k] = column
        left = left - column.square()
        free = free.scatter(-1, at, False)
        chosen.append(at)
        pivots.append(pivot)
    order, kept = torch.cat(chosen, -1), torch.cat(pivots, -1) > tolerance
    rows = factor.gather(-2, order[..., None].expand_as(factor))
    eye = torch.eye(count, dtype=cosines.dtype, device=cosines.device)
    lower = torch.where(kept[..., None], rows.tril(), eye)
    spread = torch.linalg.solve_triangular(lower, factor, upper=False, left=False)
    return Basis(factor, lower, spread, order, kept)


def pseudo_solve(basis: Basis, right: Tensor, tolerance: float) -> Tensor:
    """The least-squares solution of least norm: C⁺ right, [..., T].

    Dependent gradients are known up to an angle of sqrt(tolerance). What is left of `right` when
    they cancel by less than that is no direction but rounding, and counts as 0.
    """
    both = gram_factor(basis.spread, basis.kept)
    onto = basis.spread.mT @ right[..., None]
    terms = basis.spread.mT.abs() @ right[..., None].abs()
    onto = torch.where(onto.abs() > tolerance**0.5 * terms, onto, 0.0)
    x = torch.cholesky_solve(onto, both)
    x = torch.cholesky_solve(x, basis.lower)
    return (basis.spread @ torch.cholesky_solve(x, both))[..., 0]


def gram_factor(spread: Tensor, kept: Tensor) -> Tensor:
    """Cholesky's factor of WᵀW, which W's unit rows keep away from singular: [..., T, T]."""
    both = spread.mT @ spread + torch.diag_embed((~kept).to(spread))
    factor: Tensor = torch.linalg.cholesky_ex(both)[0]
    return factor
