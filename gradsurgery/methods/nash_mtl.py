"""Nash-MTL: the bargain in which every task gains its fair share."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from gradsurgery.kernels import tasks
from gradsurgery.methods import _barrier
from gradsurgery.methods._base import Method

__all__ = ["NashMTL"]


class NashMTL(Method):
    """The Nash bargaining solution: M w = 1/w, w > 0, so g·g_i = 1/w_i for every task.

    It does not depend on how the losses are scaled: w_i falls as ‖g_i‖ grows. The combined gradient
    therefore has the length sqrt(T) whatever the losses are, and the learning rate has to fit that;
    `Rescaled(NashMTL())` gives it the sum's length.

    Deviations from the paper: the equation is solved by Newton's method to full accuracy, not by a
    sequence of twenty approximations; weights are solved at every call (the plugin's `every=` is
    the authors' `update_weights_every`). At a Pareto-stationary point it has no solution, and near
    one w grows without bound: 1e-12 is added to the squared cosine of each gradient with itself
    (four times M's relative accuracy, where that is more), so Σ_i (w_i‖g_i‖)² stays below 1e12 T.

    Source: Navon et al., arXiv 2202.01017, claim 3.1 and algorithm 1.

    Example:
        >>> import torch
        >>> NashMTL().weights(torch.tensor([[1.0, 0.0], [0.0, 4.0]]))
        tensor([1.0000, 0.5000], dtype=torch.float64)
    """

    name: ClassVar[str] = "nash_mtl"

    def solve(
        self,
        gram: Tensor,
        losses: Tensor | None,
        generator: torch.Generator | None,
        relative_error: float,
    ) -> Tensor:
        return tasks.run("balance", gram, numbers=(1.0, _barrier.ridge_of(relative_error)))
