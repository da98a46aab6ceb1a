"""FairGrad: α-fair progress of the tasks."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from gradsurgery.kernels import tasks
from gradsurgery.methods import _barrier
from gradsurgery.methods._base import Method, check_number

__all__ = ["FairGrad"]


class FairGrad(Method):
    """M w = w^(-1/α), w > 0: the direction of α-fair progress Σ_i (g·g_i)^(1-α) / (1 - α).

    α = 1 is `NashMTL`; the larger α, the more the task that gains least counts. The combined
    gradient's length does not follow the losses' scale: `Rescaled(FairGrad())` gives it the sum's.

    Args:
        alpha: α, from 0.01 to 10. Within that the equation holds to 1e-6 of its terms whatever the
            gradients are, norms 1e24 apart included; beyond, w may not even fit into float64.

    Deviations from the paper: the equation is solved by Newton's method to full accuracy, where the
    authors call a least-squares routine; near Pareto-stationary points as of `NashMTL`.

    Raises:
        TypeError, ValueError: `alpha` is no number from 0.01 to 10.

    Source: Ban and Ji, arXiv 2402.15638, equation 6 and algorithm 1; α = 2 in most of its
    experiments.

    Example:
        >>> import torch
        >>> FairGrad(alpha=1.0).weights(torch.tensor([[1.0, 0.0], [0.0, 4.0]]))
        tensor([1.0000, 0.5000], dtype=torch.float64)
    """

    name: ClassVar[str] = "fairgrad"

    def __init__(self, alpha: float = 2.0) -> None:
        check_number("alpha", alpha)
        if not _barrier.LEAST_ALPHA <= alpha <= _barrier.MOST_ALPHA:
            raise ValueError(
                f"alpha must be from {_barrier.LEAST_ALPHA} to {_barrier.MOST_ALPHA}, where w is "
                f"solved to 1e-6; got {alpha!r}"
            )
        self.alpha = alpha

    def solve(
        self,
        gram: Tensor,
        losses: Tensor | None,
        generator: torch.Generator | None,
        relative_error: float,
    ) -> Tensor:
        numbers = (1 / self.alpha, _barrier.ridge_of(relative_error))
        return tasks.run("balance", gram, numbers=numbers)
