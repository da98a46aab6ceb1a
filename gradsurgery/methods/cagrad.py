"""CAGrad: near the mean gradient, what serves the worst-off task best."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from gradsurgery.kernels import tasks
from gradsurgery.methods._base import Method, check_number
from gradsurgery.methods._quadratic import Path, noise_of, ridge_of

__all__ = ["CAGrad"]


@tasks.step("cagrad")
def near_the_mean(gram: Tensor, ridge: float, noise: float, c: float) -> Tensor:
    """[..., T, T] -> [..., T]: 1/T + z, ‖Gᵀz‖ = c‖g_0‖."""
    if gram.shape[-1] == 1 or c == 0:
        return torch.full_like(gram[..., 0], 1 / gram.shape[-1])
    return Path(gram, cone=False, limit=c, ridge=ridge, noise=noise).weights()


class CAGrad(Method):
    """Conflict-averse gradient: max over ‖d - g_0‖ <= c‖g_0‖ of min_i g_i·d, g_0 the mean.

    d = g_0 + (c‖g_0‖ / ‖g_w‖) g_w with w = argmin over the simplex of g_wᵀg_0 + c‖g_0‖‖g_w‖. With
    c = 0 it is the mean; the larger c, the nearer to MGDA's direction.

    Args:
        c: radius of the ball around g_0, as a share of its length; 0 <= c < 1.

    Deviations from the paper: at ‖g_w‖ = 0, a Pareto-stationary point where g_0 is not zero, its
    formula is not defined; no d serves all there, and the nearest that harms none is taken,
    `DualProj`'s. Tasks without gradient have no say, and a single task keeps its gradient, which
    the formula lengthens by 1 + c. The authors' code also divides d by 1 + c², the paper does not.

    Raises:
        TypeError, ValueError: `c` is no number in [0, 1).

    Source: Liu et al., arXiv 2110.14048, algorithm 1; c = 0.4 as in the authors' scripts.

    Example:
        >>> import torch
        >>> CAGrad(c=0.5).weights(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor([0.7500, 0.7500], dtype=torch.float64)
    """

    name: ClassVar[str] = "cagrad"

    def __init__(self, c: float = 0.4) -> None:
        check_number("c", c)
        if not 0 <= c < 1:
            raise ValueError(f"c must be in [0, 1); got {c!r}")
        self.c = c

    def solve(
        self,
        gram: Tensor,
        losses: Tensor | None,
        generator: torch.Generator | None,
        relative_error: float,
    ) -> Tensor:
        numbers = (ridge_of(relative_error), noise_of(relative_error), self.c)
        return tasks.run("cagrad", gram, numbers=numbers)
