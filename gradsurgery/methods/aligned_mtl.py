"""Aligned-MTL: the principal components of the gradients, all brought to one length."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from gradsurgery.kernels import tasks
from gradsurgery.methods._base import Method
from gradsurgery.methods._spectral import eigen, rank_tolerance

__all__ = ["AlignedMTL"]


@tasks.step("aligned_mtl")
def align(gram: Tensor, tolerance: float) -> Tensor:
    """V (σ_min / Σ) Vᵀ (1/T) over the components that are not zero: [..., T, T] -> [..., T]."""
    most = gram.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None]
    values, vectors = eigen(gram / torch.where(most > 0, most, 1.0))
    kept = values > tolerance * values.amax(-1, keepdim=True)
    least = torch.where(kept, values, torch.inf).amin(-1, keepdim=True)
    factors = torch.where(kept, (least / torch.where(kept, values, 1.0)).sqrt(), 0.0)
    coordinates = factors * vectors.mean(-2)
    return (vectors @ coordinates[..., None])[..., 0]


class AlignedMTL(Method):
    """With G = U Σ Vᵀ: the mean of Ĝ = σ_min U Vᵀ, gradients orthogonal and equally long.

    So w = V (σ_min / Σ) Vᵀ 1/T, with V the eigenvectors of M and Σ² its eigenvalues, σ_min² being
    the smallest that is not zero. Everything is as long as the weakest component: a common factor
    of the result, which the learning rate has to make up for, or `Rescaled(AlignedMTL())`.

    What counts as zero: an eigenvalue up to 4 T times M's relative accuracy of the largest. Where
    norms are more than about 1e7 apart (of float32 rows with D > 65,536: 1e3) the small gradients
    fall under it.

    Source: Senushkin et al., arXiv 2305.19000, algorithm 1, with equal preferences.

    Example:
        >>> import torch
        >>> AlignedMTL().weights(torch.tensor([[1.0, 0.0], [0.0, 16.0]]))
        tensor([0.5000, 0.1250], dtype=torch.float64)
    """

    name: ClassVar[str] = "aligned_mtl"

    def _solve(
        self,
        gram: Tensor,
        losses: Tensor | None,
        generator: torch.Generator | None,
        resolution: float,
    ) -> Tensor:
        return tasks.run("aligned_mtl", gram, numbers=(rank_tolerance(gram, resolution, 0.0),))
