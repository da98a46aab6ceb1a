"""The plain mean of the task gradients."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from gradsurgery.methods._base import Method

__all__ = ["Mean"]


class Mean(Method):
    """w_t = 1/T: no surgery, and a length that does not grow with the number of tasks.

    Example:
        >>> import torch
        >>> Mean().weights(torch.eye(4))
        tensor([0.2500, 0.2500, 0.2500, 0.2500], dtype=torch.float64)
    """

    name: ClassVar[str] = "mean"
    reads_gram = False

    def solve(
        self,
        gram: Tensor,
        losses: Tensor | None,
        generator: torch.Generator | None,
        relative_error: float,
    ) -> Tensor:
        return torch.full(
            gram.shape[:-1], 1 / gram.shape[-1], dtype=torch.float64, device=gram.device
        )
