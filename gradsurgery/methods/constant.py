"""Given weights: scalarization."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from gradsurgery.methods._base import Method, check_number

__all__ = ["Constant"]


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
    one_backward = True

    def __init__(self, weights: Sequence[float] | None = None) -> None:
        if weights is not None:
            weights = tuple(weights)
            for weight in weights:
                check_number("weights", weight)
            if not weights or not all(map(math.isfinite, weights)):
                raise ValueError(f"weights must be finite, one for each task; got {weights!r}")
        self.weights_ = weights

    def __repr__(self) -> str:
        return f"Constant(weights={self.weights_!r})"

    def check(self, shape: torch.Size) -> None:
        if self.weights_ is not None and shape[-1] != len(self.weights_):
            raise ValueError(f"Constant has {len(self.weights_)} weights for {shape[-1]} tasks")

    def _solve(
        self,
        gram: Tensor,
        losses: Tensor | None,
        generator: torch.Generator | None,
        resolution: float,
    ) -> Tensor:
        if self.weights_ is None:
            return gram.new_ones(gram.shape[:-1])
        given = torch.tensor(self.weights_, dtype=torch.float64)
        return given.to(gram.device, non_blocking=True).expand(gram.shape[:-1]).clone()
