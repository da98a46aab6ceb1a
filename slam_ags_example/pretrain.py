"""Pretraining: one loop for every method, through the two lines of gradsurgery."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from gradsurgery import AdaptiveGradientSurgery
from slam_ags_example.augment import Views
from slam_ags_example.checkpoint import Checkpoints
from slam_ags_example.config import RunConfig, TrainingFailedError, generator
from slam_ags_example.data import ImageSet, batches
from slam_ags_example.embed import collapse_measures, embed
from slam_ags_example.encoder import PretrainingModel
from slam_ags_example.history import EpochRecord, Throughput, name_means, observe
from slam_ags_example.objectives import OBJECTIVES, Batch, Objective, TrainingFacts
from slam_ags_example.ranks import any_of, count, gather, group, own_rows
from slam_ags_example.schedule import base_optimizer, steps_per_epoch, warm_up_then_cosine
from slam_ags_example.sync_norm import synchronise_norms
from slam_ags_example.training_state import TrainingState

__all__ = ["TrainingSet", "pretrain"]

CHECKPOINT_EVERY_S = 300.0  # within an epoch; the end of each epoch is a checkpoint as well
_MOST_SAMPLED = 1024  # patches of negative bags that an objective may look at beforehand


@dataclass(frozen=True)
class TrainingSet:
    """The patches that pretraining works with, as rows of one image set.

    Attributes:
        images: the images of all bags.
        positive: [P], int64, rows of the patches of positive training bags.
        negative: [Q], int64, rows of those of negative training bags.
        held_out_positive: [R], rows of patches of positive validation bags, R >= 2.
        held_out_negative: [S], rows of patches of negative validation bags, S >= 2.
        abnormal: booleans, the truth about every row of ``images``; what the supervised bound
            trains on, and no other method reads.
    """

    images: ImageSet
    positive: Tensor
    negative: Tensor
    held_out_positive: Tensor
    held_out_negative: Tensor
    abnormal: Tensor


def pretrain(
    model: PretrainingModel,
    patches: TrainingSet,
    views: Views,
    config: RunConfig,
    checkpoints: Checkpoints,
    *,
    on_epoch: Callable[[EpochRecord], None] = lambda record: None,
    stop_asked: Callable[[], bool] = lambda: False,
) -> tuple[list[EpochRecord], Throughput]:
    """Train ``model`` in place by ``config.method``.

    Batches, views, optimizer and schedule do not depend on the method: with one seed, each method
    meets the same views of the same patches in the same order, every patch once an epoch. Nothing
    is drawn from a running stream: the order of an epoch and the views of a step follow from the
    seed and the step's number, so going on from a checkpoint gives the same bits (on the CPU, with
    the same number of threads).

    Inside a torch.distributed group all processes call this alike. Each encodes its part of every
    batch, and the result is that of one process on whole batches, up to rounding.

    Args:
        model: on the device to train on.
        patches: of the training and validation bags.
        views: what turns patches into the encoder's input.
        config: the settings of pretraining, and the seed.
        checkpoints: where the state goes, and comes from in a resumed run.
        on_epoch: called after each epoch, and for each epoch that a checkpoint brought.
        stop_asked: asked after each step; True on any process ends the run after a checkpoint.

    Returns:
        One record an epoch, and how fast it went.

    Raises:
        InputError: the checkpoint is of another run.
        TrainingFailedError: a pretraining loss is no longer finite.
        ValueError: the method is none that trains.
        KeyboardInterrupt: ``stop_asked`` said so; the checkpoint is written.
    """
    if config.method not in OBJECTIVES:
        raise ValueError(f"method must be one of {', '.join(OBJECTIVES)}, got {config.method!r}")
    device = next(model.parameters()).device
    objective = OBJECTIVES[config.method](model, _facts(patches, views, device), config)
    synchronise_norms(objective)
    optimizer = AdaptiveGradientSurgery(
        base_optimizer(objective, config), objective.surgery, process_group=group()
    )
    n_steps = steps_per_epoch(
        len(patches.positive), len(patches.negative), config.batch_size, config.micro_batches
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, warm_up_then_cosine(config.epochs * n_steps, config.warm_up)
    )
    # Of R processes each gets R times the gradient (see ranks.gather), so 1/R of the usual scale.
    first_scale = 2.0**16 / count()
    scaler = torch.amp.GradScaler(device.type, first_scale, enabled=config.precision == "float16")
    state = TrainingState(
        {
            "model": model,
            "objective": objective,
            "optimizer": optimizer,
            "scheduler": scheduler,
            "scaler": scaler,
        }
    )
    if (stored := checkpoints.restore()) is not None:
        state.load(stored, device)
        for record in state.records:
            on_epoch(record)

    saved_s = perf_counter()
    for epoch in range(len(state.records) + 1, config.epochs + 1):
        objective.train()
        parts = _parts(patches, n_steps, config.micro_batches, config.seed, epoch)
        parts = parts[state.step * config.micro_batches :]
        rows = [part.own_rows() for part in parts]
        loaded = batches(patches.images, rows, device=device, workers=config.workers)
        for part, images in zip(parts, state.throughput.watch(loaded), strict=True):
            losses = objective(_batch(part, images, patches, views, objective, config.seed))

            scaled = {name: scaler.scale(loss * part.share) for name, loss in losses.items()}
            optimizer.backward(scaled, accumulate=not part.ends_step)
            state.throughput.patches += len(part.positive) + len(part.negative)
            if not part.ends_step:
                continue
            scale = scaler.scale(torch.ones((), device=device))  # before update() changes it
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            optimizer.zero_grad()

            state.add(*observe(list(losses.values()), optimizer.last, scale))
            if any_of(stop_asked()):
                state.save(checkpoints)
                raise KeyboardInterrupt
            if perf_counter() - saved_s > CHECKPOINT_EVERY_S:
                state.save(checkpoints)
                saved_s = perf_counter()

        record = _record(epoch, state.means(), patches, views, objective, model, config)
        # The best one first: killed between the two, a resumed run does the epoch once more.
        if state.end_epoch(record):
            state.save(checkpoints, best=True)
        state.save(checkpoints)
        saved_s = perf_counter()
        on_epoch(record)
    return state.records, state.throughput


def _record(
    epoch: int,
    means: list[float],
    patches: TrainingSet,
    views: Views,
    objective: Objective,
    model: PretrainingModel,
    config: RunConfig,
) -> EpochRecord:
    """What an epoch came to: its means, and the held-out patches under the model after it.

    Raises:
        TrainingFailedError: a loss or an embedding is not finite.
    """
    part = Part(patches.held_out_positive, patches.held_out_negative, "held out")
    device = next(model.parameters()).device
    images = patches.images.read(part.own_rows()).to(device)
    objective.eval()
    with torch.no_grad():
        batch = _batch(part, images, patches, views, objective, config.seed)
        validation_losses = objective(batch)
    embeddings = gather(embed(model.encoder, views.centre(images)))
    names = list(validation_losses)
    validation_loss = float(torch.stack(list(validation_losses.values())).sum())
    losses = [*means[: len(names)], validation_loss]
    if not (all(map(math.isfinite, losses)) and bool(embeddings.isfinite().all())):
        raise TrainingFailedError(
            f"a pretraining loss or embedding is not finite at epoch {epoch}: lower --lr "
            f"(it is {config.learning_rate:g}), or raise --temperature if the method has one"
        )
    effective_rank, feature_std = collapse_measures(embeddings)
    return name_means(
        epoch,
        names,
        means,
        validation_loss=validation_loss,
        effective_rank=effective_rank,
        feature_std=feature_std,
    )


@dataclass(frozen=True)
class Part:
    """The patches of one forward pass, of all processes: a step's, or a micro-batch's.

    Attributes:
        positive: [p], rows of patches of positive bags.
        negative: [q], rows of patches of negative bags.
        key: what its views are drawn by.
        share: its weight among the parts of its step; the step's loss is their mean.
        ends_step: whether the optimizer steps after it.
    """

    positive: Tensor
    negative: Tensor
    key: str
    share: float = 1.0
    ends_step: bool = True

    def own_rows(self) -> Tensor:
        """The rows that this process encodes, those of positive bags first."""
        return torch.cat([rows[own_rows(len(rows))] for rows in (self.positive, self.negative)])


def _parts(patches: TrainingSet, n_steps: int, n_micro: int, seed: int, epoch: int) -> list[Part]:
    """The parts of one epoch: each set shuffled and cut evenly, so a batch has the sets' ratio.

    No patch is dropped or seen twice in an epoch.
    """
    random = generator(seed, f"order of epoch {epoch}")
    positive, negative = (
        rows[torch.randperm(len(rows), generator=random)].tensor_split(n_steps * n_micro)
        for rows in (patches.positive, patches.negative)
    )
    return [
        Part(
            *rows,
            key=f"epoch {epoch}, part {number}",
            share=1 / n_micro,
            ends_step=(number + 1) % n_micro == 0,
        )
        for number, rows in enumerate(zip(positive, negative, strict=True))
    ]


def _batch(
    part: Part,
    images: Tensor,
    patches: TrainingSet,
    views: Views,
    objective: Objective,
    seed: int,
) -> Batch:
    """Two views of each of this process's patches, drawn for all methods alike."""
    abnormal = patches.abnormal[part.positive[own_rows(len(part.positive))]]
    positive, negative = images.tensor_split([len(abnormal)])

    def view(images: Tensor, name: str) -> Tensor:
        n = len(part.positive if images is positive else part.negative)
        key = f"{part.key}, {name}"
        return views.random(images, seed, key, first=own_rows(n).start, n=n)

    centred = objective.centre_negatives and views.centre_is_a_view
    negative_views = [
        views.centre(negative) if centred else view(negative, "negative 1"),
        view(negative, "negative 2"),
    ]
    return Batch(
        positive=torch.cat([view(positive, "positive 1"), view(positive, "positive 2")]),
        negative=torch.cat(negative_views),
        abnormal=abnormal.to(images.device).repeat(2),
    )


def _facts(patches: TrainingSet, views: Views, device: torch.device) -> TrainingFacts:
    n_positive, n_negative = len(patches.positive), len(patches.negative)
    n_sampled = min(n_negative, _MOST_SAMPLED)
    sampled = patches.negative[torch.arange(n_sampled) * n_negative // n_sampled]
    return TrainingFacts(
        positive_share=n_positive / (n_positive + n_negative),
        abnormal_share=float(patches.abnormal[patches.positive].sum()) / (n_positive + n_negative),
        negatives=views.centre(patches.images.read(sampled).to(device)),
    )
