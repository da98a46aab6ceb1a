"""The definition of both kernels, as short as can be. Slow and exact, for tests and readers."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["combine", "gram"]


def gram(gradients: Tensor) -> Tensor:
    """M = G Gᵀ in float64: [T, D] real -> [T, T]."""
    rows = gradients.to(torch.float64)
    return rows @ rows.T


def combine(gradients: Tensor, weights: Tensor) -> Tensor:
    """g = Gᵀ w in float64: [T, D] real, [T] -> [D]."""
    return weights.to(torch.float64) @ gradients.to(torch.float64)
