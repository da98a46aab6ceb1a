"""GradOPS: conflicting gradients without their part in the span of the others."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from gradsurgery.kernels import tasks
from gradsurgery.methods._base import Method
from gradsurgery.methods._projection import divide_or_zero
from gradsurgery.methods._quadratic import scale
from gradsurgery.methods._spectral import basis_of, rank_tolerance

__all__ = ["GradOPS"]


@tasks.step("gradops")
def project_out(gram: Tensor, tolerance: float, noise: float) -> Tensor:
    """Coefficients of Σ_i g_i': [..., T, T] -> [..., T]."""
    cosines, norms = scale(gram)
    basis = basis_of(cosines, tolerance)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    # What is left of each independent gradient: A⁻¹ over its diagonal, with A their cosines.
    inverse = torch.cholesky_solve(eye, basis.lower)
    projected = inverse / inverse.diagonal(dim1=-2, dim2=-1)[..., None]
    # One that any dependent gradient is made of lies in the span of the others itself.
    dependent = torch.ones_like(norms).scatter(-1, basis.order, (~basis.kept).to(gram.dtype))
    needed = (basis.spread.abs() * dependent[..., None]).amax(-2) > noise**0.5
    taken = torch.where((needed | ~basis.kept)[..., None], 0.0, projected)
    at = basis.order[..., None]
    each = torch.zeros_like(gram).scatter(-2, at.expand_as(gram), taken)
    each = torch.zeros_like(gram).scatter(-1, at.mT.expand_as(gram), each)
    conflicts = (cosines < -noise).any(-1, keepdim=True)
    sums = (norms[..., :, None] * torch.where(conflicts, each, eye)).sum(-2)
    return torch.where(norms > 0, divide_or_zero(sums, norms), 1.0)


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

    def solve(
        self,
        gram: Tensor,
        losses: Tensor | None,
        generator: torch.Generator | None,
        relative_error: float,
    ) -> Tensor:
        numbers = (rank_tolerance(gram, relative_error), 4 * relative_error)
        return tasks.run("gradops", gram, numbers=numbers)
