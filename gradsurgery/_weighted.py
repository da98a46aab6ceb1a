"""The gradient of Σ_t w_t L_t by one backward pass, where w is known beforehand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["backward_weighted"]


def backward_weighted(
    losses: Sequence[Tensor],
    weights: Tensor,
    plain: Sequence[Tensor],
    weighted: Sequence[Tensor] | None,
    *,
    retain: bool,
) -> None:
    """Add the gradients to `grad`, as autograd does.

    Args:
        losses: 0-dim, T of them.
        weights: [T].
        plain: leaves that get Σ_t ∂L_t: heads, and what is not under surgery. They cost a second
            pass, over the part of the graph that lies before them.
        weighted: leaves that get Σ_t w_t ∂L_t. None: all that there are.
        retain: whether the graph must outlive this.
    """
    some = weighted is None or len(weighted) > 0
    if plain:
        torch.autograd.backward(losses, retain_graph=retain or some, inputs=list(plain))
    if some:
        factors = [
            weight.to(loss.device, loss.dtype, non_blocking=True)
            for weight, loss in zip(weights.unbind(), losses, strict=True)
        ]
        torch.autograd.backward(
            losses,
            factors,
            retain_graph=retain,
            inputs=None if weighted is None else list(weighted),
        )
