"""Pretraining from slide labels alone: two losses on disjoint sets of patches, under surgery."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradsurgery import AdaptiveGradientSurgery, SurgeryReport
from slam_ags_example.augment import DigitViews
from slam_ags_example.config import RunConfig, generator
from slam_ags_example.embed import collapse_measures, embed
from slam_ags_example.encoder import PretrainingModel
from slam_ags_example.losses import nt_xent_loss, similarity_loss

__all__ = ["EpochRecord", "TrainingFailedError", "pretrain"]

WARM_UP_SHARE = 1 / 15  # of the steps: 10 epochs of 150, as published


class TrainingFailedError(RuntimeError):
    """Training cannot go on; the message is one line that says what to try."""


@dataclass(frozen=True)
class EpochRecord:
    """Means over the steps of one epoch, and the state of the embedding after it.

    Attributes:
        epoch: from 1.
        nt_xent: loss on patches of positive bags.
        similarity: loss on patches of negative bags.
        cosine: cosine between the two task gradients.
        conflict_rate: share of steps on which that cosine was negative, in [0, 1].
        norm_nt_xent: norm of the task's gradient.
        norm_similarity: norm of the task's gradient.
        weight_nt_xent: weight that surgery gave the task.
        weight_similarity: weight that surgery gave the task.
        effective_rank: of the embeddings of held-out patches; 1 is collapse, d is the most.
        feature_std: spread of their directions; 0 is collapse, 1 is all directions alike.
    """

    epoch: int
    nt_xent: float
    similarity: float
    cosine: float
    conflict_rate: float
    norm_nt_xent: float
    norm_similarity: float
    weight_nt_xent: float
    weight_similarity: float
    effective_rank: float
    feature_std: float


def pretrain(
    model: PretrainingModel,
    positive: Tensor,
    negative: Tensor,
    held_out: Tensor,
    config: RunConfig,
    *,
    on_epoch: Callable[[EpochRecord], None] = lambda record: None,
) -> list[EpochRecord]:
    """Train ``model`` in place; every patch of either set is seen once an epoch.

    Args:
        model: on the device of the patches.
        positive: [P, C, H, W], the patches of positive training bags (normal and abnormal).
        negative: [Q, C, H, W], the patches of negative training bags.
        held_out: [R, C, H, W], patches of other bags, for the collapse measures only.
        config: epochs, batch size, learning rate, weight decay, temperature, surgery, seed.
        on_epoch: called after each epoch.

    Returns:
        One record an epoch.

    Raises:
        TrainingFailedError: a loss is no longer finite.
    """
    device = positive.device
    random = generator(config.seed, "pretraining", device)
    view = DigitViews()
    optimizer = AdaptiveGradientSurgery(
        torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        ),
        method=config.surgery,
    )
    n_steps = _steps_per_epoch(len(positive), len(negative), config.batch_size)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, _warm_up_then_cosine(config.epochs * n_steps)
    )

    records: list[EpochRecord] = []
    for epoch in range(1, config.epochs + 1):
        model.train()
        seen: list[Tensor] = []  # per step, on the device: read once, at the end of the epoch
        for rows_positive, rows_negative in _batches(len(positive), len(negative), n_steps, random):
            a, b = _project_two_views(model, positive[rows_positive], view, random)
            nt_xent = nt_xent_loss(a, b, config.temperature)
            a, b = _project_two_views(model, negative[rows_negative], view, random)
            similarity = similarity_loss(a, b, config.temperature)

            optimizer.zero_grad()
            optimizer.backward({"nt_xent": nt_xent, "similarity": similarity})
            optimizer.step()
            scheduler.step()

            losses = torch.stack([nt_xent.detach(), similarity.detach()])
            seen.append(torch.cat([losses, *_observe(optimizer.last)]))
        means = torch.stack(seen).mean(dim=0).tolist()
        embeddings = embed(model.encoder, held_out)
        if not (all(map(math.isfinite, means[:2])) and bool(embeddings.isfinite().all())):
            raise TrainingFailedError(
                f"a pretraining loss or embedding is not finite at epoch {epoch}: lower --lr "
                f"(it is {config.learning_rate:g}) or raise --temperature"
            )
        means += collapse_measures(embeddings)
        records.append(EpochRecord(epoch, *means))
        on_epoch(records[-1])
    return records


def _observe(report: SurgeryReport | None) -> tuple[Tensor, Tensor, Tensor]:
    """Cosine and conflict, norms, and weights of the last surgery: [2], [2], [2], on the device."""
    assert report is not None  # asked for after a backward only
    pair = torch.stack([report.cosine[0, 1], report.conflicts.double()])
    return pair, report.norms, report.weights


def _project_two_views(
    model: nn.Module, patches: Tensor, view: DigitViews, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Projections [N, d] of two views of each patch, in one forward pass of this task alone."""
    views = torch.cat([view(patches, random), view(patches, random)])
    a, b = model(views).chunk(2)
    return a, b


def _steps_per_epoch(n_positive: int, n_negative: int, batch_size: int) -> int:
    """Steps that see every patch once in batches of at most about ``batch_size`` of both tasks."""
    wanted = math.ceil((n_positive + n_negative) / batch_size)
    return max(1, min(wanted, n_positive // 2, n_negative // 2))


def _batches(
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
