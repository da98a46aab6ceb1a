"""What the weights of Nash-MTL, FairGrad, IMTL-G, ConFIG, GradOPS and Aligned-MTL have to fulfil.

All on the CPU, by torch alone, so that tests on a GPU can use them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from families import gradients_of
from torch import Tensor

__all__ = [
    "FAMILIES_TO_PROJECT",
    "RANKS",
    "WELL_POSED",
    "barely_dependent",
    "check_aligned",
    "check_balance",
    "check_equal_angles",
    "check_no_conflict",
    "check_opposite",
    "check_partly_dependent",
    "check_projections",
    "cosines_of",
]

OPTIMAL = 1e-6
WELL_POSED = ("independent", "agreeing", "conflicting")
FAMILIES_TO_PROJECT = (*WELL_POSED, "few dimensions", "stationary", "zero rows", "opposite")
RANKS = [
    *[(family, {2: 2, 3: 3, 8: 8}) for family in WELL_POSED],
    ("norms 1e-12 to 1e12", {2: 2, 3: 3, 8: 8}),
    ("norms 1e-12 to 1e12, few dimensions", {3: 2, 8: 2}),
    ("one giant", {2: 2, 3: 3, 8: 8}),
    ("one dwarf", {2: 2, 3: 3, 8: 8}),
    ("stationary", {2: 1, 3: 2, 8: 7}),
    ("few dimensions", {2: 1, 3: 1, 8: 2}),
    ("zero rows", {2: 1, 3: 2, 8: 5}),
    ("parallel", {2: 1, 3: 1, 8: 1}),
    ("opposite", {2: 1, 3: 1, 8: 1}),
    ("equal", {2: 1, 3: 1, 8: 1}),
]
"""Families, and for T the rank of M."""


def check_balance(gram: Tensor, weights: Tensor, p: float, accuracy: float = 1e-6) -> None:
    """(C y)_i = n_i^(p-1) y_i^(-p), beside Σ_j |C_ij| y_j: both sides cancel to that at best."""
    norms = gram.diagonal().sqrt()
    there = norms > 0
    assert weights.isfinite().all()
    assert not weights[~there].any()
    n, y = norms[there], weights[there] * norms[there]
    assert (y > 0).all()
    cosines = gram[there][:, there] / n[:, None] / n
    wanted = ((p - 1) * n.log() - p * y.log()).exp()
    assert ((cosines @ y - wanted).abs() <= accuracy * (cosines.abs() @ y)).all()


def cosines_of(gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """C and n of the tasks that have a gradient, and which these are."""
    norms = gradients.norm(dim=1)
    there = norms > 0
    unit = gradients[there] / norms[there, None]
    return unit @ unit.T, norms[there], there


def check_pseudo_solution(cosines: Tensor, y: Tensor) -> None:
    """C (C y - 1) = 0 beside its terms, and y has nothing in the null space of C.

    That is C⁺1 whatever is taken for the rank, which C, good to 1e-16, does not tell: the tolerance
    is 1e-10, and so is what C may differ by from the matrix that is inverted.
    """
    terms = cosines.abs() @ (cosines.abs() @ y.abs() + 1)
    assert ((cosines @ (cosines @ y - 1)).abs() <= OPTIMAL * terms).all()
    values, vectors = torch.linalg.eigh(cosines)
    # T roundings of entries up to 1.
    null = vectors[:, values <= 4e-16 * len(y)]
    assert ((null.T @ y).abs() <= OPTIMAL * (null.abs().T @ y.abs())).all()


def check_equal_angles(gradients: Tensor, impartial: Tensor, config: Tensor) -> None:
    """IMTL-G's and ConFIG's weights are C⁺1 / n up to a factor, and those of IMTL-G sum to 1."""
    cosines, norms, there = cosines_of(gradients)
    for weights in (impartial, config):
        assert weights.isfinite().all()
        assert not weights[~there].any()
    if impartial.any():
        # Rounding of a sum of T terms.
        noise = 1e-15 * len(gradients) * float(impartial.abs().sum())
        assert float(impartial.sum()) == pytest.approx(1, abs=noise)
    for weights in (impartial, config):
        y = weights[there] * norms
        product = cosines @ y
        if not y.any() or float(product.norm()) <= 1e-6 * float(y.norm()):
            continue
        # For y = f C⁺1, C y = f P1 with P the projection on C's range: f = ‖C y‖² / 1ᵀC y.
        check_pseudo_solution(cosines, y * float(product.sum() / product.square().sum()))


def aligned(gradients: Tensor, rank: int) -> Tensor:
    """σ_min V Σ⁻¹ Vᵀ 1/T by 120 digits, for the M that has `rank` eigenvalues."""
    mpmath = pytest.importorskip("mpmath")
    count = len(gradients)
    with mpmath.workdps(120):
        rows = mpmath.matrix(gradients.tolist())
        values, vectors = mpmath.eigsy(rows * rows.T)
        kept = sorted(range(count), key=lambda k: values[k])[count - rank :]
        least = min(values[k] for k in kept)
        w = [mpmath.mpf(0)] * count
        for k in kept:
            share = mpmath.sqrt(least / values[k]) * sum(vectors[:, k]) / count
            w = [w[i] + share * vectors[i, k] for i in range(count)]
    return torch.tensor([float(x) for x in w], dtype=torch.float64)


def check_aligned(gradients: Tensor, weights: Tensor, rank: int) -> None:
    """Each task's part w_i g_i beside the longest: float64 and the integral's error, 1e-12."""
    wanted, norms = aligned(gradients, rank), gradients.norm(dim=1)
    size = float((wanted.abs() * norms).max())
    # Where w cancels to nothing, beside the terms of the sum over components.
    size = max(size, 1e-6 * float(norms[norms > 0].min()) / len(gradients))
    assert ((weights - wanted).abs() * norms <= 1e-9 * size).all()


def by_projection(gradients: Tensor) -> Tensor:
    """One gradient at a time, by least squares on all others."""
    total = torch.zeros_like(gradients[0])
    for i, row in enumerate(gradients):
        others = torch.cat([gradients[:i], gradients[i + 1 :]])
        if (others @ row < 0).any():
            row = row - others.T @ torch.linalg.lstsq(others.T, row, driver="gelsd").solution
        total += row
    return total


def check_projections(gradients: Tensor, weights: Tensor) -> None:
    """Rounding times M's condition number, up to 1e4."""
    found, wanted = gradients.T @ weights, by_projection(gradients)
    assert (found - wanted).abs().max() <= 1e-9 * gradients.norm(dim=1).max()


def check_no_conflict(gradients: Tensor, weights: Tensor) -> None:
    """Strongly non-conflicting: g_i'·g_j >= 0 for each i, so for their sum, beside its terms."""
    cosines, norms, there = cosines_of(gradients)
    y = weights[there] * norms
    assert (cosines @ y >= -OPTIMAL * (cosines.abs() @ y.abs())).all()


def check_opposite(
    weights: Callable[[Tensor], Tensor], factor: float, dtype: torch.dtype, seed: int
) -> None:
    """g and -factor g, rounded: the combined gradient is zero beside g."""
    gradient = torch.randn(500, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gradients = torch.stack([gradient, -factor * gradient]).to(dtype)
    found = weights(gradients @ gradients.T)
    assert not found.any()


def check_partly_dependent(weights: Callable[[Tensor], Tensor]) -> None:
    """Two independent gradients that conflict, and two opposite ones."""
    rows = [[1.0, 0, 0], [-1.0, 2, 0], [0, 0, 1], [0, 0, -2]]
    gradients = torch.tensor(rows, dtype=torch.float64)
    found = gradients.T @ weights(gradients @ gradients.T)
    wanted = torch.tensor([0.8, 2.4, 0.0], dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=1e-14, atol=1e-14)


def barely_dependent() -> Tensor:
    """M of gradients opposite up to 1e-7, so with squared sines of rounding, of any length."""
    sizes = 10 ** (torch.rand(8, 1, generator=torch.Generator().manual_seed(1)) * 36 - 18)
    gradients = gradients_of("nearly opposite", 8, 1) * sizes.double()
    return gradients @ gradients.T
