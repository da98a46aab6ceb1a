"""AGS as it was published: a plain loop over flattened gradients, the slow way on purpose."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["backward", "combine"]


def combine(gradients: Sequence[Tensor], generator: torch.Generator | None = None) -> Tensor:
    """Project, add up, rescale to the norm of the plain sum: T vectors [D] -> [D].

    One random order for all tasks; every comparison waits for its number; every projection makes
    a new vector of size D. Source: SLAM-AGS, arXiv 2511.14639.
    """
    order: list[int] = torch.randperm(len(gradients), generator=generator).tolist()
    altered = []
    for i, own in enumerate(gradients):
        vector = own.clone()
        for j in order:
            other = gradients[j]
            if j == i or other.norm().item() == 0:
                continue
            dot = torch.dot(vector, other).item()
            if dot < 0:
                vector = vector - dot / torch.dot(other, other).item() * other
        altered.append(vector)
    total = torch.stack(altered).sum(0)
    length = total.norm().item()
    wanted = torch.stack(list(gradients)).sum(0).norm().item()
    return total * (wanted / length) if length > 0 else total


def backward(
    losses: Sequence[Tensor],
    parameters: Sequence[Tensor],
    generator: torch.Generator | None = None,
) -> None:
    """One gradient per loss, flattened over all parameters; the combined one goes to p.grad."""
    rows = []
    for loss in losses:
        parts = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        filled = [
            torch.zeros_like(p) if part is None else part
            for part, p in zip(parts, parameters, strict=True)
        ]
        rows.append(torch.cat([part.flatten() for part in filled]))
    pieces = torch.split(combine(rows, generator), [p.numel() for p in parameters])
    for p, piece in zip(parameters, pieces, strict=True):
        p.grad = piece.view_as(p)
