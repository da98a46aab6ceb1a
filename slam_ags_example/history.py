"""What pretraining saw, epoch by epoch: records, their rows in pretraining.csv, and throughput."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TypeVar

import torch
from torch import Tensor

from gradsurgery import SurgeryReport

__all__ = ["Conflict", "EpochRecord", "Throughput", "name_means", "observe"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Conflict:
    """What surgery saw of two tasks, as means over the steps of one epoch.

    Attributes:
        cosine: cosine between the two task gradients.
        rate: share of steps on which that cosine was negative, in [0, 1].
        norms: norm of each task's gradient, by the task's name.
        weights: weight that surgery gave each task, by the task's name.
    """

    cosine: float
    rate: float
    norms: dict[str, float]
    weights: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """Means over the steps of one epoch, and the state of the embedding after it.

    Attributes:
        epoch: from 1.
        losses: each task's loss, by the task's name.
        conflict: between the two tasks; None for a method with one.
        validation_loss: the sum of the task losses on patches of validation bags.
        effective_rank: of the embeddings of those patches; 1 is collapse, d is the most.
        feature_std: spread of their directions; 0 is collapse, 1 is all directions alike.
    """

    epoch: int
    losses: dict[str, float]
    conflict: Conflict | None
    validation_loss: float
    effective_rank: float
    feature_std: float

    def row(self) -> dict[str, float]:
        """One level of named numbers, as pretraining.csv has them."""
        row: dict[str, float] = {"epoch": self.epoch, **self.losses}
        if self.conflict is not None:
            row |= {"cosine": self.conflict.cosine, "conflict_rate": self.conflict.rate}
            row |= {f"norm_{task}": norm for task, norm in self.conflict.norms.items()}
            row |= {f"weight_{task}": weight for task, weight in self.conflict.weights.items()}
        return row | {
            "validation_loss": self.validation_loss,
            "effective_rank": self.effective_rank,
            "feature_std": self.feature_std,
        }


@dataclass
class Throughput:
    """How fast the loop went: each patch counts once a step, whatever its number of views.

    Attributes:
        patches: that were trained on.
        total_s: wall-clock time of the loop.
        waiting_s: the part of it in which the loop waited for images.
    """

    patches: int = 0
    total_s: float = 0.0
    waiting_s: float = 0.0

    def watch(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches, with the clock running from the first one asked for to the end."""
        source, started_s = iter(batches), perf_counter()
        while True:
            asked_s = perf_counter()
            batch = next(source, None)
            came_s = perf_counter()
            self.waiting_s += came_s - asked_s
            self.total_s += came_s - started_s
            started_s = came_s
            if batch is None:
                return
            yield batch

    def summary(self) -> dict[str, float]:
        """``patches_per_s`` and ``waiting_share``, as timing.json has them."""
        if not self.total_s:
            return {}
        return {
            "patches_per_s": round(self.patches / self.total_s, 1),
            "waiting_share": round(self.waiting_s / self.total_s, 4),
        }


def observe(
    losses: Sequence[Tensor], report: SurgeryReport | None, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """One step as float64 vectors on the device, so that nothing waits for it.

    Args:
        losses: of the tasks, 0-dim.
        report: of the step's surgery.
        scale: what the losses were scaled by before the backward pass, 0-dim.

    Returns:
        The losses; and for two tasks the cosine, whether they conflict, two norms, two weights,
        for another number of tasks nothing.
    """
    values = torch.stack([loss.detach().double() for loss in losses])
    if report is None or len(report.names) != 2:
        return values, values[:0]
    pair = torch.stack([report.cosine[0, 1].double(), report.conflicts.double()])
    return values, torch.cat([pair, report.norms.double() / scale, report.weights.double()])


def name_means(
    epoch: int, tasks: Sequence[str], means: Sequence[float], **after: float
) -> EpochRecord:
    """Give names to an epoch's means, which stand in the order that :func:`observe` gives.

    Args:
        epoch: from 1.
        tasks: names of the tasks.
        means: over the steps of the epoch.
        after: the other fields of :class:`EpochRecord`.
    """
    conflict = None
    if len(tasks) == 2:
        cosine, rate, *rest = means[2:]
        conflict = Conflict(
            cosine=cosine,
            rate=rate,
            norms=dict(zip(tasks, rest[:2], strict=True)),
            weights=dict(zip(tasks, rest[2:], strict=True)),
        )
    losses = dict(zip(tasks, means, strict=False))
    return EpochRecord(epoch=epoch, losses=losses, conflict=conflict, **after)
