"""Gram matrices on which solvers come to grief: the families that every method is tried on."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["COUNTS", "FAMILIES", "gradients_of", "roster"]

COUNTS = (1, 2, 3, 8, 16, 40, 64)
FAMILIES = (
    "independent",
    "few dimensions",
    "agreeing",
    "conflicting",
    "stationary",
    "nearly stationary",
    "zero rows",
    "all zero",
    "equal",
    "nearly equal",
    "parallel",
    "opposite",
    "nearly opposite",
    "rank one and noise",
    "norms 1e-12 to 1e12",
    "norms 1e-12 to 1e12, few dimensions",
    "one giant",
    "one dwarf",
)


def gradients_of(family: str, count: int, seed: int = 0) -> Tensor:
    """G, [T, D] float64, of one family.

    Args:
        family: one of `FAMILIES`.
        count: T.
        seed: of the random numbers.
    """
    generator = torch.Generator().manual_seed(1000 * seed + count)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    wide = 2 * count + 3
    rows = noise(count, wide)
    sign = torch.where(torch.arange(count) % 2 == 0, 1.0, -1.0).to(torch.float64)[:, None]
    if family == "few dimensions":
        return noise(count, max(count // 3, 1))
    if family == "agreeing":
        return rows + 3 * noise(1, wide)
    if family == "conflicting":
        return rows + 2 * sign * noise(1, wide)
    if family == "stationary":
        weights = torch.rand(count, 1, generator=generator, dtype=torch.float64) + 0.1
        return rows - (weights * rows).sum(0) / weights.sum()
    if family == "nearly stationary":
        return rows - rows.mean(0) * (1 - 1e-6)
    if family == "zero rows":
        return rows * (torch.arange(count) % 3 != 1)[:, None]
    if family == "all zero":
        return torch.zeros(count, wide, dtype=torch.float64)
    if family == "equal":
        return rows[:1].repeat(count, 1)
    if family == "nearly equal":
        return rows[:1] + 1e-8 * rows
    if family == "parallel":
        return rows[:1] * (1 + torch.arange(count, dtype=torch.float64))[:, None]
    if family == "opposite":
        return rows[:1] * sign
    if family == "nearly opposite":
        return rows[:1] * sign + 1e-7 * rows
    if family == "rank one and noise":
        return noise(count, 1) * rows[:1] + 1e-5 * rows
    sizes = 10.0 ** torch.linspace(-12, 12, count, dtype=torch.float64)[:, None]
    if family == "norms 1e-12 to 1e12":
        return rows * sizes
    if family == "norms 1e-12 to 1e12, few dimensions":
        return noise(count, max(count // 3, 2)) * sizes
    if family == "one giant":
        rows[0] *= 1e9
    if family == "one dwarf":
        rows[0] *= 1e-9
    return rows


def roster(seeds: int = 1) -> Iterator[tuple[str, int, Tensor]]:
    """Every family at every T: what it is called, T, and G."""
    for family in FAMILIES:
        for count in COUNTS:
            for seed in range(seeds):
                yield family, count, gradients_of(family, count, seed)
