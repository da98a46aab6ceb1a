"""Any method, with the norm-preserving rescale of AGS."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from gradsurgery.kernels import tasks
from gradsurgery.methods._base import Method
from gradsurgery.methods._wrapping import Wrapping
from gradsurgery.methods.ags import check_max_scale, noise_of

__all__ = ["Rescaled"]


class Rescaled(Wrapping):
    """Another method's direction, with the length that the plain sum has.

    w ← w · sqrt(1ᵀM1 / wᵀMw) as in `AGS`, which is PCGrad (with one order for all tasks) so
    rescaled. Of a method that takes no gradients it measures the Gram matrix all the same.

    Args:
        method: a name out of `available()`, or an instance.
        max_scale: as of `AGS`.

    Raises:
        TypeError, ValueError: as of `resolve` and of `AGS`.

    Source: SLAM-AGS, arXiv 2511.14639, for the rescale.

    Example:
        >>> import torch
        >>> from gradsurgery.methods import Mean
        >>> Rescaled(Mean()).weights(torch.eye(2))
        tensor([1., 1.], dtype=torch.float64)
    """

    name: ClassVar[str] = "rescaled"

    def __init__(self, method: str | Method, max_scale: float | None = None) -> None:
        check_max_scale(max_scale)
        super().__init__(method)
        self.max_scale = max_scale
        self.reads_losses = self.method.reads_losses

    def solve(
        self,
        gram: Tensor,
        losses: Tensor | None,
        generator: torch.Generator | None,
        relative_error: float,
    ) -> Tensor:
        if not self.method.reads_gram:
            # Its running state must not move at a step whose M is not finite, which it cannot see.
            known = gram.isfinite().all(-1).all(-1, keepdim=True)
            told = gram.new_zeros(gram.shape[:-1]) if losses is None else losses
            losses = torch.where(known, told, torch.nan)
        weights = self.method.solve(gram, losses, generator, relative_error)
        limit = math.inf if self.max_scale is None else self.max_scale
        return tasks.run("rescale", gram, weights, numbers=(limit, noise_of(relative_error)))
