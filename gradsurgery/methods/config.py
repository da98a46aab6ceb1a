"""ConFIG: equal angles to every task's gradient."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from gradsurgery.kernels import tasks
from gradsurgery.methods._base import Method
from gradsurgery.methods._projection import divide_or_zero
from gradsurgery.methods._quadratic import scale
from gradsurgery.methods._spectral import basis_of, pseudo_solve, rank_tolerance

__all__ = ["ConFIG"]


@tasks.step("config")
def equal_angles(gram: Tensor, tolerance: float) -> Tensor:
    """x = U⁺1 by its coefficients, times Σ_i g_i·x / ‖x‖²: [..., T, T] -> [..., T]."""
    cosines, norms = scale(gram)
    y = pseudo_solve(basis_of(cosines, tolerance), (norms > 0).to(gram.dtype), tolerance)
    product = (cosines @ y[..., None])[..., 0]
    square = (y * product).sum(-1)
    there = square > 1e-24 * y.abs().sum(-1).square()
    length = (norms * product).sum(-1)
    factor = torch.where(there, length / torch.where(there, square, 1.0), 0.0)
    return divide_or_zero(factor[..., None] * y, norms)


class ConFIG(Method):
    """Conflict-free inverse gradients: the direction x = U⁺1 with U the unit gradients in rows.

    It has the same cosine, a positive one, with all of them, and g = (Σ_i g_i·x / ‖x‖) x / ‖x‖ is
    as long as the projections together.

    Deviations from the paper: where no such direction exists (gradients that depend on each other)
    it is the least-squares one, as in the authors' code, and where that is zero, up to the accuracy
    of M, so is g (exactly opposite gradients); a task without gradient is left out.

    Source: Liu et al., arXiv 2408.11104, equations 2 to 4.

    Example:
        >>> import torch
        >>> ConFIG().weights(torch.tensor([[1.0, 0.0], [0.0, 9.0]]))
        tensor([2.0000, 0.6667], dtype=torch.float64)
    """

    name: ClassVar[str] = "config"

    def solve(
        self,
        gram: Tensor,
        losses: Tensor | None,
        generator: torch.Generator | None,
        relative_error: float,
    ) -> Tensor:
        return tasks.run("config", gram, numbers=(rank_tolerance(gram, relative_error),))
