"""IMTL-G: equal projections on every task's direction."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from gradsurgery.kernels import tasks
from gradsurgery.methods._base import Method
from gradsurgery.methods._projection import divide_or_zero
from gradsurgery.methods._spectral import equal_angles, rank_tolerance, sum_rounding

__all__ = ["IMTLG"]


@tasks.step("imtl_g")
def equal_projections(gram: Tensor, tolerance: float, noise: float) -> Tensor:
    """C⁺1 / n, divided by its sum: [..., T, T] -> [..., T]."""
    y, _, norms, doubt = equal_angles(gram, tolerance, noise)
    w = divide_or_zero(y, norms)
    total, size = w.sum(-1, keepdim=True), w.abs().sum(-1, keepdim=True)
    return divide_or_zero(w, torch.where(total.abs() > doubt * size, total, 0.0))


class IMTLG(Method):
    """Impartial gradients: g·g_i/‖g_i‖ is the same for all tasks, and Σ_t w_t = 1.

    So w ∝ C⁻¹1 / n with C the cosines and n the norms. Weights may be negative.

    Deviations from the paper: a task without gradient has no direction and gets 0. Where C is
    singular the least-squares solution of least norm is taken (the paper's closed form has no
    value). Where it is zero, as for opposite gradients, or its weights sum to zero, all weights are
    zero. Zero is what no longer exceeds the rounding of M, or the tolerance up to which a gradient
    counts as dependent, divided by the least squared sine among the independent ones.

    Source: Liu et al., "Towards Impartial Multi-task Learning", ICLR 2021, equation 6.

    Example:
        >>> import torch
        >>> IMTLG().weights(torch.tensor([[1.0, 0.0], [0.0, 9.0]]))
        tensor([0.7500, 0.2500], dtype=torch.float64)
    """

    name: ClassVar[str] = "imtl_g"

    def solve(
        self,
        gram: Tensor,
        losses: Tensor | None,
        generator: torch.Generator | None,
        relative_error: float,
    ) -> Tensor:
        numbers = (rank_tolerance(gram, relative_error), sum_rounding(gram, relative_error))
        return tasks.run("imtl_g", gram, numbers=numbers)
