"""Given weights: scalarization. And how a method keeps numbers that it is given, T of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor

from gradsurgery.methods._base import Method, check_number

__all__ = ["Constant", "check_numbers", "on_device", "picked"]


def check_numbers(name: str, values: Sequence[float] | None) -> tuple[float, ...] | None:
    """The values as a tuple; TypeError or ValueError where one is no finite number."""
    if values is None:
        return None
    if not isinstance(values, Sequence):
        raise TypeError(f"{name} must be a sequence of numbers; got {values!r}")
    given = tuple(values)
    for value in given:
        check_number(name, value)
    if not given or not all(map(math.isfinite, given)):
        raise ValueError(f"{name} must be finite, one for each task; got {given!r}")
    return given


def picked(values: tuple[float, ...] | None, present: Sequence[int]) -> tuple[float, ...] | None:
    """Those of the tasks that are there."""
    return None if values is None else tuple(values[i] for i in present)


def on_device(
    copies: dict[tuple[tuple[float, ...], torch.device], Tensor],
    values: tuple[float, ...],
    device: torch.device,
) -> Tensor:
    """The values as [T] float64, copied once: a captured CUDA graph can copy nothing."""
    copy = copies.get((values, device))
    if copy is None:
        # A few bytes from the host: queued, not waited for.
        copy = torch.tensor(values, dtype=torch.float64).to(device, non_blocking=True)
        copies[values, device] = copy
    return copy


class Constant(Method):
    """w as given: static task weights, the baseline that deserves to be tuned.

    It asks for no gradients, so the plugin runs one backward pass.

    Args:
        weights: T numbers. None: 1 for each task, the plain sum.

    Raises:
        TypeError, ValueError: weights that are no finite numbers; another number of tasks.

    Example:
        >>> import torch
        >>> Constant((1.0, 0.25)).weights(torch.eye(2))
        tensor([1.0000, 0.2500], dtype=torch.float64)
    """

    name: ClassVar[str] = "constant"
    reads_gram = False
    known_beforehand = True

    def __init__(self, weights: Sequence[float] | None = None) -> None:
        # `weights` is the method.
        self.weights_ = check_numbers("weights", weights)
        self._copies: dict[tuple[tuple[float, ...], torch.device], Tensor] = {}

    def __repr__(self) -> str:
        return f"Constant(weights={self.weights_!r})"

    @contextmanager
    def only(self, present: Sequence[int], total: int) -> Iterator[None]:
        whole = self.weights_
        self.weights_ = picked(whole, present)
        try:
            yield
        finally:
            self.weights_ = whole

    def check(self, shape: torch.Size, *, grow: bool = False) -> None:
        if self.weights_ is not None and shape[-1] != len(self.weights_):
            raise ValueError(f"Constant has {len(self.weights_)} weights for {shape[-1]} tasks")

    def solve(
        self,
        gram: Tensor,
        losses: Tensor | None,
        generator: torch.Generator | None,
        relative_error: float,
    ) -> Tensor:
        if self.weights_ is None:
            return torch.ones(gram.shape[:-1], dtype=torch.float64, device=gram.device)
        given = on_device(self._copies, self.weights_, gram.device)
        return given.expand(gram.shape[:-1]).clone()
