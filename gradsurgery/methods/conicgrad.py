"""ConicGrad: the best worst-case progress within a cone around the mean gradient."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from gradsurgery.kernels import tasks
from gradsurgery.methods._base import Method, check_number
from gradsurgery.methods._quadratic import Path, noise_of, ridge_of

__all__ = ["ConicGrad"]


@tasks.step("conicgrad")
def within_the_cone(gram: Tensor, ridge: float, noise: float, c: float) -> Tensor:
    """[..., T, T] -> [..., T]: as long as g_0, and not further from it than its cosine c allows."""
    if gram.shape[-1] == 1 or c == 1:
        return torch.full_like(gram[..., 0], 1 / gram.shape[-1])
    return Path(gram, cone=True, limit=c, ridge=ridge, noise=noise).weights()


class ConicGrad(Method):
    """max over d of min_i g_i·d, where cos(d, g_0) >= c and ‖d‖ = ‖g_0‖, g_0 the mean gradient.

    c = 1 is the mean; c = 0 lets d go wherever it does not oppose the mean, most of the time to
    MGDA's direction. Where no direction of the cone serves all tasks, d is the nearest to g_0 with
    g_i·d >= s for all i, for the s <= 0 at which that d lies on the cone's edge.

    Args:
        c: least cosine with the mean, 0 <= c <= 1.

    Deviations from the paper: the constrained problem is solved exactly at every call, so that
    there are no task weights to carry from step to step; c = 0.5, a cone of 60°, is this library's
    choice. Where d is only what rounding leaves of gradients that cancel, its length stays.

    Raises:
        TypeError, ValueError: `c` is no number in [0, 1].

    Source: Hassanpour et al., arXiv 2502.00217, the constrained max-min problem.

    Example:
        >>> import torch
        >>> ConicGrad(c=0.5).weights(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """

    name: ClassVar[str] = "conicgrad"

    def __init__(self, c: float = 0.5) -> None:
        check_number("c", c)
        if not 0 <= c <= 1:
            raise ValueError(f"c must be in [0, 1]; got {c!r}")
        self.c = c

    def solve(
        self,
        gram: Tensor,
        losses: Tensor | None,
        generator: torch.Generator | None,
        relative_error: float,
    ) -> Tensor:
        numbers = (ridge_of(relative_error), noise_of(relative_error), self.c)
        return tasks.run("conicgrad", gram, numbers=numbers)
