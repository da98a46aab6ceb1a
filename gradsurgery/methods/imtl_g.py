"""IMTL-G: equal projections on every task's direction."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from gradsurgery.kernels import tasks
from gradsurgery.methods._base import Method
from gradsurgery.methods._projection import divide_or_zero
from gradsurgery.methods._quadratic import scale
from gradsurgery.methods._spectral import basis_of, pseudo_solve, rank_tolerance

__all__ = ["IMTLG"]


@tasks.step("imtl_g")
def equal_projections(gram: Tensor, tolerance: float) -> Tensor:
    """C⁺1 / n, divided by its sum: [..., T, T] -> [..., T]."""
    cosines, norms = scale(gram)
    y = pseudo_solve(basis_of(cosines, tolerance), (norms > 0).to(gram.dtype), tolerance)
    w = divide_or_zero(y, norms)
    total, size = w.sum(-1, keepdim=True), w.abs().sum(-1, keepdim=True)
    return divide_or_zero(w, torch.where(total.abs() > tolerance**0.5 * size, total, 0.0))


class IMTLG(Method):
    """Impartial gradients: g·g_i/‖g_i‖ is the same for all tasks, and Σ_t w_t = 1.

    So w ∝ C⁻¹1 / n with C the cosines and n the norms. Weights may be negative.

    Deviations from the paper: where C is singular the least-squares solution of least norm is taken
    (the paper's closed form has no value); where its weights sum to zero, up to the accuracy of M,
    they are all zero (exactly opposite gradients); a task without gradient has no direction and
    gets 0.

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
        return tasks.run("imtl_g", gram, numbers=(rank_tolerance(gram, relative_error),))
