"""Smooth Tchebycheff scalarization: the gradient of a soft maximum of the losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from gradsurgery.methods._base import Method, check_number

__all__ = ["STCH"]


class STCH(Method):
    """The gradient of μ log Σ_t exp(λ_t (L_t - z_t) / μ): w_t = λ_t softmax(λ (L - z) / μ)_t.

    As μ goes to 0 only the worst task counts (the Tchebycheff scalarization); with a large μ all
    count alike. μ is on the scale of the losses: a loss scaler's factor has to be in it.

    Args:
        mu: μ, the smoothness.
        preferences: λ, T positive numbers. None: 1 for each task, the paper's uniform preference
            1/T with μ as much larger.
        ideal: z, T numbers, the best values that the losses can have. None: 0.

    Raises:
        TypeError, ValueError: `mu` or a preference is not positive; another number of tasks.

    Source: Lin et al., "Smooth Tchebycheff Scalarization for Multi-Objective Optimization",
    arXiv 2402.19078, equation 7.

    Example:
        >>> import torch
        >>> STCH(mu=1.0).weights(torch.eye(2), losses=torch.tensor([0.0, 1.0]))
        tensor([0.2689, 0.7311], dtype=torch.float64)
    """

    name: ClassVar[str] = "stch"
    reads_gram = False
    reads_losses = True
    one_backward = True

    def __init__(
        self,
        mu: float = 1.0,
        preferences: Sequence[float] | None = None,
        ideal: Sequence[float] | None = None,
    ) -> None:
        check_number("mu", mu)
        if not mu > 0:
            raise ValueError(f"mu must be positive; got {mu!r}")
        self.mu = mu
        self.preferences = _numbers("preferences", preferences)
        self.ideal = _numbers("ideal", ideal)
        if self.preferences is not None and not all(value > 0 for value in self.preferences):
            raise ValueError(f"preferences must be positive; got {self.preferences!r}")

    def check(self, shape: torch.Size) -> None:
        for name, values in (("preferences", self.preferences), ("ideal", self.ideal)):
            if values is not None and len(values) != shape[-1]:
                raise ValueError(f"STCH has {len(values)} {name} for {shape[-1]} tasks")

    def _solve(
        self,
        gram: Tensor,
        losses: Tensor | None,
        generator: torch.Generator | None,
        resolution: float,
    ) -> Tensor:
        assert losses is not None
        if self.ideal is not None:
            losses = losses - _on_device_of(losses, self.ideal)
        if self.preferences is None:
            return (losses / self.mu).softmax(-1)
        preferences = _on_device_of(losses, self.preferences)
        return preferences * (preferences * losses / self.mu).softmax(-1)


def _on_device_of(losses: Tensor, values: tuple[float, ...]) -> Tensor:
    # A few bytes from the host: queued, not waited for.
    return torch.tensor(values, dtype=torch.float64).to(losses.device, non_blocking=True)


def _numbers(name: str, values: Sequence[float] | None) -> tuple[float, ...] | None:
    if values is None:
        return None
    given = tuple(values)
    for value in given:
        check_number(name, value)
    if not given or not all(map(math.isfinite, given)):
        raise ValueError(f"{name} must be finite, one for each task; got {given!r}")
    return given
