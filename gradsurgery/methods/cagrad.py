"""CAGrad: near the mean gradient, what serves the worst-off task best."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from gradsurgery.kernels import tasks
from gradsurgery.methods._base import Method, check_number
from gradsurgery.methods._quadratic import best_worst, idle, scale, unscale

__all__ = ["CAGrad"]


@tasks.step("cagrad")
def near_the_mean(gram: Tensor, c: float) -> Tensor:
    """1/T + z, ‖Gᵀz‖ <= c‖g_0‖, for the largest min_i g_i·d: [..., T, T] -> [..., T]."""
    count = gram.shape[-1]
    cosines, norms = scale(gram)
    most = norms.amax(-1, keepdim=True)
    most = torch.where(most > 0, most, 1.0)
    mean = norms / most / count
    b = (cosines @ mean[..., None])[..., 0]
    radius = c * (mean * b).sum(-1).clamp(min=0).sqrt()
    # In units of the largest norm; a condition is divided by its own task's.
    one = torch.where(norms > 0, most / torch.where(norms > 0, norms, 1.0), 1.0)
    z = best_worst(cosines, idle(b, norms > 0, one, radius), one, radius)
    return 1 / count + unscale(z * most, norms)


class CAGrad(Method):
    """Conflict-averse gradient: max over ‖d - g_0‖ <= c‖g_0‖ of min_i g_i·d, g_0 the mean.

    d = g_0 + (c‖g_0‖ / ‖g_w‖) g_w with w = argmin over the simplex of g_wᵀg_0 + c‖g_0‖‖g_w‖. With
    c = 0 it is the mean; the larger c, the nearer to MGDA's direction.

    Args:
        c: radius of the ball around g_0, as a share of its length; 0 <= c < 1.

    Deviation from the paper: at ‖g_w‖ = 0 (a Pareto-stationary point where g_0 is not zero) its
    formula is not defined, and the nearest d to g_0 that serves the worst-off task best is taken.
    The authors' code also divides d by 1 + c² by default, which the paper does not.

    Raises:
        TypeError, ValueError: `c` is no number in [0, 1).

    Source: Liu et al., arXiv 2110.14048, algorithm 1; c = 0.4 as for its NYUv2 and Cityscapes.

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

    def _solve(
        self,
        gram: Tensor,
        losses: Tensor | None,
        generator: torch.Generator | None,
        resolution: float,
    ) -> Tensor:
        return tasks.run("cagrad", gram, numbers=(self.c,))
