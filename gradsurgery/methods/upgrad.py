"""UPGrad: the mean of the gradients, each projected to where it harms no task."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from gradsurgery.kernels import tasks
from gradsurgery.methods._base import Method
from gradsurgery.methods._projection import divide_or_zero
from gradsurgery.methods._quadratic import ridge_of, scale, solve_program

__all__ = ["UPGrad"]


@tasks.step("upgrad")
def project_each(gram: Tensor, ridge: float) -> Tensor:
    """(1/T) Σ_i argmin vᵀMv over v >= e_i: [..., T, T] -> [..., T]."""
    cosines, norms = scale(gram)
    # v = e_i + z: in scaled variables the same program on C for every i, whatever the norms.
    programs = cosines[..., None, :, :].expand(*gram.shape[:-2], gram.shape[-1], -1, -1)
    sums = (norms[..., :, None] * solve_program(programs, cosines, ridge)).sum(-2)
    return (1 + divide_or_zero(sums, norms)) / gram.shape[-1]


class UPGrad(Method):
    """Unconflicting projection of gradients: w = (1/T) Σ_i argmin_v vᵀMv over v >= e_i.

    Gᵀv is then the projection of g_i onto the dual cone {x: g_j·x >= 0 for all j}, so that the
    combined gradient conflicts with no task. Where nothing conflicts it is the mean. A gradient's
    influence grows with its norm, as in the sum.

    Source: Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization", arXiv 2406.16232,
    equation 3 (the projection) and proposition 1.

    Example:
        >>> import torch
        >>> UPGrad().weights(torch.tensor([[1.0, -1.0], [-1.0, 4.0]]))
        tensor([1.0000, 0.6250], dtype=torch.float64)
    """

    name: ClassVar[str] = "upgrad"

    def solve(
        self,
        gram: Tensor,
        losses: Tensor | None,
        generator: torch.Generator | None,
        relative_error: float,
    ) -> Tensor:
        return tasks.run("upgrad", gram, numbers=(ridge_of(relative_error),))
