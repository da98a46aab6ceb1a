"""Smooth Tchebycheff scalarization: the gradient of a soft maximum of the losses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor

from gradsurgery.methods._base import Method, check_number
from gradsurgery.methods._running import softmax_of, there_of
from gradsurgery.methods.constant import check_numbers, on_device, picked

__all__ = ["STCH"]


class STCH(Method):
    """The gradient of μ log Σ_t exp(λ_t (L_t - z_t) / μ): w_t = λ_t softmax(λ (L - z) / μ)_t.

    As μ goes to 0 only the worst task counts (the Tchebycheff scalarization); with a large μ all
    count alike.

    μ and z are on the scale of the losses. A loss scaler multiplies those, so that next to its
    factor μ is nothing: use bfloat16, which needs no scaler.

    Args:
        mu: μ, the smoothness.
        preferences: λ, T positive numbers. None: 1 for each task. With the paper's 1/T and μ/T
            the weights are T times smaller, and the same otherwise.
        ideal: z, T numbers, the best values that the losses can have. None: 0.

    Raises:
        TypeError, ValueError: `mu` or a preference is not positive; another number of tasks.

    Source: Lin et al., "Smooth Tchebycheff Scalarization for Multi-Objective Optimization",
    arXiv 2402.19078, the definition of g^STCH.

    Example:
        >>> import torch
        >>> STCH(mu=1.0).weights(torch.eye(2), losses=torch.tensor([0.0, 1.0]))
        tensor([0.2689, 0.7311], dtype=torch.float64)
    """

    name: ClassVar[str] = "stch"
    reads_gram = False
    reads_losses = True
    known_beforehand = True

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
        self.preferences = check_numbers("preferences", preferences)
        self.ideal = check_numbers("ideal", ideal)
        self._copies: dict[tuple[tuple[float, ...], torch.device], Tensor] = {}
        if self.preferences is not None and not all(value > 0 for value in self.preferences):
            raise ValueError(f"preferences must be positive; got {self.preferences!r}")

    @contextmanager
    def only(self, present: Sequence[int], total: int) -> Iterator[None]:
        whole = self.preferences, self.ideal
        self.preferences, self.ideal = (picked(values, present) for values in whole)
        try:
            yield
        finally:
            self.preferences, self.ideal = whole

    def check(self, shape: torch.Size, *, grow: bool = False) -> None:
        for name, values in (("preferences", self.preferences), ("ideal", self.ideal)):
            if values is not None and len(values) != shape[-1]:
                raise ValueError(f"STCH has {len(values)} {name} for {shape[-1]} tasks")

    def solve(
        self,
        gram: Tensor,
        losses: Tensor | None,
        generator: torch.Generator | None,
        relative_error: float,
    ) -> Tensor:
        assert losses is not None
        there, valid = there_of(losses)
        if self.ideal is not None:
            losses = losses - on_device(self._copies, self.ideal, losses.device)
        if self.preferences is None:
            weights = softmax_of(losses / self.mu, there, valid)
        else:
            preferences = on_device(self._copies, self.preferences, losses.device)
            weights = preferences * softmax_of(preferences * losses / self.mu, there, valid)
        return weights
