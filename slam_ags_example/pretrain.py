"""Pretraining: one loop for every method, through the two lines of gradsurgery."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gradsurgery import AdaptiveGradientSurgery, SurgeryReport
from slam_ags_example.augment import DigitViews
from slam_ags_example.config import RunConfig, generator
from slam_ags_example.embed import collapse_measures, embed
from slam_ags_example.encoder import PretrainingModel
from slam_ags_example.objectives import OBJECTIVES, Batch, TrainingPatches

__all__ = ["Conflict", "EpochRecord", "TrainingFailedError", "pretrain"]

WARM_UP_SHARE = 1 / 15  # of the steps: 10 epochs of 150, as published


class TrainingFailedError(RuntimeError):
    """Training cannot go on; the message is one line that says what to try."""


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
        effective_rank: of the embeddings of held-out patches; 1 is collapse, d is the most.
        feature_std: spread of their directions; 0 is collapse, 1 is all directions alike.
    """

    epoch: int
    losses: dict[str, float]
    conflict: Conflict | None
    effective_rank: float
    feature_std: float

    def row(self) -> dict[str, float]:
        """One level of named numbers, as pretraining.csv has them."""
        row: dict[str, float] = {"epoch": self.epoch, **self.losses}
        if self.conflict is not None:
            row |= {"cosine": self.conflict.cosine, "conflict_rate": self.conflict.rate}
            row |= {f"norm_{task}": norm for task, norm in self.conflict.norms.items()}
            row |= {f"weight_{task}": weight for task, weight in self.conflict.weights.items()}
        return row | {"effective_rank": self.effective_rank, "feature_std": self.feature_std}


def pretrain(
    model: PretrainingModel,
    patches: TrainingPatches,
    held_out: Tensor,
    config: RunConfig,
    *,
    on_epoch: Callable[[EpochRecord], None] = lambda record: None,
) -> list[EpochRecord]:
    """Train ``model`` in place by ``config.method``.

    Batches, views, optimizer and schedule do not depend on the method: with one seed, each method
    meets the same views of the same patches in the same order, every patch once an epoch.

    Args:
        model: on the device of the patches.
        patches: of the training bags.
        held_out: [R, C, H, W], patches of other bags, for the collapse measures only.
        config: method, surgery, epochs, batch size, learning rate, weight decay, temperature, seed.
        on_epoch: called after each epoch.

    Returns:
        One record an epoch.

    Raises:
        TrainingFailedError: a loss is no longer finite.
        ValueError: the method is none that trains.
    """
    if config.method not in OBJECTIVES:
        raise ValueError(f"method must be one of {', '.join(OBJECTIVES)}, got {config.method!r}")
    objective = OBJECTIVES[config.method](model, patches, config)
    random = generator(config.seed, "pretraining", patches.positive.device)
    view = DigitViews()
    optimizer = AdaptiveGradientSurgery(
        torch.optim.AdamW(
            [parameter for parameter in objective.parameters() if parameter.requires_grad],
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
        ),
        method=objective.surgery,
    )
    n_steps = _steps_per_epoch(len(patches.positive), len(patches.negative), config.batch_size)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, _warm_up_then_cosine(config.epochs * n_steps)
    )

    records: list[EpochRecord] = []
    for epoch in range(1, config.epochs + 1):
        objective.train()
        seen: list[Tensor] = []  # per step, on the device: read once, at the end of the epoch
        for batch in _batches(patches, n_steps, view, random):
            losses = objective(batch)

            optimizer.zero_grad()
            optimizer.backward(losses)
            optimizer.step()
            scheduler.step()

            values = torch.stack([loss.detach() for loss in losses.values()])
            seen.append(torch.cat([values, *_observe(optimizer.last)]))
        means = torch.stack(seen).mean(dim=0).tolist()
        embeddings = embed(model.encoder, held_out)
        if not (
            all(map(math.isfinite, means[: len(losses)])) and bool(embeddings.isfinite().all())
        ):
            raise TrainingFailedError(
                f"a pretraining loss or embedding is not finite at epoch {epoch}: lower --lr "
                f"(it is {config.learning_rate:g}), or raise --temperature if the method has one"
            )
        records.append(_record(epoch, list(losses), means, *collapse_measures(embeddings)))
        on_epoch(records[-1])
    return records


def _observe(report: SurgeryReport | None) -> list[Tensor]:
    """Cosine and conflict, norms, and weights of the last surgery, on the device.

    [2], [2] and [2] for two tasks; nothing for one, whose gradient is with no other in conflict.
    """
    assert report is not None  # asked for after a backward only
    if len(report.names) == 1:
        return []
    pair = torch.stack([report.cosine[0, 1], report.conflicts.double()])
    return [pair, report.norms, report.weights]


def _record(
    epoch: int, tasks: list[str], means: list[float], effective_rank: float, feature_std: float
) -> EpochRecord:
    """Give names to an epoch's means, which stand in the order losses, then ``_observe``."""
    conflict = None
    if len(tasks) == 2:
        cosine, rate, *rest = means[2:]
        conflict = Conflict(
            cosine=cosine,
            rate=rate,
            norms=dict(zip(tasks, rest[:2], strict=True)),
            weights=dict(zip(tasks, rest[2:], strict=True)),
        )
    return EpochRecord(
        epoch=epoch,
        losses=dict(zip(tasks, means, strict=False)),
        conflict=conflict,
        effective_rank=effective_rank,
        feature_std=feature_std,
    )


def _steps_per_epoch(n_positive: int, n_negative: int, batch_size: int) -> int:
    """Steps that see every patch once in batches of at most about ``batch_size`` of both tasks."""
    wanted = math.ceil((n_positive + n_negative) / batch_size)
    return max(1, min(wanted, n_positive // 2, n_negative // 2))


def _batches(
    patches: TrainingPatches, n_steps: int, view: DigitViews, random: torch.Generator
) -> Iterator[Batch]:
    """The batches of one epoch: two random views of each patch, drawn for all methods alike."""

    def two_views(images: Tensor) -> Tensor:
        return torch.cat([view(images, random), view(images, random)])

    n_positive, n_negative = len(patches.positive), len(patches.negative)
    for positive, negative in _rows(n_positive, n_negative, n_steps, random):
        yield Batch(
            positive=two_views(patches.positive[positive]),
            negative=two_views(patches.negative[negative]),
            abnormal=patches.abnormal[positive].repeat(2),
        )


def _rows(
    n_positive: int, n_negative: int, n_steps: int, random: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of the two sets for each step: each set shuffled and cut into ``n_steps`` even parts.

    So a batch has the ratio of the two sets, and no patch is dropped or seen twice in an epoch.
    """
    parts = [
        torch.randperm(n, generator=random, device=random.device).tensor_split(n_steps)
        for n in (n_positive, n_negative)
    ]
    yield from zip(*parts, strict=True)


def _warm_up_then_cosine(n_steps: int) -> Callable[[int], float]:
    """Factor on the learning rate: linear up over the first part, half a cosine down to 0."""
    n_warm = max(1, round(WARM_UP_SHARE * n_steps))

    def factor(step: int) -> float:
        if step < n_warm:
            return (step + 1) / n_warm
        done = (step - n_warm) / max(1, n_steps - n_warm)
        return 0.5 * (1 + math.cos(math.pi * done))

    return factor
