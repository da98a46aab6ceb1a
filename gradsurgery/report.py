"""SurgeryReport: what the last surgery saw and did."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SurgeryReport"]

# Beyond this the columns of the printed table carry numbers, so that it stays readable.
_MOST_NAMED_COLUMNS = 6


@dataclass(frozen=True)
class SurgeryReport:
    """What one surgery saw and did. Its tensors stay on the device until somebody reads them.

    With `scope="shared"` all of it is about the parameters that two or more tasks reach. With a
    loss scaler the gradients, and so `gram` and `norms`, are those of the scaled losses; cosines
    and weights do not depend on the scale.

    Attributes:
        names: the tasks, in the order of rows and columns below.
        gram: M = G Gᵀ, [T, T] float64. NaN for a single task, where nothing had to be measured.
        weights: w, [T] float64; the combined gradient was Σ_t w_t g_t.
    """

    names: tuple[str, ...]
    gram: Tensor
    weights: Tensor
    parts: tuple[str, ...] = ()

    @property
    def norms(self) -> Tensor:
        """‖g_t‖, [T] float64."""
        return self.gram.diagonal().clamp(min=0).sqrt()

    @property
    def cosine(self) -> Tensor:
        """Cosine of each pair of task gradients, [T, T] float64; 0 where a gradient is zero."""
        lengths = self.norms[:, None] * self.norms
        zero = lengths == 0
        return torch.where(zero, 0.0, self.gram / torch.where(zero, 1.0, lengths))

    @property
    def conflicts(self) -> Tensor:
        """The number of pairs of tasks with M_ij < 0: a 0-dim int64 tensor."""
        return (self.gram < 0).triu(diagonal=1).sum()

    def __str__(self) -> str:
        """A table for a person: one row per task. Reads the tensors, so it waits for the device."""
        names = list(self.names)
        columns = names
        if len(names) > _MOST_NAMED_COLUMNS:
            columns = [str(number) for number in range(1, len(names) + 1)]
            names = [f"{number} {name}" for number, name in zip(columns, names, strict=True)]
        header = ["task", "norm", "weight", *(f"cos {column}" for column in columns)]
        norms, weights, cosine = self.norms.tolist(), self.weights.tolist(), self.cosine.tolist()
        rows = [
            [name, f"{norm:.4g}", f"{weight:.4g}", *(f"{value:+.3f}" for value in line)]
            for name, norm, weight, line in zip(names, norms, weights, cosine, strict=True)
        ]
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if position == 0 else cell.rjust(width)
                for position, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in (header, *rows)
        ]
        pairs = len(names) * (len(names) - 1) // 2
        lines.append(f"{int(self.conflicts)} of {pairs} pairs in conflict")
        return "\n".join(lines)
