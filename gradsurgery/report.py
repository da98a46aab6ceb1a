"""What a surgery saw and did, once (SurgeryReport) and over a run (History)."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from gradsurgery import _history, _plot, _tables

if TYPE_CHECKING:
    from gradsurgery.optimizer import AdaptiveGradientSurgery

__all__ = ["History", "SurgeryReport"]


@dataclass(frozen=True)
class SurgeryReport:
    """What one surgery saw and did. Its tensors stay on the device until somebody reads them.

    With `scope="shared"` all of it is about the parameters that two or more tasks reach. With a
    loss scaler the gradients, and so `gram` and `norms`, are those of the scaled losses; cosines,
    `weights`, `scale` and `turned` do not depend on the scale. With `metric="optimizer"` lengths
    and angles are those of that metric. [P, ...]: where the model was operated on in P parts.

    Attributes:
        names: the tasks, in the order of rows and columns below.
        gram: M = G Gᵀ, [T, T] or [P, T, T] float64. NaN for a single task and for methods that
            know w beforehand, where nothing had to be measured.
        weights: w, [T] or [P, T] float64; the combined gradient was Σ_t w_t g_t.
        parts: the P parts of the model, in the order of the first dimension above; empty with
            `granularity="model"`.
    """

    names: tuple[str, ...]
    gram: Tensor
    weights: Tensor
    parts: tuple[str, ...] = ()

    @property
    def norms(self) -> Tensor:
        """‖g_t‖, [T] or [P, T] float64."""
        return self.gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()

    @property
    def cosine(self) -> Tensor:
        """Cosine of each pair of task gradients, shaped as `gram`; 0 where a gradient is zero."""
        norms = self.norms
        lengths = norms[..., :, None] * norms[..., None, :]
        zero = lengths == 0
        return torch.where(zero, 0.0, self.gram / torch.where(zero, 1.0, lengths))

    @property
    def conflicts(self) -> Tensor:
        """The number of pairs of tasks with M_ij < 0: int64, 0-dim or [P]."""
        return (self.gram < 0).triu(diagonal=1).sum((-2, -1))

    @property
    def scale(self) -> Tensor:
        """‖Gᵀw‖ / ‖Σ_t g_t‖, 0-dim or [P]: 2 is twice as long as the plain sum.

        NaN where both are zero, inf where the plain sum alone is.
        """
        plain, combined, _ = self._products()
        return combined.sqrt() / plain.sqrt()

    @property
    def turned(self) -> Tensor:
        """Cosine between Gᵀw and Σ_t g_t, 0-dim or [P]: 1 where the direction is the plain sum's.

        NaN where one of them is zero.
        """
        plain, combined, both = self._products()
        return (both / (plain.sqrt() * combined.sqrt())).clamp(-1, 1)

    def _products(self) -> tuple[Tensor, Tensor, Tensor]:
        """1ᵀM1, wᵀMw and wᵀM1, the first two at least 0."""
        weights = self.weights.to(self.gram.dtype)
        ones = torch.ones_like(weights)
        # The same operations for w and for 1: with w = 1 the results are the same to the bit.
        along = (self.gram @ ones[..., None]).squeeze(-1)
        behind = (self.gram @ weights[..., None]).squeeze(-1)
        return (
            (ones * along).sum(-1).clamp(min=0),
            (weights * behind).sum(-1).clamp(min=0),
            (weights * along).sum(-1),
        )

    def whole(self) -> SurgeryReport:
        """The same without parts: of the model as a whole, exactly, as parts do not overlap.

        Norms, cosines and conflicts are those of the whole gradients. There is no one w: `weights`
        are those of the sum's length along each task, Σ_p w_pt M_p,tt / Σ_p M_p,tt.
        """
        raise NotImplementedError
