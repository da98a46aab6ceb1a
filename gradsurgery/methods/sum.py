"""The plain sum: what `(loss_a + loss_b).backward()` does."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from gradsurgery.methods._base import Method

__all__ = ["Sum"]


class Sum(Method):
    """w_t = 1: no surgery. The baseline that any gain has to be measured against.

    Example:
        >>> import torch
        >>> Sum().weights(torch.eye(3))
        tensor([1., 1., 1.], dtype=torch.float64)
    """

    name: ClassVar[str] = "sum"
    reads_gram = False

    def solve(
        self,
        gram: Tensor,
        losses: Tensor | None,
        generator: torch.Generator | None,
        relative_error: float,
    ) -> Tensor:
        return torch.ones(gram.shape[:-1], dtype=torch.float64, device=gram.device)
