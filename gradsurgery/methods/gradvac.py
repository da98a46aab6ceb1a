"""GradVac: pull each pair of gradients up to the cosine that the pair usually has."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradsurgery.kernels import tasks
from gradsurgery.methods._base import Method, check_number
from gradsurgery.methods._projection import divide_or_zero, draw_orders, visits

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


class GradVac(Method):
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

    def __init__(self, beta: float = 1e-2) -> None:
        check_number("beta", beta)
        if not 0 < beta <= 1:
            raise ValueError(f"beta must be in (0, 1]; got {beta!r}")
        self.beta = beta
        self._target: Tensor | None = None

    def check(self, shape: torch.Size) -> None:
        if self._target is not None and self._target.shape[:-1] != shape:
            raise ValueError(
                f"GradVac keeps a target cosine for every pair of tasks: it has seen tasks of "
                f"shape {list(self._target.shape[:-1])} and now gets {list(shape)}; "
                f"use a new GradVac() where the number of tasks changes"
            )

    def _solve(
        self,
        gram: Tensor,
        losses: Tensor | None,
        generator: torch.Generator | None,
        resolution: float,
    ) -> Tensor:
        orders = draw_orders(gram.shape[:-1], gram.device, shared=False, generator=generator)
        if self._target is None:
            self._target = torch.zeros_like(gram)
        self._target = self._target.to(gram.device, non_blocking=True)
        # In place: a captured CUDA graph reads and writes the same memory at every replay.
        return tasks.run_moving(
            "vaccinate", gram, self._target, orders, numbers=(self.beta, _MAX_TARGET_COSINE)
        )

    def state_dict(self) -> dict[str, Any]:
        # Text, and always there: distributed checkpoints load only entries, down to the elements
        # of a list, that they find in the optimizer they load into, which knows no T before a step.
        return {"target": "" if self._target is None else json.dumps(self._target.tolist())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        target = state.get("target") or "[]"
        # Version 1 of the state had the list itself.
        values = json.loads(target) if isinstance(target, str) else target
        self._target = torch.tensor(values, dtype=torch.float64) if values else None
