"""What a surgery saw and did, once (SurgeryReport) and over a run (History)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gradsurgery._history import History

__all__ = ["History", "SurgeryReport"]

# Beyond this the columns of the printed table carry numbers, so that it stays readable.
_MOST_NAMED_COLUMNS = 6
_MOST_PARTS = 12


@dataclass(frozen=True)
class SurgeryReport:
    """What one surgery saw and did. Its tensors stay on the device until somebody reads them.

    With `scope="shared"` all of it is about the parameters that two or more tasks reach. With a
    loss scaler the gradients, and so `gram` and `norms`, are those of the scaled losses; cosines,
    `weights`, `scale` and `turned` do not depend on the scale. With `metric="optimizer"` lengths
    and angles are those of that metric. [P, ...]: where the model was operated on in P parts.

    Attributes:
        names: the tasks, in the order of rows and columns below.
        gram: M = G Gᵀ, [T, T] or [P, T, T] float64. NaN for a single task and for methods that
            know w beforehand, where nothing had to be measured.
        weights: w, [T] or [P, T] float64; the combined gradient was Σ_t w_t g_t.
        parts: the P parts of the model, in the order of the first dimension above; empty with
            `granularity="model"`.
    """

    names: tuple[str, ...]
    gram: Tensor
    weights: Tensor
    parts: tuple[str, ...] = ()

    @property
    def norms(self) -> Tensor:
        """‖g_t‖, [T] or [P, T] float64."""
        return self.gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()

    @property
    def cosine(self) -> Tensor:
        """Cosine of each pair of task gradients, shaped as `gram`; 0 where a gradient is zero."""
        norms = self.norms
        lengths = norms[..., :, None] * norms[..., None, :]
        zero = lengths == 0
        return torch.where(zero, 0.0, self.gram / torch.where(zero, 1.0, lengths))

    @property
    def conflicts(self) -> Tensor:
        """The number of pairs of tasks with M_ij < 0: int64, 0-dim or [P]."""
        return (self.gram < 0).triu(diagonal=1).sum((-2, -1))

    @property
    def scale(self) -> Tensor:
        """‖Gᵀw‖ / ‖Σ_t g_t‖, 0-dim or [P]: 2 is twice as long as the plain sum.

        NaN where both are zero, inf where the plain sum alone is.
        """
        plain, combined, _ = self._products()
        return combined.sqrt() / plain.sqrt()

    @property
    def turned(self) -> Tensor:
        """Cosine between Gᵀw and Σ_t g_t, 0-dim or [P]: 1 where the direction is the plain sum's.

        NaN where one of them is zero.
        """
        plain, combined, both = self._products()
        return (both / (plain.sqrt() * combined.sqrt())).clamp(-1, 1)

    def _products(self) -> tuple[Tensor, Tensor, Tensor]:
        """1ᵀM1, wᵀMw and wᵀM1, the first two at least 0."""
        weights = self.weights.to(self.gram.dtype)
        ones = torch.ones_like(weights)
        # The same operations for w and for 1: with w = 1 the results are the same to the bit.
        along = (self.gram @ ones[..., None]).squeeze(-1)
        behind = (self.gram @ weights[..., None]).squeeze(-1)
        return (
            (ones * along).sum(-1).clamp(min=0),
            (weights * behind).sum(-1).clamp(min=0),
            (weights * along).sum(-1),
        )

    def __str__(self) -> str:
        """A table for a person: one row per task. Reads the tensors, so it waits for the device."""
        if not self.parts:
            return self._table()
        rates = self.conflicts.tolist()
        order = sorted(range(len(self.parts)), key=lambda part: -rates[part])
        shown = order[:_MOST_PARTS]
        tables = [
            f"{self.parts[part]}\n"
            + SurgeryReport(self.names, self.gram[part], self.weights[part])._table()
            for part in shown
        ]
        if len(order) > len(shown):
            tables.append(f"and {len(order) - len(shown)} more parts")
        return "\n\n".join(tables)

    def _table(self) -> str:
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
        if math.isnan(norms[0]):
            lines.append("gradients were not measured")
            return "\n".join(lines).replace("+nan", " - ").replace("nan", "-")
        pairs = len(names) * (len(names) - 1) // 2
        lines.append(f"{int(self.conflicts)} of {pairs} pairs in conflict")
        return "\n".join(lines)
