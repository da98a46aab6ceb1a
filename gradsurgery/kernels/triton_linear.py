"""Linear algebra on one small symmetric matrix that one Triton program holds in registers.

Matrices are [P, P] and vectors [P], with P the power of two from T on; rows and columns from T on
are the caller's to fill (with the identity, where a matrix is inverted). Everything is float64.
Importing this module needs Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["at", "inverse", "load_gram", "product", "scaled"]


@triton.jit
def load_gram(gram, batch, T: tl.constexpr, P: tl.constexpr):
    """M of one batch entry, [P, P], zero beyond T; and whether all of it is finite."""
    i, j = tl.arange(0, P)[:, None], tl.arange(0, P)[None, :]
    inside = (i < T) & (j < T)
    m = tl.load(gram + (batch * T + i) * T + j, mask=inside, other=0.0)
    # x - x is 0 for a number, NaN for infinity and NaN.
    return m, tl.sum(tl.sum(m - m, axis=1), axis=0) == 0


@triton.jit
def product(matrix, vector):
    """matrix · vector, [P, P], [P] -> [P]."""
    return tl.sum(matrix * vector[None, :], axis=1)


@triton.jit
def at(vector, index, P: tl.constexpr):
    """vector[index] as a scalar."""
    return tl.sum(tl.where(tl.arange(0, P) == index, vector, 0.0), axis=0)


@triton.jit
def scaled(m, P: tl.constexpr):
    """C_ij = M_ij / (n_i n_j) with a diagonal of ones, and n: `scale` in methods/_quadratic.py."""
    i, j = tl.arange(0, P)[:, None], tl.arange(0, P)[None, :]
    norms = tl.sqrt(tl.maximum(tl.sum(tl.where(i == j, m, 0.0), axis=1), 0.0))
    divisors = tl.where(norms > 0, norms, float("inf"))
    cosines = m / divisors[:, None] / divisors[None, :]
    cosines = tl.minimum(tl.maximum(cosines, -1.0), 1.0)
    return tl.where(i == j, 1.0, cosines), norms


@triton.jit
def inverse(matrix, least, T: tl.constexpr, P: tl.constexpr):
    """Inverse of a symmetric positive definite matrix, by T sweeps; pivots are at least `least`.

    One sweep takes a variable into the basis (Gauss and Jordan's elimination). The matrix stays
    symmetric, so that a column is read as a row too. A solution from it may be refined by one
    step with the matrix itself.
    """
    i = tl.arange(0, P)
    row, column = i[:, None], i[None, :]
    swept = matrix
    for k in range(T):
        down = tl.sum(tl.where(column == k, swept, 0.0), axis=1)
        across = tl.sum(tl.where(row == k, swept, 0.0), axis=0)
        pivot = tl.maximum(tl.sum(tl.where(i == k, down, 0.0), axis=0), least)
        share = across / pivot
        rest = swept - down[:, None] * share[None, :]
        rest = tl.where(row == k, share[None, :], rest)
        rest = tl.where(column == k, (down / pivot)[:, None], rest)
        swept = tl.where((row == k) & (column == k), -1 / pivot, rest)
    return -swept
