"""Takes back a call of `backward` that fails half-way."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor

from gradsurgery.weights.solver import Solver

__all__ = ["Transaction"]

_Result = TypeVar("_Result")


class Transaction:
    """Every leaf's `grad` begins as None, and a call that fails changes nothing.

    In the end a gradient that was there is added to, as autograd does. Where the call raises,
    p.grad, the order in which tasks meet and the method's running state are as before.

    Args:
        leaves: the tensors whose `grad` the call sets.
        solver: of the call.
    """

    def __init__(self, leaves: Iterable[Tensor], solver: Solver) -> None:
        self._leaves = {id(leaf): leaf for leaf in leaves}
        self._solver, self._taken = solver, solver.snapshot()
        self._sums: list[Tensor] = []
        self._version = -1
        self._earlier = {key: leaf.grad for key, leaf in self._leaves.items()}

    def run(self, body: Callable[[], _Result]) -> _Result:
        """Do it all or nothing.

        One `try` holds every line, so that an interrupt finds none outside of it.
        """
        try:
            for leaf in self._leaves.values():
                leaf.grad = None
            result = body()
            self._add_earlier()
        except BaseException:
            self._roll_back()
            raise
        return result

    def _add_earlier(self) -> None:
        """A gradient that was there is added to, in place; None stays None."""
        terms: list[Tensor] = []
        for key, leaf in self._leaves.items():
            there, new = self._earlier[key], leaf.grad
            if there is None:
                continue
            if new is not None and there.layout != new.layout:
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

    def _roll_back(self) -> None:
        if self._sums and self._version not in (-1, self._sums[-1]._version):
            # An interrupt that had to wait for the addition: the call has happened.
            return
        for key, leaf in self._leaves.items():
            leaf.grad = self._earlier[key]
        self._solver.restore(self._taken)
