"""The weights of the last solve, for the steps until the next one (`every=k`)."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

__all__ = ["Schedule"]


class Schedule:
    """w from one solve to the next.

    Args:
        every: how many steps one solve is good for; 1: its own only, and nothing is kept.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._names: tuple[str, ...] = ()
        self._weights: Tensor | None = None
        self._since = 0

    def known(self, names: tuple[str, ...]) -> Tensor | None:
        """The weights for a step of these tasks; None where a solve is due."""
        due = self._since + 1 >= self._every or names != self._names
        return None if due else self._weights

    def solved(self, names: tuple[str, ...], weights: Tensor) -> None:
        """A solve has happened.

        Weights that are not finite are not kept (GradScaler skips such a step): those before them
        stay, and before the first the plain sum's.
        """
        if self._every == 1:
            return
        before = self._weights
        if before is None or names != self._names:
            before = torch.ones_like(weights)
        before = before.to(weights.device, non_blocking=True)
        self._weights = torch.where(weights.isfinite().all(), weights, before)
        self._names, self._since = names, 0

    def reused(self) -> None:
        """A step has taken the kept weights."""
        self._since += self._weights is not None

    @property
    def age(self) -> int:
        """How many steps have taken the kept weights."""
        return self._since

    def snapshot(self) -> dict[str, Any]:
        """What `restore` needs."""
        return dict(vars(self))

    def restore(self, taken: dict[str, Any]) -> None:
        """Be what `snapshot` saw."""
        vars(self).update(taken)

    def state_dict(self) -> str:
        """As text, which every checkpoint tool carries along; "" before the first solve."""
        if self._weights is None:
            return ""
        weights = self._weights.tolist()
        return json.dumps({"names": self._names, "weights": weights, "since": self._since})

    def load_state_dict(self, state: str) -> None:
        """Take up what `state_dict` gave."""
        known = json.loads(state) if state else {}
        self._names, self._since = tuple(known.get("names", ())), int(known.get("since", 0))
        values = known.get("weights")
        self._weights = None if values is None else torch.tensor(values, dtype=torch.float64)
