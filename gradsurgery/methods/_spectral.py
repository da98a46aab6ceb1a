"""Eigenvectors of small symmetric matrices without waiting for a device, and what rests on them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["eigen", "pseudo_solve", "rank_tolerance"]

_SWEEPS = 12


def rank_tolerance(gram: Tensor, resolution: float, least: float = 1e-10) -> float:
    """Up to where, beside the largest, an eigenvalue of M or of its cosines counts as zero.

    Args:
        gram: [..., T, T].
        resolution: of its entries.
        least: what is smaller would make of its rounding an error of 1e-6 in the result.
    """
    return max(4 * gram.shape[-1] * resolution, least)


def eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [..., T], in no order, and eigenvectors [..., T, T] in columns.

    LAPACK on the CPU. Elsewhere Jacobi's method, as torch.linalg.eigh waits for the device: T / 2
    disjoint rotations at once, T - 1 such rounds a sweep.

    Source: Golub and Van Loan, "Matrix Computations", section 8.5 (parallel ordering).
    """
    if matrix.device.type == "cpu":
        values, vectors = torch.linalg.eigh(torch.nan_to_num(matrix, 0.0, 0.0, 0.0))
        return values, vectors
    return jacobi(matrix)


def jacobi(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """See `eigen`."""
    count = matrix.shape[-1]
    padded = count + count % 2
    a = torch.nn.functional.pad(matrix, (0, padded - count, 0, padded - count))
    eye = torch.eye(padded, dtype=matrix.dtype, device=matrix.device)
    vectors = eye.expand_as(a)
    # A round robin of all pairs: the first player stays, the others move on by one seat.
    seats = list(range(padded))
    for _ in range(_SWEEPS):
        for _ in range(max(padded - 1, 1)):
            half = padded // 2
            top, bottom = seats[:half], seats[half:][::-1]
            # By seat: the pairs are (0, 1), (2, 3), ... after this permutation.
            order = [player for pair in zip(top, bottom, strict=True) for player in pair]
            at = torch.tensor(order).to(matrix.device, non_blocking=True)
            a = a.index_select(-1, at).index_select(-2, at)
            vectors = vectors.index_select(-1, at)
            rotation = _rotations(a)
            a = rotation.mT @ a @ rotation
            vectors = vectors @ rotation
            # Players are now known by their seats: 0..T-1 again.
            seats = _next(order)
    values = a.diagonal(dim1=-2, dim2=-1)
    if padded > count:
        # The one that was added: its vector is the last unit vector.
        added = vectors[..., -1, :].square()
        rank = added.argsort(dim=-1)[..., :count]
        values = values.gather(-1, rank)
        vectors = vectors[..., :count, :].gather(
            -1, rank[..., None, :].expand(*rank.shape[:-1], count, count)
        )
    return values, vectors


def _next(order: list[int]) -> list[int]:
    """Seats for the next round, by the places that players have now."""
    half = len(order) // 2
    top, bottom = list(range(0, 2 * half, 2)), list(range(1, 2 * half, 2))
    circle = [*top, *bottom[::-1]]
    return [circle[0], *circle[2:], *circle[1:2]]


def _rotations(a: Tensor) -> Tensor:
    """One orthogonal matrix that takes a_{2i, 2i+1} to zero for every i."""
    first, second = a.diagonal(dim1=-2, dim2=-1)[..., 0::2], a.diagonal(dim1=-2, dim2=-1)[..., 1::2]
    between = a.diagonal(offset=1, dim1=-2, dim2=-1)[..., 0::2]
    still = between == 0
    slope = (second - first) / (2 * torch.where(still, 1.0, between))
    sign = torch.where(slope >= 0, 1.0, -1.0)
    tangent = sign / (slope.abs() + (slope.square() + 1).sqrt())
    tangent = torch.where(still, 0.0, tangent)
    cosine = 1 / (tangent.square() + 1).sqrt()
    sine = tangent * cosine
    rotation = torch.diag_embed(torch.stack([cosine, cosine], -1).flatten(-2))
    off = torch.stack([sine, torch.zeros_like(sine)], -1).flatten(-2)[..., :-1]
    return rotation + torch.diag_embed(off, offset=1) - torch.diag_embed(off, offset=-1)


def pseudo_solve(matrix: Tensor, right: Tensor, tolerance: float) -> Tensor:
    """The least-squares solution of least norm: matrix⁺ right, [..., T, T], [..., T] -> [..., T].

    Eigenvalues up to `tolerance` times the largest count as zero.
    """
    values, vectors = eigen(matrix)
    most = values.amax(-1, keepdim=True)
    kept = values > tolerance * most
    inverse = torch.where(kept, 1 / torch.where(kept, values, 1.0), 0.0)
    coordinates = (vectors.mT @ right[..., None])[..., 0]
    return (vectors @ (inverse * coordinates)[..., None])[..., 0]
