"""GradVac: pull each pair of gradients up to the cosine that the pair usually has."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from gradsurgery.kernels import tasks
from gradsurgery.methods._base import check_number
from gradsurgery.methods._projection import divide_or_zero, draw_orders, visits
from gradsurgery.methods._running import RunningMethod

__all__ = ["GradVac", "vaccinate"]

# The update divides by sqrt(1 - target²), which a pair of parallel tasks drives to 0.
_MAX_TARGET_COSINE = 1 - 1e-6


@tasks.step("vaccinate")
def vaccinate(
    gram: Tensor, orders: Tensor, target: Tensor, beta: float, most: float
) -> tuple[Tensor, Tensor]:
    """Coefficients of the sum of the altered gradients, [..., T], and the new targets."""
    target = target.clone()
    altered = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    altered = altered.clone()
    for partner, column, square, other in visits(gram, orders):
        # ‖ĝ_i‖ from scratch at every step: an update of the last one would gather rounding.
        length = ((altered @ gram) * altered).sum(-1).clamp(min=0).sqrt()
        norm = square.sqrt()
        defined = other & (length > 0) & (norm > 0)
        cosine = divide_or_zero((altered * column).sum(-1), length * norm).clamp(-1, 1)
        wanted = target.gather(-1, partner).squeeze(-1)
        limited = wanted.clamp(-most, most)
        sine = (1 - limited.square()).sqrt()
        pull = limited * (1 - cosine.square()).sqrt() - cosine * sine
        added = divide_or_zero(length * pull, norm * sine)
        added = torch.where(defined & (cosine < wanted), added, 0.0)
        altered.scatter_add_(-1, partner, added[..., None])
        moved = torch.where(defined, wanted + beta * (cosine - wanted), wanted)
        target.scatter_(-1, partner, moved[..., None])
    return altered.sum(-2), target


class GradVac(RunningMethod):
    """Gradient Vaccine: like PCGrad, with a running target cosine φ̂_ij in the place of 0.

    For each i and each j != i in random order, with φ = cos(ĝ_i, g_j): where φ < φ̂_ij,
    ĝ_i ← ĝ_i + ‖ĝ_i‖ (φ̂ sqrt(1-φ²) - φ sqrt(1-φ̂²)) / (‖g_j‖ sqrt(1-φ̂²)) · g_j;
    then φ̂_ij ← (1-β) φ̂_ij + β φ. The combined gradient is Σ_i ĝ_i.

    The targets are state: they are saved and loaded with the optimizer, and are not updated by a
    step whose Gram matrix is not finite (GradScaler will skip that step afterwards).

    Args:
        beta: weight of the newest cosine in the running mean, 0 < beta <= 1.

    Deviations from the paper: a zero gradient has no cosine, so its pairs stay as they are;
    the size of φ̂ is kept under 1 - 1e-6 where the update divides by sqrt(1 - φ̂²).

    Raises:
        ValueError: `beta` is out of range, or the number of tasks differs from earlier calls.

    Source: Wang et al., "Gradient Vaccine", arXiv 2010.05874, algorithm 1.

    Example:
        >>> import torch
        >>> GradVac().weights(torch.tensor([[1.0, -1.0], [-1.0, 4.0]]))
        tensor([2.0000, 1.2500], dtype=torch.float64)
    """

    name: ClassVar[str] = "gradvac"
    _fields: ClassVar[dict[str, int]] = {"target": 2}

    def __init__(self, beta: float = 1e-2) -> None:
        check_number("beta", beta)
        if not 0 < beta <= 1:
            raise ValueError(f"beta must be in (0, 1]; got {beta!r}")
        super().__init__()
        self.beta = beta

    def solve(
        self,
        gram: Tensor,
        losses: Tensor | None,
        generator: torch.Generator | None,
        relative_error: float,
    ) -> Tensor:
        orders = draw_orders(gram.shape[:-1], gram.device, shared=False, generator=generator)
        target = self._begin(gram)["target"]
        return tasks.run_moving(
            "vaccinate", gram, target, orders, numbers=(self.beta, _MAX_TARGET_COSINE)
        )
