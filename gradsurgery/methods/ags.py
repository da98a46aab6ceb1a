"""Adaptive Gradient Surgery: PCGrad, rescaled to the length of the plain sum."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from gradsurgery.kernels import tasks
from gradsurgery.methods._base import Method, check_number
from gradsurgery.methods._projection import divide_or_zero, draw_orders
from gradsurgery.methods.pcgrad import project_conflicts

__all__ = ["AGS"]


class AGS(Method):
    """Adaptive Gradient Surgery: conflicts projected away, the plain sum's norm kept.

    With w from the projections (`PCGrad`, but with one random order per step that every task
    uses, as in the authors' script), w ← w · sqrt(1ᵀM1 / wᵀMw), so ‖Gᵀw‖ = ‖Σ_t g_t‖.

    Where nothing conflicts w = 1 to the bit, which is what `Sum` gives. Two tasks with equal norms
    also give the plain sum: AGS changes the direction only where norms differ.

    Args:
        max_scale: upper limit of the rescale factor, which grows without bound as two gradients
            come to oppose each other. None: no limit, the published behaviour. (A limit below 1
            shortens every gradient.)

    Deviation from the paper: where the projected gradients cancel (wᵀMw is within the rounding of
    its terms) only noise is left, and it is not scaled up to full length.

    Raises:
        ValueError: `max_scale` is not positive.

    Source: SLAM-AGS, arXiv 2511.14639, and the authors' training script.

    Example:
        >>> import torch
        >>> AGS().weights(torch.tensor([[1.0, -1.0], [-1.0, 4.0]]))
        tensor([1.5119, 0.9449], dtype=torch.float64)
    """

    name: ClassVar[str] = "ags"

    def __init__(self, max_scale: float | None = None) -> None:
        check_max_scale(max_scale)
        self.max_scale = max_scale

    def solve(
        self,
        gram: Tensor,
        losses: Tensor | None,
        generator: torch.Generator | None,
        relative_error: float,
    ) -> Tensor:
        orders = draw_orders(gram.shape[:-1], gram.device, shared=True, generator=generator)
        limit = math.inf if self.max_scale is None else self.max_scale
        return tasks.run("ags", gram, orders, numbers=(limit, noise_of(relative_error)))


def check_max_scale(max_scale: float | None) -> None:
    """Raise TypeError or ValueError where it is neither None nor a positive number."""
    if max_scale is not None:
        check_number("max_scale", max_scale)
        if not max_scale > 0:
            raise ValueError(f"max_scale must be positive or None; got {max_scale!r}")


def noise_of(relative_error: float) -> float:
    """How small wᵀMw may be beside its terms w_i M_ij w_j, each good to `relative_error`."""
    return 4 * relative_error


@tasks.step("ags")
def _project_and_rescale(gram: Tensor, orders: Tensor, limit: float, noise: float) -> Tensor:
    return rescale(gram, project_conflicts(gram, orders), limit, noise)


@tasks.step("rescale")
def rescale(gram: Tensor, weights: Tensor, limit: float, noise: float) -> Tensor:
    """w · min(sqrt(1ᵀM1 / wᵀMw), limit): [..., T, T], [..., T] -> [..., T].

    Where wᵀMw is within `noise` of its terms nothing is left to be scaled, and w stays.
    """
    before = _square_norm(gram, torch.ones_like(weights))
    after = _square_norm(gram, weights)
    norms = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    scale = divide_or_zero(before.clamp(min=0), after).sqrt().clamp(max=limit)
    left = after > noise * (weights.abs() * norms).sum(-1).square()
    return weights * torch.where(left, scale, 1.0)[..., None]


def _square_norm(gram: Tensor, weights: Tensor) -> Tensor:
    """‖Gᵀw‖² = wᵀMw: [..., T, T], [..., T] -> [...]."""
    return (weights * (gram @ weights[..., None]).squeeze(-1)).sum(-1)
