"""Takes back a call of `backward` that fails half-way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from gradsurgery.methods import Method

__all__ = ["Undo"]


class Undo:
    """What a call is about to change: p.grad, the task order, the method's running state.

    Args:
        leaves: id -> tensor whose `grad` the call sets; it is None from here on.
        order: the generator of the task order.
        method: the method.
    """

    def __init__(
        self, leaves: Mapping[int, Tensor], order: torch.Generator, method: Method
    ) -> None:
        self._leaves, self._order, self._method = leaves, order, method
        self._drawn, self._state = order.get_state(), method.snapshot()
        self._sums: list[Tensor] = []
        self._version = -1
        self._earlier = {key: leaf.grad for key, leaf in leaves.items()}

    def clear(self) -> None:
        """No p.grad, for a start."""
        for leaf in self._leaves.values():
            leaf.grad = None

    def add_earlier(self, foreign: Iterable[int] = ()) -> None:
        """A gradient that was there is added to, in place, as autograd does; None stays None.

        Args:
            foreign: ids of leaves that only get back what they had.
        """
        terms: list[Tensor] = []
        for key, leaf in self._leaves.items():
            there, new = self._earlier[key], leaf.grad
            if key in foreign:
                leaf.grad = there
            elif there is None:
                continue
            elif new is not None and there.layout != new.layout:
                # A sparse gradient becomes dense by the addition, also in autograd.
                leaf.grad = new + there
            else:
                leaf.grad = there
                if new is not None:
                    self._sums.append(there)
                    terms.append(new)
        if terms:
            self._version = self._sums[-1]._version
            torch._foreach_add_(self._sums, terms)

    def roll_back(self) -> None:
        """Everything as if the call had not happened."""
        if self._sums and self._version not in (-1, self._sums[-1]._version):
            # An interrupt that had to wait for the addition: the call has happened.
            return
        for key, leaf in self._leaves.items():
            leaf.grad = self._earlier[key]
        self._order.set_state(self._drawn)
        self._method.restore(self._state)
