"""ConFIG: equal angles to every task's gradient."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from gradsurgery.kernels import tasks
from gradsurgery.methods import _spectral
from gradsurgery.methods._base import Method
from gradsurgery.methods._projection import divide_or_zero

__all__ = ["ConFIG"]


@tasks.step("config")
def equal_angles(gram: Tensor, tolerance: float, noise: float) -> Tensor:
    """x = U⁺1 by its coefficients, times Σ_i g_i·x / ‖x‖²: [..., T, T] -> [..., T]."""
    y, along, norms, _ = _spectral.equal_angles(gram, tolerance, noise)
    square = (y * along).sum(-1)
    # ‖x‖², of which rounding of C leaves no more unsure than that.
    there = square > noise * y.square().sum(-1)
    length = (norms * along).sum(-1)
    factor = torch.where(there, length / torch.where(there, square, 1.0), 0.0)
    return divide_or_zero(factor[..., None] * y, norms)


class ConFIG(Method):
    """Conflict-free inverse gradients: the direction x = U⁺1 with U the unit gradients in rows.

    It has the same cosine, a positive one, with all of them, and g = (Σ_i g_i·x / ‖x‖) x / ‖x‖ is
    as long as the projections together.

    Deviations from the paper: a task without gradient is left out. Where no such direction exists
    (gradients that depend on each other) it is the least-squares one, as in the authors' code, and
    where that is zero, as for opposite gradients, so is g. Zero is what no longer exceeds the
    tolerance up to which a gradient counts as dependent, divided by the least squared sine among
    the independent ones; and a ‖x‖² within the rounding of M.

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
        numbers = (
            _spectral.rank_tolerance(gram, relative_error),
            _spectral.sum_rounding(gram, relative_error),
        )
        return tasks.run("config", gram, numbers=numbers)
