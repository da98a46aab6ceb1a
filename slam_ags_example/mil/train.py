"""Train an aggregator on bags, and apply a trained one."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from slam_ags_example.config import (
    InputError,
    TrainingFailedError,
    generator,
    one_of,
    stream_seed,
)
from slam_ags_example.mil.aggregators import Aggregator, MaxPooling, Standardise
from slam_ags_example.mil.build import (
    AGGREGATORS,
    N_PROTOTYPES,
    build_aggregator,
    load_aggregator,
)
from slam_ags_example.mil.concept import find_concept
from slam_ags_example.mil.intercept import fit_intercept, fitted_loss
from slam_ags_example.mil.pamil import initial_prototypes

__all__ = ["BagSet", "MILRecord", "TrainedMIL", "predict", "train_mil"]

BAGS_PER_BATCH = 8
KEPT_SHARE = 0.5  # of a bag's instances, drawn anew at each step of training
GUIDED_SHARE = 0.2  # of the epochs, the first ones, in which attention is shown the concept
LEARNING_RATE = 1e-3
WEIGHT_DECAY = {"pamil": 0.0, "abmil": 1e-2, "mean": 1e-2, "max": 1e-2}


@dataclass(frozen=True)
class BagSet:
    """Bags of one split as tensors.

    Attributes:
        instances: [B, n, d], float32, embeddings of the instances of each bag.
        labels: [B], float32, 1 for a positive bag and 0 for a negative one.
    """

    instances: Tensor
    labels: Tensor


@dataclass(frozen=True)
class MILRecord:
    """Mean cross entropy of one epoch, in nats per bag.

    Attributes:
        epoch: from 1.
        train_loss: over the epoch's steps, of the parts of training bags that they drew.
        validation_loss: after the epoch, of whole validation bags, with the intercept fitted to
            them.
    """

    epoch: int
    train_loss: float
    validation_loss: float


@dataclass(frozen=True)
class TrainedMIL:
    """The model of the chosen epoch, one record an epoch, and the chosen epoch (from 1)."""

    model: Aggregator
    records: list[MILRecord]
    epoch: int


def train_mil(
    train: BagSet,
    validation: BagSet,
    *,
    aggregator: str,
    epochs: int,
    seed: int,
    learning_rate: float | None = None,
    weight_decay: float | None = None,
    init: Mapping[str, Tensor] | None = None,
    n_prototypes: int = N_PROTOTYPES,
    prototype_prediction: bool = False,
    instance_loss: bool = False,
    on_epoch: Callable[[MILRecord], None] = lambda record: None,
) -> TrainedMIL:
    """Train on training bags; keep the epoch with the lowest loss on validation bags.

    Each step draws a random part of each bag, so that the few bags are not learnt by heart. The
    loss of whole validation bags is taken with the intercept that fits them: training on parts of
    bags shifts it, and what a whole bag looks like decides at which logit 0.5 lies.

    A new model is given a direction found by :func:`find_concept`. Max pooling starts there. The
    attention of pamil and abmil, in the first fifth of the epochs, pays a cross entropy against
    what the direction says of each bag's instances; then it is free. Without it, at one abnormal
    instance in a hundred and few bags, attention often settles on what is absent. Mean pooling's
    problem is convex and needs no start.

    Args:
        train: the bags that gradients and the transform of embeddings come from.
        validation: the bags that choose the epoch, the intercept and the direction, nothing else.
        aggregator: one of ``AGGREGATORS``.
        epochs: passes over the training bags, at least 1.
        seed: the same seed and bags give the same model.
        learning_rate: AdamW's; None takes 1e-3.
        weight_decay: AdamW's; None takes 1e-2, and 0 (plain Adam) for pamil.
        init: ``state_dict()`` of a model of the same aggregator to start from, say one trained at
            a higher witness rate. Its transform is left behind for that of these training bags.
        n_prototypes: of a new pamil model.
        prototype_prediction: a new pamil model's prototypes vote on the bag too.
        instance_loss: a new pamil model labels the instances at the ends of its attention.
        on_epoch: called after each epoch.

    Raises:
        InputError: no such aggregator; a split without bags of both labels, or with embeddings
            that are not finite; an ``init`` of another aggregator, or of embeddings of another
            width.
        TrainingFailedError: a loss is not finite.
    """
    one_of("--aggregator", aggregator, AGGREGATORS)
    _check(train, "training")
    _check(validation, "validation")
    device = train.instances.device
    # One stream on the CPU, so that every device starts from the same weights and batches.
    random = generator(seed, "mil")
    transform = Standardise(train.instances.shape[-1]).to(device)
    transform.fit(train.instances)
    train = BagSet(transform(train.instances), train.labels)
    validation = BagSet(transform(validation.instances), validation.labels)
    guide = None
    if init is not None:
        model = _from_state(aggregator, init, train).to(device)
    else:
        model = build_aggregator(
            aggregator,
            train.instances.shape[-1],
            generator=random,
            prototypes=initial_prototypes(
                train.instances, n_prototypes, seed=stream_seed(seed, "prototypes")
            )
            if aggregator == "pamil"
            else None,
            prototype_prediction=prototype_prediction,
            instance_loss=instance_loss,
        ).to(device)
        guide = _start_from_concept(model, train, validation, random)
    model.standardise.load_state_dict(transform.state_dict())
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=LEARNING_RATE if learning_rate is None else learning_rate,
        weight_decay=WEIGHT_DECAY[aggregator] if weight_decay is None else weight_decay,
    )

    def one_epoch(epoch: int) -> MILRecord:
        shown = guide if epoch <= max(1, round(GUIDED_SHARE * epochs)) else None
        train_loss = _train_epoch(model, optimizer, train, shown, random)
        validation_loss = fitted_loss(model, validation.instances, validation.labels)
        record = MILRecord(epoch, train_loss, validation_loss)
        on_epoch(record)
        return record

    records, best_epoch = _keep_best(model, one_epoch, epochs)
    fit_intercept(model, validation.instances, validation.labels)
    return TrainedMIL(model, records, best_epoch)


@torch.no_grad()
def predict(model: Aggregator, instances: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities [B] of being positive and scores [B, n] of the instances.

    Args:
        model: a trained aggregator.
        instances: [B, n, d], float32, embeddings as the encoder gave them.
    """
    logit, scores, _ = model(instances)
    return logit.sigmoid(), scores


def _check(bags: BagSet, split: str) -> None:
    if not 0 < float(bags.labels.mean()) < 1:
        raise InputError(f"the {split} bags must hold both labels: add bags of the other one")
    if not bags.instances.isfinite().all():
        raise InputError(
            f"the {split} bags hold embeddings that are not finite: pretrain and embed again"
        )


def _keep_best(
    model: Aggregator, one_epoch: Callable[[int], MILRecord], epochs: int
) -> tuple[list[MILRecord], int]:
    """Run all epochs; leave the model as after the one with the lowest validation loss."""
    best_loss, best_epoch, best_state = math.inf, 0, model.state_dict()
    records: list[MILRecord] = []
    for epoch in range(1, epochs + 1):
        record = one_epoch(epoch)
        if not (math.isfinite(record.train_loss) and math.isfinite(record.validation_loss)):
            raise TrainingFailedError(
                f"the aggregator's loss is no longer finite in epoch {epoch}: lower --mil-lr"
            )
        if record.validation_loss < best_loss:
            best_loss, best_epoch = record.validation_loss, epoch
            best_state = copy.deepcopy(model.state_dict())
        records.append(record)
    model.load_state_dict(best_state)
    return records, best_epoch


def _from_state(name: str, state: Mapping[str, Tensor], bags: BagSet) -> Aggregator:
    model, dim = load_aggregator(name, state), bags.instances.shape[-1]
    if len(model.standardise.centre) != dim:
        raise InputError(
            f"the model to start from takes embeddings of {len(model.standardise.centre)} "
            f"features, these have {dim}: start from one that was trained on this encoder's"
        )
    return model


def _start_from_concept(
    model: Aggregator, train: BagSet, validation: BagSet, random: torch.Generator
) -> Tensor | None:
    """Start max pooling at the concept; for attention return what to be guided by, [B, n]."""
    if not (model.attends or isinstance(model, MaxPooling)):
        return None
    concept = find_concept(
        train.instances, train.labels, validation.instances, validation.labels, random=random
    )
    if isinstance(model, MaxPooling):
        with torch.no_grad():
            model.classifier.copy_(concept.weight)
        fit_intercept(model, train.instances, train.labels)
        return None
    # Probabilities and not exp(logit): a bag's clearly abnormal instances count alike.
    return concept.logits(train.instances).sigmoid()


def _train_epoch(
    model: Aggregator,
    optimizer: torch.optim.Optimizer,
    train: BagSet,
    guide: Tensor | None,
    random: torch.Generator,
) -> float:
    """One pass over the bags; the mean cross entropy of its steps."""
    total = torch.zeros((), device=train.labels.device)
    for rows in torch.split(torch.randperm(len(train.labels), generator=random), BAGS_PER_BATCH):
        kept = _draw_instances(len(rows), train.instances.shape[1], random).to(train.labels.device)
        rows = rows.to(train.labels.device)
        labels = train.labels[rows]
        instances = train.instances[rows.unsqueeze(1), kept]
        optimizer.zero_grad()
        logit, scores, auxiliary = model.aggregate(instances, labels)
        cross_entropy = functional.binary_cross_entropy_with_logits(logit, labels)
        loss = cross_entropy + auxiliary.mean()
        if guide is not None:
            loss = loss + _guidance(scores, guide[rows.unsqueeze(1), kept])
        torch.autograd.backward(loss)
        optimizer.step()
        total += cross_entropy.detach() * len(rows)
    return float(total) / len(train.labels)


def _draw_instances(n_bags: int, n: int, random: torch.Generator) -> Tensor:
    """Which instances of each bag a step sees, [B, kept], without repeats.

    A positive bag can lose all its abnormal instances; over the epochs that is label noise alike
    for every bag.
    """
    n_kept = max(1, round(KEPT_SHARE * n))
    return torch.rand(n_bags, n, generator=random).topk(n_kept, dim=1).indices


def _guidance(attention: Tensor, guide: Tensor) -> Tensor:
    """Cross entropy of the attention [B, n] against the guide's shares, mean over bags."""
    tiny = torch.finfo(guide.dtype).tiny
    share = guide / guide.sum(dim=-1, keepdim=True).clamp_min(tiny)
    return -(share * attention.clamp_min(tiny).log()).sum(dim=-1).mean()
