"""MGDA: the shortest vector in the convex hull of the gradients."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from gradsurgery.kernels import tasks
from gradsurgery.methods._base import Method
from gradsurgery.methods._quadratic import lift, ridge_of, scale, solve_program

__all__ = ["MGDA"]


@tasks.step("mgda")
def shortest_in_hull(gram: Tensor, ridge: float) -> Tensor:
    """argmin wᵀMw over the simplex: [..., T, T] -> [..., T].

    min wᵀMw + κ²(1ᵀw - 1)² over w >= 0 has its direction for every κ > 0, and always a solution;
    κ is the smallest norm.
    """
    cosines, norms = scale(gram)
    a, lifted = lift(cosines, norms)
    zero = norms == 0
    z = solve_program(lifted, -a, ridge) * a
    # A task without gradient: zero lies in the hull.
    z = torch.where(zero.any(-1, keepdim=True), zero.to(z.dtype), z)
    return z / z.sum(-1, keepdim=True)


class MGDA(Method):
    """Multiple-gradient descent: w = argmin wᵀMw over the simplex.

    g = Gᵀw is the direction in which the task that gains least gains most. It conflicts with no
    task, is zero exactly at Pareto-stationary points, and follows the small gradients: a task
    that is nearly done slows all others. Where tasks have no gradient they share all the weight.

    Source: Désidéri 2012, and Sener and Koltun, arXiv 1810.04650, equation 3; they iterate with
    Frank and Wolfe's algorithm, here the program is solved.

    Example:
        >>> import torch
        >>> MGDA().weights(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
        tensor([0.7500, 0.2500], dtype=torch.float64)
    """

    name: ClassVar[str] = "mgda"

    def solve(
        self,
        gram: Tensor,
        losses: Tensor | None,
        generator: torch.Generator | None,
        relative_error: float,
    ) -> Tensor:
        return tasks.run("mgda", gram, numbers=(ridge_of(relative_error),))
