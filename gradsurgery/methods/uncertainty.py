"""Uncertainty weighting: each task's noise is learned, and its loss divided by it."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from gradsurgery.methods._base import check_number
from gradsurgery.methods._running import Adam, RunningMethod, there_of

__all__ = ["Uncertainty"]


class Uncertainty(RunningMethod):
    """Homoscedastic uncertainty: L = Σ_t (exp(-s_t) L_t + s_t) / 2, s_t = log σ_t² learned.

    So w_t = exp(-s_t) / 2, and s_t follows ∂L/∂s_t = (1 - exp(-s_t) L_t) / 2 by an Adam of its own.
    Where the losses stand still, w_t comes to 1 / (2 L_t). A task alone is weighted as well.

    Args:
        lr: Adam's learning rate of s.
        start: s_t at the beginning.

    Deviations from the paper: s is not among the model's parameters, so the wrapped optimizer does
    not train it; the loss of classification tasks, whose factor there is exp(-s), gets the same
    factor as the others, which shifts s by log 2.

    A loss scaler's factor is taken for the losses' own: s has to grow by its logarithm first. Use
    bfloat16, which needs no scaler.

    Raises:
        TypeError, ValueError: `lr` is no finite number of at least 0, `start` not finite; the
            number of tasks changes.

    Source: Kendall et al., arXiv 1705.07115, equation 7.

    Example:
        >>> import torch
        >>> Uncertainty().weights(torch.eye(2), losses=torch.tensor([1.0, 4.0]))
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """

    name: ClassVar[str] = "uncertainty"
    reads_gram = False
    reads_losses = True
    known_beforehand = True
    _fields: ClassVar[dict[str, int]] = {"log_variance": 1, **Adam.fields}

    def __init__(self, lr: float = 1e-3, start: float = 0.0) -> None:
        super().__init__()
        for name, value in (("lr", lr), ("start", start)):
            check_number(name, value)
            if not math.isfinite(value):
                raise ValueError(f"{name} must be finite; got {value!r}")
        if lr < 0:
            raise ValueError(f"lr must be at least 0; got {lr!r}")
        self.lr, self.start = lr, start

    def starts(self) -> dict[str, float]:
        return {"log_variance": self.start}

    def solve(
        self,
        gram: Tensor,
        losses: Tensor | None,
        generator: torch.Generator | None,
        relative_error: float,
    ) -> Tensor:
        assert losses is not None
        state = self._begin(gram)
        _, valid = there_of(losses)
        precision = (-state["log_variance"]).exp()
        moved, adam = Adam.step(state, state["log_variance"], (1 - precision * losses) / 2, self.lr)
        self._move(losses.isfinite().all(-1), log_variance=moved, **adam)
        return torch.where(valid, precision / 2, torch.nan)
