"""FAMO: task weights that make all losses fall at the same relative rate."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from gradsurgery.methods._base import check_number
from gradsurgery.methods._running import Adam, RunningMethod

__all__ = ["FAMO"]

_LEAST = 1e-8


class FAMO(RunningMethod):
    """Fast Adaptive Multitask Optimization: one backward pass, weights from the losses' logarithms.

    With z = softmax(ξ): w_t = (z_t / ℓ_t) / Σ_s (z_s / ℓ_s). Then ξ goes down the gradient of
    Σ_t z_t (log ℓ_t before the step - log ℓ_t after it), by Adam with weight decay γ.

    Losses must be positive; what is below 1e-8 counts as 1e-8. A factor that all losses share, a
    loss scaler's for one, cancels out, also where it changes.

    Args:
        lr: Adam's learning rate of ξ.
        gamma: γ.

    Deviation from the paper: it evaluates the losses after the step on the same batch, which costs
    another forward pass. Here the next call's losses, of the next batch, are taken, unless
    `update` was given better ones in between.

    Raises:
        ValueError: `lr` or `gamma` is negative, or the number of tasks changes.

    Source: Liu et al., arXiv 2306.03792, algorithm 1, with the defaults of the authors' code.

    Example:
        >>> import torch
        >>> FAMO().weights(torch.eye(2), losses=torch.tensor([1.0, 4.0]))
        tensor([0.8000, 0.2000], dtype=torch.float64)
    """

    name: ClassVar[str] = "famo"
    reads_gram = False
    reads_losses = True
    one_backward = True
    _fields: ClassVar[dict[str, int]] = {"logits": 1, "before": 1, **Adam.fields}

    def __init__(self, lr: float = 0.025, gamma: float = 0.01) -> None:
        super().__init__()
        for name, value in (("lr", lr), ("gamma", gamma)):
            check_number(name, value)
            if value < 0:
                raise ValueError(f"{name} must be at least 0; got {value!r}")
        self.lr, self.gamma = lr, gamma

    @torch.no_grad()
    def update(self, losses: Tensor) -> None:
        """Move ξ by the losses [..., T] of the last call's batch after the optimizer's step.

        Raises:
            RuntimeError: there was no call of `weights` before.
        """
        if "before" not in self._state:
            raise RuntimeError(
                "update compares with the losses of a call of weights: call it first"
            )
        logs = losses.detach().to(self._state["before"]).clamp(min=_LEAST).log()
        self._follow(logs)
        # Nothing left to compare with: the next call only notes its losses.
        self._state["before"].fill_(torch.nan)

    def _follow(self, logs: Tensor) -> None:
        state = self._state
        z = state["logits"].softmax(-1)
        fall = state["before"] - logs
        gradient = z * (fall - (z * fall).sum(-1, keepdim=True))
        logits, adam = Adam.step(state, state["logits"], gradient, self.lr, self.gamma)
        self._move(fall.isfinite().all(-1), logits=logits, **adam)

    def _solve(
        self,
        gram: Tensor,
        losses: Tensor | None,
        generator: torch.Generator | None,
        resolution: float,
    ) -> Tensor:
        assert losses is not None
        state = self._begin(gram, before=torch.nan)
        floored = losses.clamp(min=_LEAST)
        finite = losses.isfinite().all(-1)
        self._follow(floored.log())
        self._move(finite, before=floored.log())
        # (z / ℓ) / Σ (z / ℓ), in logarithms.
        weights = (state["logits"].log_softmax(-1) - floored.log()).softmax(-1)
        return torch.where(finite[..., None], weights, torch.nan)
