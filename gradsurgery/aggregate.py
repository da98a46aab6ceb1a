"""`aggregate`: the surgery alone, on gradients that somebody else computed."""

from __future__ import annotations

import torch
from torch import Tensor

from gradsurgery.kernels import combine, gram, relative_error
from gradsurgery.methods import Method, resolve

__all__ = ["aggregate"]


@torch.no_grad()
def aggregate(
    gradients: Tensor,
    method: str | Method = "ags",
    *,
    losses: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Combine task gradients: M = G Gᵀ, w = method(M), g = Gᵀw.

    Args:
        gradients: G, [T, D], one row per task; floating-point or complex.
        method: a name out of `gradsurgery.methods.available()`, or an instance. A method that
            keeps state keeps it in the instance.
        losses: [T], for methods that look at the losses' values.
        generator: source of random choices; None: torch's default generator.

    Returns:
        g, [D], dtype and device of `gradients`; a new tensor.

    Raises:
        TypeError, ValueError: as `gradsurgery.kernels.gram` and `gradsurgery.methods.resolve`.

    Example:
        >>> import torch
        >>> aggregate(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]), "pcgrad")
        tensor([0.5000, 1.5000])
    """
    rule = resolve(method)
    known = relative_error(gradients)
    weights = rule.weights(
        gram(gradients), losses=losses, generator=generator, relative_error=known
    )
    return combine(gradients, weights)
