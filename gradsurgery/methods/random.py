"""Random loss weighting: a baseline that methods should beat."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from gradsurgery.methods._base import Method

__all__ = ["Random"]


class Random(Method):
    """RLW: w = softmax(ξ), ξ ~ N(0, I), drawn anew at every step.

    It asks for no gradients, so the plugin runs one backward pass. The noise comes from the host's
    generator, so that every device sees the same; a CUDA graph cannot capture that.

    Source: Lin et al., "Reasonable Effectiveness of Random Weighting", arXiv 2111.10603, with the
    normal distribution out of those that it tries.

    Example:
        >>> import torch
        >>> w = Random().weights(torch.eye(3), generator=torch.Generator().manual_seed(0))
        >>> round(float(w.sum()), 6)
        1.0
    """

    name: ClassVar[str] = "random"
    reads_gram = False
    known_beforehand = True

    def solve(
        self,
        gram: Tensor,
        losses: Tensor | None,
        generator: torch.Generator | None,
        relative_error: float,
    ) -> Tensor:
        source = generator.device if generator is not None else torch.device("cpu")
        noise = torch.randn(
            gram.shape[:-1], generator=generator, dtype=torch.float64, device=source
        )
        # A few bytes from the host: queued, not waited for.
        return noise.softmax(-1).to(gram.device, non_blocking=True)
