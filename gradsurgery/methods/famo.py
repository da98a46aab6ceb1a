"""FAMO: task weights that make all losses fall at the same relative rate."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from gradsurgery.methods._base import check_number
from gradsurgery.methods._running import Adam, RunningMethod, softmax_of, there_of

__all__ = ["FAMO"]

_LEAST = 1e-8


class FAMO(RunningMethod):
    """Fast Adaptive Multitask Optimization: one backward pass, weights from the losses' logarithms.

    With z = softmax(ξ): w_t = (z_t / ℓ_t) / Σ_s (z_s / ℓ_s). Then ξ goes down the gradient of
    Σ_t z_t (log ℓ_t before the step - log ℓ_t after it), by Adam with weight decay γ.

    A factor that all losses share, a loss scaler's for one, cancels out, also where it changes.
    Losses must be positive: where one can fall below 0, add a constant to it. A negative loss gives
    NaN, as in the authors' code.

    Args:
        lr: Adam's learning rate of ξ.
        gamma: γ. (The authors' code has had 0.01 and 1e-5.)

    Deviations from the paper: it evaluates the losses after the step on the same batch, which costs
    another forward pass. Here the next call's losses, of the next batch, are taken, unless
    `update` was given better ones in between. The authors add 1e-8 to every loss; here what is
    within 1e-8 of 0 counts as 1e-8, as an addition would not let a common factor cancel.

    Raises:
        TypeError, ValueError: `lr` or `gamma` is no finite number of at least 0; the number of
            tasks changes.

    Source: Liu et al., arXiv 2306.03792, algorithm 1, with Adam and the defaults of algorithm 2.

    Example:
        >>> import torch
        >>> FAMO().weights(torch.eye(2), losses=torch.tensor([1.0, 4.0]))
        tensor([0.8000, 0.2000], dtype=torch.float64)
    """

    name: ClassVar[str] = "famo"
    reads_gram = False
    reads_losses = True
    known_beforehand = True
    _fields: ClassVar[dict[str, int]] = {"logits": 1, "before": 1, **Adam.fields}
    _start: ClassVar[dict[str, float]] = {"before": math.nan}

    def __init__(self, lr: float = 0.025, gamma: float = 1e-3) -> None:
        super().__init__()
        for name, value in (("lr", lr), ("gamma", gamma)):
            check_number(name, value)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and at least 0; got {value!r}")
        self.lr, self.gamma = lr, gamma

    @torch.no_grad()
    def update(self, losses: Tensor) -> None:
        """Move ξ by the losses of the last batch after the step, as the paper does.

        Args:
            losses: [..., T], times the same loss scale or none. Where gradients are averaged over
                processes, the losses' means over them: every process needs the same weights.

        Raises:
            RuntimeError: there was no call of `weights` before.
            ValueError: another number of losses.
        """
        if "before" not in self._state:
            raise RuntimeError(
                "update compares with the losses of a call of weights: call it first"
            )
        before = self._state["before"]
        if losses.shape[-1:] != before.shape[-1:]:
            raise ValueError(
                f"losses must be [..., T] with T = {before.shape[-1]}; got {list(losses.shape)}"
            )
        self._follow(_logs(losses.detach().to(before)))
        # Nothing left to compare with: the next call only notes its losses.
        before.fill_(torch.nan)

    def _follow(self, logs: Tensor) -> None:
        state = self._state
        z = state["logits"].softmax(-1)
        fall = state["before"] - logs
        gradient = z * (fall - (z * fall).sum(-1, keepdim=True))
        logits, adam = Adam.step(state, state["logits"], gradient, self.lr, self.gamma)
        self._move(fall.isfinite().all(-1), logits=logits, **adam)

    def solve(
        self,
        gram: Tensor,
        losses: Tensor | None,
        generator: torch.Generator | None,
        relative_error: float,
    ) -> Tensor:
        assert losses is not None
        state = self._begin(gram)
        logs = _logs(losses)
        there, valid = there_of(losses)
        # Also a negative loss, which has no logarithm, is a mistake that must show.
        valid = valid & ~(there & logs.isnan()).any(-1, keepdim=True)
        logs = torch.where(valid, logs, torch.nan)
        self._follow(logs)
        self._move(logs.isfinite().all(-1), before=logs)
        # (z / ℓ) / Σ (z / ℓ), in logarithms.
        return softmax_of(state["logits"].log_softmax(-1) - logs, there, valid)


def _logs(losses: Tensor) -> Tensor:
    """log ℓ, not finite where ℓ is not or is negative by more than rounding."""
    return torch.where(losses >= -_LEAST, losses.clamp(min=_LEAST), torch.nan).log()
