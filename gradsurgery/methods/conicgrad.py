"""ConicGrad: the best worst-case progress within a cone around the mean gradient."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from gradsurgery.kernels import tasks
from gradsurgery.methods._base import Method, check_number
from gradsurgery.methods._quadratic import best_worst, idle, scale, unscale
from gradsurgery.methods.mgda import shortest_in_hull

__all__ = ["ConicGrad"]


@tasks.step("conicgrad")
def within_the_cone(gram: Tensor, least: float) -> Tensor:
    """Coefficients of the best direction: [..., T, T] -> [..., T].

    Without the cone it is MGDA's. Where that lies outside, d / ‖g_0‖ = c ĝ_0 + u with u orthogonal
    to g_0 and ‖u‖ = sqrt(1 - c²): CAGrad's problem for what of each g_i is orthogonal to g_0.
    """
    mean = gram.mean(-1)
    norm = mean.mean(-1, keepdim=True).clamp(min=0).sqrt()
    divisor = torch.where(norm > 0, norm, 1.0)
    free = shortest_in_hull(gram)
    length = (free * (gram @ free[..., None])[..., 0]).sum(-1, keepdim=True).clamp(min=0).sqrt()
    inside = (length > 1e-12 * norm) & (
        (free * mean).sum(-1, keepdim=True) >= least * norm * length
    )
    cosines, norms = scale(gram)
    most = norms.amax(-1, keepdim=True)
    angle = unscale(mean, norms) / divisor
    orthogonal = cosines - angle[..., :, None] * angle[..., None, :]
    one = torch.where(norms > 0, most / torch.where(norms > 0, norms, 1.0), 1.0)
    radius = torch.full_like(norm[..., 0], max(1 - least * least, 0.0) ** 0.5)
    b = idle(least * angle, norms > 0, one, radius)
    z = best_worst(orthogonal, b, one, radius)
    sideways = (z * (orthogonal @ z[..., None])[..., 0]).sum(-1, keepdim=True).clamp(min=0)
    total = (least * least + sideways).sqrt()
    total = torch.where(total > 0, total, 1.0)
    share = (least - (z * angle).sum(-1, keepdim=True)) / total
    edge = share / gram.shape[-1] + norm * unscale(z, norms) / total
    chosen = torch.where(inside, free * norm / torch.where(length > 0, length, 1.0), edge)
    return torch.where(norm > 0, chosen, 1 / gram.shape[-1])


class ConicGrad(Method):
    """max over d of min_i g_i·d, where cos(d, g_0) >= c and ‖d‖ = ‖g_0‖, g_0 the mean gradient.

    c near 1 is the mean; c = 0 lets d go wherever it does not oppose the mean, most of the time to
    MGDA's direction. The length is the mean's.

    Args:
        c: least cosine with the mean, 0 <= c <= 1.

    Deviations from the paper: the problem is solved exactly, where the paper takes one gradient
    step on the dual variables at every call; c = 0.5, a cone of 60°, is this library's choice.

    Raises:
        TypeError, ValueError: `c` is no number in [0, 1].

    Source: Hassanpour et al., arXiv 2502.00217, section 3 (the constrained problem).

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

    def _solve(
        self,
        gram: Tensor,
        losses: Tensor | None,
        generator: torch.Generator | None,
        resolution: float,
    ) -> Tensor:
        return tasks.run("conicgrad", gram, numbers=(self.c,))
