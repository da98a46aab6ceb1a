"""PCGrad: project each conflicting gradient onto the normal plane of the other."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from gradsurgery.kernels import tasks
from gradsurgery.methods._base import Method
from gradsurgery.methods._projection import divide_or_zero, draw_orders, visits

__all__ = ["PCGrad", "project_conflicts"]


@tasks.step("project")
def project_conflicts(gram: Tensor, orders: Tensor) -> Tensor:
    """Coefficients of the sum of the altered gradients, [..., T, T] -> [..., T].

    Row i of c holds the coefficients of ĝ_i = Σ_k c_ik g_k, starting from c = I. Where
    d = ĝ_i·g_j < 0, c_ij -= d / M_jj. The result is the column sums of c.
    """
    altered = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).repeat(
        *gram.shape[:-2], 1, 1
    )
    for partner, column, square, other in visits(gram, orders):
        dot = (altered * column).sum(-1)
        removed = torch.where((dot < 0) & other, divide_or_zero(-dot, square), 0.0)
        altered.scatter_add_(-1, partner, removed[..., None])
    return altered.sum(-2)


class PCGrad(Method):
    """Projecting Conflicting Gradients: for each task i, take away what opposes a task j.

    For each i and each j != i in a random order, fresh for every i:
    ĝ_i ← ĝ_i - min(0, ĝ_i·g_j) / ‖g_j‖² · g_j, with the original g_j. The combined gradient is
    Σ_i ĝ_i, as in the algorithm (some implementations return the mean).

    Source: Yu et al., "Gradient Surgery for Multi-Task Learning", arXiv 2001.06782, algorithm 1.

    Example:
        >>> import torch
        >>> PCGrad().weights(torch.tensor([[1.0, -1.0], [-1.0, 4.0]]))
        tensor([2.0000, 1.2500], dtype=torch.float64)
    """

    name: ClassVar[str] = "pcgrad"

    def solve(
        self,
        gram: Tensor,
        losses: Tensor | None,
        generator: torch.Generator | None,
        relative_error: float,
    ) -> Tensor:
        orders = draw_orders(gram.shape[:-1], gram.device, shared=False, generator=generator)
        return tasks.run("project", gram, orders)
