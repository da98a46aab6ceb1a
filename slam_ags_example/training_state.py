"""What pretraining carries from step to step, and how a checkpoint holds it."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from slam_ags_example.checkpoint import Checkpoints
from slam_ags_example.history import Conflict, EpochRecord, Throughput

__all__ = ["TrainingState"]


@dataclass
class TrainingState:
    """Everything that the next step depends on, beside the settings and the images.

    Attributes:
        parts: what has a ``state_dict``, by name.
        records: of the finished epochs.
        step: steps done in the epoch under way.
        seen: [2, k] float64 over these steps, of what :func:`~slam_ags_example.history.observe`
            gave: sums, and how many steps count. None before the first.
        best_loss: the lowest validation loss so far.
        throughput: patches and seconds so far, interrupted runs included.
    """

    parts: dict[str, Any]
    records: list[EpochRecord] = field(default_factory=list)
    step: int = 0
    seen: Tensor | None = None
    best_loss: float = math.inf
    throughput: Throughput = field(default_factory=Throughput)

    def add(self, losses: Tensor, surgery: Tensor) -> None:
        """Count one step.

        What surgery saw does not count where it is not finite: GradScaler skips such a step and
        lowers its scale. A loss that is not finite does count, and shows.

        Args:
            losses: [T], of the tasks.
            surgery: [j], what surgery saw; j may be 0.
        """
        counts = torch.cat([torch.ones_like(losses), surgery.isfinite().all().expand_as(surgery)])
        values = torch.cat([losses, torch.where(counts[len(losses) :] > 0, surgery, 0.0)])
        seen = torch.stack([values, counts])
        self.seen = seen if self.seen is None else self.seen + seen
        self.step += 1

    def means(self) -> list[float]:
        """Of the epoch under way, losses first; NaN where no step counted."""
        assert self.seen is not None  # an epoch has a step at least
        sums, counts = self.seen
        means: list[float] = (sums / counts).tolist()
        return means

    def end_epoch(self, record: EpochRecord) -> bool:
        """Keep an epoch's record; True where its validation loss is the lowest so far."""
        self.records.append(record)
        self.step, self.seen = 0, None
        better = record.validation_loss < self.best_loss
        self.best_loss = min(self.best_loss, record.validation_loss)
        return better

    def save(self, checkpoints: Checkpoints, *, best: bool = False) -> None:
        """Write it all as the last checkpoint, or as the best."""
        content = {
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "records": [asdict(record) for record in self.records],
            "step": self.step,
            "seen": self.seen,
            "best_loss": self.best_loss,
            "throughput": asdict(self.throughput),
        }
        checkpoints.write(content, best=best)

    def load(self, content: dict[str, Any], device: torch.device) -> None:
        """Go back to where a checkpoint was written."""
        for name, part in self.parts.items():
            part.load_state_dict(content["parts"][name])
        self.records = [_record(fields) for fields in content["records"]]
        self.step, self.best_loss = content["step"], content["best_loss"]
        self.seen = None if content["seen"] is None else content["seen"].to(device)
        self.throughput = Throughput(**content["throughput"])


def _record(fields: dict[str, Any]) -> EpochRecord:
    conflict = fields["conflict"]
    return EpochRecord(**{**fields, "conflict": None if conflict is None else Conflict(**conflict)})
