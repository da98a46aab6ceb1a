"""Dynamic weight average: more weight for losses that fall slowly."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from gradsurgery.methods._base import check_number
from gradsurgery.methods._running import RunningMethod, softmax_of, there_of

__all__ = ["DWA"]


class DWA(RunningMethod):
    """w = T softmax(r / temperature), r_t = mean loss of the last period over that before it.

    Until two periods are over r = 1, which gives the plain sum.

    Args:
        temperature: the larger, the more even the weights.
        period: how many calls a period has; an epoch in the paper, so set it to `len(loader)`.

    A loss scaler's factor cancels out of r only where it is the same in both periods.

    Raises:
        TypeError, ValueError: a temperature that is not positive, a period that is no whole number
            of at least 1; the number of tasks changes.

    Source: Liu et al., "End-to-End Multi-Task Learning with Attention", arXiv 1803.10704, eq. 7.

    Example:
        >>> import torch
        >>> method = DWA(period=1)
        >>> for step in range(3):
        ...     w = method.weights(torch.eye(2), losses=torch.tensor([1.0, 2.0 / (step + 1)]))
        >>> w
        tensor([1.1244, 0.8756], dtype=torch.float64)
    """

    name: ClassVar[str] = "dwa"
    reads_gram = False
    reads_losses = True
    known_beforehand = True
    _fields: ClassVar[dict[str, int]] = {"total": 1, "calls": 1, "last": 1, "earlier": 1}
    _start: ClassVar[dict[str, float]] = {"last": math.nan, "earlier": math.nan}

    def __init__(self, temperature: float = 2.0, period: int = 100) -> None:
        super().__init__()
        check_number("temperature", temperature)
        if not temperature > 0:
            raise ValueError(f"temperature must be positive; got {temperature!r}")
        if isinstance(period, bool) or not isinstance(period, int):
            raise TypeError(f"period must be an int; got {period!r}")
        if period < 1:
            raise ValueError(f"period must be at least 1; got {period}")
        self.temperature, self.period = temperature, period

    def solve(
        self,
        gram: Tensor,
        losses: Tensor | None,
        generator: torch.Generator | None,
        relative_error: float,
    ) -> Tensor:
        assert losses is not None
        state = self._begin(gram)
        there, valid = there_of(losses)
        ratio = state["last"] / state["earlier"]
        # A mean loss of 0 has no relative change.
        ratio = torch.where(ratio.isfinite(), ratio, 1.0)
        count = there.sum(-1, keepdim=True)
        weights = count * softmax_of(ratio / self.temperature, there, valid)
        total, calls = state["total"] + losses, state["calls"] + 1
        over = calls >= self.period
        self._move(
            losses.isfinite().all(-1),
            earlier=torch.where(over, state["last"], state["earlier"]),
            last=torch.where(over, total / calls, state["last"]),
            total=torch.where(over, 0.0, total),
            calls=torch.where(over, 0.0, calls),
        )
        return weights
