"""SurgeryReport: what one surgery saw and did."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gradsurgery.report.text import number, table

__all__ = ["SurgeryReport"]

# Beyond this the columns of the printed table carry numbers, so that it stays readable.
_MOST_NAMED_COLUMNS = 6
_MOST_PARTS = 12


@dataclass(frozen=True)
class SurgeryReport:
    """What one surgery saw and did. Its tensors stay on the device until somebody reads them.

    With `scope="shared"` all of it is about the parameters that two or more tasks reach. With a
    loss scaler the gradients, and so `gram` and `norms`, are those of the scaled losses; cosines,
    `weights`, `scale` and `cosine_to_sum` do not depend on the scale. With `metric="optimizer"`
    lengths and angles are those of that metric. [P, ...]: where the model was operated on in P
    parts.

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
    def cosine_to_sum(self) -> Tensor:
        """Cosine between Gᵀw and Σ_t g_t, 0-dim or [P]: 1 where the direction is the plain sum's.

        NaN where one of them is zero.
        """
        plain, combined, both = self._products()
        return (both / (plain.sqrt() * combined.sqrt())).clamp(-1, 1)

    @property
    def turned(self) -> Tensor:
        """An older name of `cosine_to_sum`."""
        return self.cosine_to_sum

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
        """A table for a person, of tasks or of parts. Reads the tensors: waits for the device."""
        return self._table_of_parts() if self.parts else self._table_of_tasks()

    def _table_of_tasks(self) -> str:
        names = list(self.names)
        columns = names
        if len(names) > _MOST_NAMED_COLUMNS:
            columns = [str(place) for place in range(1, len(names) + 1)]
            names = [f"{place} {name}" for place, name in zip(columns, names, strict=True)]
        rows = [["task", "norm", "weight", *(f"cos {column}" for column in columns)]]
        norms, weights, cosine = self.norms.tolist(), self.weights.tolist(), self.cosine.tolist()
        rows += [
            [name, number(norm), number(weight), *(number(value, "+.3f") for value in line)]
            for name, norm, weight, line in zip(names, norms, weights, cosine, strict=True)
        ]
        if all(map(math.isnan, norms)):
            return f"{table(rows)}\ngradients were not measured"
        pairs = len(names) * (len(names) - 1) // 2
        return (
            f"{table(rows)}\ncombined gradient: {number(float(self.scale), '.3g')} of the plain "
            f"sum's length, cosine {number(float(self.cosine_to_sum), '.3f')} to it\n"
            f"{int(self.conflicts)} of {pairs} pairs in conflict"
        )

    def _table_of_parts(self) -> str:
        """A row per part, those with most conflicts first, of these the sharpest one."""
        tasks = len(self.names)
        first, second = torch.triu_indices(tasks, tasks, 1, device=self.gram.device)
        lowest, place = self.cosine[..., first, second].min(-1)
        counts, least, pairs = self.conflicts.tolist(), lowest.tolist(), place.tolist()
        scale, cosine_to_sum = self.scale.tolist(), self.cosine_to_sum.tolist()
        order = sorted(range(len(self.parts)), key=lambda part: (-counts[part], least[part]))
        rows = [["part", "conflicts", "lowest cos", "of", "length", "cos to sum"]]
        for part in order[:_MOST_PARTS]:
            pair = self.names[first[pairs[part]]], self.names[second[pairs[part]]]
            rows.append(
                [
                    self.parts[part],
                    f"{counts[part]} of {len(first)}",
                    number(least[part], "+.3f"),
                    ", ".join(pair),
                    number(scale[part], ".3g"),
                    number(cosine_to_sum[part], ".3f"),
                ]
            )
        hidden = max(len(self.parts) - _MOST_PARTS, 0)
        more = f"and {hidden} more parts\n" if hidden else ""
        total = len(first) * len(self.parts)
        return f"{table(rows)}\n{more}{sum(counts)} of {total} pairs in conflict"
