"""GradOPS: conflicting gradients without their part in the span of the others."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from gradsurgery.kernels import tasks
from gradsurgery.methods._base import Method
from gradsurgery.methods._quadratic import scale, unscale
from gradsurgery.methods._spectral import eigen, rank_tolerance

__all__ = ["GradOPS"]

_IN_SPAN = 1e-8


@tasks.step("gradops")
def project_out(gram: Tensor, tolerance: float, noise: float) -> Tensor:
    """Coefficients of Σ_i g_i': [..., T, T] -> [..., T]."""
    cosines, norms = scale(gram)
    values, vectors = eigen(cosines)
    kept = (values > tolerance * values.amax(-1, keepdim=True))[..., None, :]
    divisors = torch.where(kept, values[..., None, :], 1.0)
    basis = torch.where(kept, vectors, 0.0)
    inverse = (basis / divisors) @ basis.mT
    own = inverse.diagonal(dim1=-2, dim2=-1)
    # A gradient in the span of the others: nothing is left of it.
    alone = basis.square().sum(-1) > 1 - _IN_SPAN
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    projected = inverse / torch.where(alone, own, torch.inf)[..., None]
    conflicts = (cosines < -noise).any(-1, keepdim=True)
    each = torch.where(conflicts, projected, eye)
    sums = (norms[..., :, None] * each).sum(-2)
    return torch.where(norms > 0, unscale(sums, norms), 1.0)


class GradOPS(Method):
    """Orthogonal projections onto subspaces: Σ_i g_i', strongly non-conflicting.

    A gradient that conflicts with any other loses its part in the span of all others: g_i' is then
    orthogonal to them and g_i'·g_i = ‖g_i'‖². So g_i'·g_j >= 0 for all i and j, whatever the order
    of the tasks, and g conflicts with none. A gradient that lies in that span is gone.

    Deviations from the paper: its trade-offs (a task's g_i' reweighted by a power of its share) are
    left out: α = 0. A negative cosine within the rounding of M is no conflict.

    Source: Zhu et al., arXiv 2503.03438, algorithm 1.

    Example:
        >>> import torch
        >>> GradOPS().weights(torch.tensor([[1.0, -1.0], [-1.0, 4.0]]))
        tensor([2.0000, 1.2500], dtype=torch.float64)
    """

    name: ClassVar[str] = "gradops"

    def _solve(
        self,
        gram: Tensor,
        losses: Tensor | None,
        generator: torch.Generator | None,
        resolution: float,
    ) -> Tensor:
        numbers = (rank_tolerance(gram, resolution), 4 * resolution)
        return tasks.run("gradops", gram, numbers=numbers)
