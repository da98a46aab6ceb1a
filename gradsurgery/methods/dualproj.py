"""DualProj: the mean gradient, projected to where it harms no task."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from gradsurgery.kernels import tasks
from gradsurgery.methods._base import Method
from gradsurgery.methods._projection import divide_or_zero
from gradsurgery.methods._quadratic import ridge_of, scale, solve_program

__all__ = ["DualProj"]


@tasks.step("dualproj")
def project_mean(gram: Tensor, ridge: float) -> Tensor:
    """argmin vᵀMv over v >= 1/T: [..., T, T] -> [..., T]."""
    cosines, norms = scale(gram)
    most = norms.amax(-1, keepdim=True)
    most = torch.where(most > 0, most, 1.0)
    mean = norms / most
    z = solve_program(cosines, (cosines @ mean[..., None])[..., 0], ridge)
    return (1 + divide_or_zero(z * most, norms)) / gram.shape[-1]


class DualProj(Method):
    """w = argmin_v vᵀMv over v >= 1/T.

    Gᵀv is the projection of the mean onto the dual cone {x: g_j·x >= 0 for all j}: the nearest
    gradient that conflicts with no task. GEM projects the newest task's gradient so; of tasks that
    are trained at once the mean takes its place. Where nothing conflicts it is the mean.

    Source: Lopez-Paz and Ranzato, "Gradient Episodic Memory", arXiv 1706.08840, equation 11.

    Example:
        >>> import torch
        >>> DualProj().weights(torch.tensor([[1.0, -2.0], [-2.0, 9.0]]))
        tensor([1.0000, 0.5000], dtype=torch.float64)
    """

    name: ClassVar[str] = "dualproj"

    def solve(
        self,
        gram: Tensor,
        losses: Tensor | None,
        generator: torch.Generator | None,
        relative_error: float,
    ) -> Tensor:
        return tasks.run("dualproj", gram, numbers=(ridge_of(relative_error),))
