"""What each pretraining method minimises: one class a method, all on the same views and encoder."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slam_ags_example.config import RunConfig, generator
from slam_ags_example.encoder import LinearHead, PretrainingModel
from slam_ags_example.losses import (
    cross_entropy_loss,
    hypersphere_loss,
    nt_xent_loss,
    similarity_loss,
)
from slam_ags_example.ranks import gather

__all__ = [
    "OBJECTIVES",
    "WSSIL",
    "Batch",
    "Objective",
    "OneClass",
    "SimCLR",
    "SlamAGS",
    "Supervised",
    "TrainingFacts",
    "WeakSupCon",
    "hypersphere_centre",
]

LEAST_CENTRE = 0.1  # of each component's magnitude, as in the authors' code
_CENTRE_CHUNK = 256  # patches per forward pass


@dataclass(frozen=True)
class TrainingFacts:
    """What an objective may know of the training bags before the first step.

    Attributes:
        positive_share: share of the training patches that come from positive bags.
        abnormal_share: share that is abnormal: the truth, which the supervised bound alone reads.
        negatives: [Q, C, h, w], views without chance of some patches of negative bags.
    """

    positive_share: float
    abnormal_share: float
    negatives: Tensor


@dataclass(frozen=True)
class Batch:
    """Two views of the patches of one step: the first views of all, then the second of all.

    Of several processes each has its own part of the patches.

    Attributes:
        positive: [2p, C, H, W], of patches of positive bags.
        negative: [2q, C, H, W], of patches of negative bags.
        abnormal: [2p] booleans, the truth about ``positive``.
    """

    positive: Tensor
    negative: Tensor
    abnormal: Tensor


class Objective(nn.Module):
    """A method's losses on a batch, and all that it trains.

    ``parameters()`` are the method's own: a head that it has no use for is not among them. The
    encoder is ``model.encoder``, trained in place. Of several processes each encodes its part of a
    batch, and losses are those of the whole batch (see :func:`~slam_ags_example.ranks.gather`).

    Attributes:
        surgery: how ``gradsurgery`` combines the gradients of the method's losses.
        centre_negatives: whether the first view of a patch of a negative bag is the one without
            chance, where the views have such a one.
    """

    surgery = "sum"
    centre_negatives = False

    def __init__(self, model: PretrainingModel, facts: TrainingFacts, config: RunConfig) -> None:
        super().__init__()
        self.temperature = config.temperature
        self.precision: torch.dtype = getattr(torch, config.precision)

    def encode(self, module: nn.Module, views: Tensor) -> Tensor:
        """``module(views)`` in the configured precision, as float32, which losses need."""
        views = views.contiguous(memory_format=torch.channels_last)
        half = self.precision != torch.float32
        with torch.autocast(views.device.type, self.precision if half else None, enabled=half):
            encoded: Tensor = module(views)
        return encoded.float()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The losses by task name, each a 0-dim tensor with a graph."""
        raise NotImplementedError


class WeakSupCon(Objective):
    """Two tasks on disjoint patches, their plain sum: no surgery.

    With h = head(encoder(·)) and X⁺, X⁻ the patches of positive and of negative bags::

        loss = NT-Xent(h(X⁺)) + similarity(h(X⁻))

    Patches of negative bags are all normal, so they may be drawn together; those of positive bags
    are told apart one from another, because their own labels are not known.

    Each task is a forward pass of its own, so the task graphs are disjoint and two backward passes
    cost what one does. Where the head has batch norm, one pass takes the patches of both: apart,
    batch norm would bring the mean projection of the negative patches to zero, and they could not
    be drawn together away from what is abnormal. The graphs are then one, and a step costs more.

    Source: WeakSupCon (arXiv 2503.04165). As its authors do, one view of a negative patch is the
    centre crop. Deviations: for digits, whose 8x8 pixels leave nothing to crop, both views are
    random; the small encoder's head (see :class:`~slam_ags_example.encoder.PretrainingModel`).
    """

    centre_negatives = True

    def __init__(self, model: PretrainingModel, facts: TrainingFacts, config: RunConfig) -> None:
        super().__init__(model, facts, config)
        self.model = model

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The losses ``nt_xent`` and ``similarity``."""
        if self.model.norm_in_head:
            both = self.encode(self.model, torch.cat([batch.positive, batch.negative]))
            positive, negative = both.tensor_split([len(batch.positive)])
        else:
            positive = self.encode(self.model, batch.positive)
            negative = self.encode(self.model, batch.negative)
        nt_xent = nt_xent_loss(*_pairs(positive), self.temperature)
        similarity = similarity_loss(*_pairs(negative), self.temperature)
        return {"nt_xent": nt_xent, "similarity": similarity}


class SlamAGS(WeakSupCon):
    """The two tasks of :class:`WeakSupCon`, their gradients combined by surgery.

    With g₁, g₂ the gradients of the two losses, the step is along w₁ g₁ + w₂ g₂, where w is the
    outcome of ``--surgery`` (by default adaptive gradient surgery) on their Gram matrix.

    Source: SLAM-AGS (arXiv 2511.14639). Deviations: as in :class:`WeakSupCon`.
    """

    def __init__(self, model: PretrainingModel, facts: TrainingFacts, config: RunConfig) -> None:
        super().__init__(model, facts, config)
        assert config.surgery is not None  # RunConfig settles it for this method
        self.surgery = config.surgery


class SimCLR(Objective):
    """One contrastive task on all patches; the bags' labels play no part::

        loss = NT-Xent(h(X⁺ ∪ X⁻))

    Source: SimCLR (arXiv 2002.05709). Deviations: AdamW instead of LARS, and the batch, the views
    and the temperature that the other methods have.
    """

    def __init__(self, model: PretrainingModel, facts: TrainingFacts, config: RunConfig) -> None:
        super().__init__(model, facts, config)
        self.model = model

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The loss ``nt_xent``."""
        both = zip(batch.positive.chunk(2), batch.negative.chunk(2), strict=True)
        views = torch.cat([view for pair in both for view in pair])
        a, b = _pairs(self.encode(self.model, views))
        return {"nt_xent": nt_xent_loss(a, b, self.temperature)}


class WSSIL(Objective):
    """Weak supervision, single instances: each patch gets its bag's label Y.

    With s = linear(encoder(x)) a logit, over every view of every patch::

        loss = mean_i cross_entropy(s_i, Y_i)

    At witness rate r a share 1 - r of the positive labels is wrong. The classes weigh the same,
    which changes nothing here: there are as many patches of either label.

    Source: the baseline "WS-SIL" beside SLAM-AGS (arXiv 2511.14639). Deviations: its details are
    not published; here both views are used, and the linear head stands on the encoder's output,
    not on a projection. Both kinds of bag go through the encoder together: in passes of their own,
    batch norm's statistics would give the label away.
    """

    def __init__(self, model: PretrainingModel, facts: TrainingFacts, config: RunConfig) -> None:
        super().__init__(model, facts, config)
        self.encoder = model.encoder
        random = generator(config.seed, "classifier")
        self.classifier = LinearHead(model.embedding_dim, generator=random)
        self.classifier.to(facts.negatives.device)
        self.positive_share = facts.positive_share

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The loss ``cross_entropy``."""
        views = torch.cat([batch.positive, batch.negative])
        logits = gather(self.classifier(self.encode(self.encoder, views)))
        labels = gather(torch.cat([self.positive_labels(batch), _false(batch.negative)]))
        return {"cross_entropy": cross_entropy_loss(logits, labels, self.positive_share)}

    def positive_labels(self, batch: Batch) -> Tensor:
        """The label of each view of a patch of a positive bag, [2p] booleans."""
        return ~_false(batch.positive)


class Supervised(WSSIL):
    """Full supervision, an upper bound: each patch has its true label, as no weak method knows it.

    As :class:`WSSIL` with y_i, whether the patch is abnormal, in place of Y_i. Abnormal patches
    are rare (witness rate 10%: a patch in twenty), so each class is weighted by the inverse of its
    share of the training patches (see :func:`~slam_ags_example.losses.cross_entropy_loss`).

    Source: the fully supervised bound beside SLAM-AGS (arXiv 2511.14639). Deviations: as in
    :class:`WSSIL`; the weighting is ours. The bound is on what the embedding separates, not on the
    pipeline's measures: the aggregator still learns from bag labels alone, and from embeddings of
    patches whose labels the encoder has learnt by heart, so its attention may do worse than this
    method's own linear head.
    """

    def __init__(self, model: PretrainingModel, facts: TrainingFacts, config: RunConfig) -> None:
        super().__init__(model, facts, config)
        self.positive_share = facts.abnormal_share

    def positive_labels(self, batch: Batch) -> Tensor:
        """The truth about each view of a patch of a positive bag, [2p] booleans."""
        return batch.abnormal


class OneClass(Objective):
    """Deep SVDD: patches of negative bags are drawn to one fixed centre.

    With c of :func:`hypersphere_centre`, over every view of every negative patch::

        loss = mean_i ‖encoder(x_i) - c‖²

    Patches of positive bags are not used: an epoch has the steps of the other methods, and half
    their patches. The minimum is collapse, an encoder that is constant. Guards, as published: c
    stays as it is, away from 0; no bounded activation (ReLU); no bias anywhere. The convolutions
    have none, and each batch norm's scale and shift stay at 1 and 0, where they begin. (Shifts
    alone could produce c: scale 0, shift c.) So before the last ReLU every channel keeps its unit
    variance over a batch's positions; what may still shrink is the variance of the mean over them.
    That it does shrink is the aim, and shows in the feature std of every epoch; the effective rank,
    which has no scale, tells contraction from collapse.

    Source: Ruff et al. 2018, "Deep One-Class Classification" (PMLR 80), equation 4. Deviations: no
    autoencoder pretraining, so c is that of random weights; random views of the patches; AdamW.
    The embedding then goes to the aggregator as any other, not the distance to c alone.
    """

    centre: Tensor

    def __init__(self, model: PretrainingModel, facts: TrainingFacts, config: RunConfig) -> None:
        super().__init__(model, facts, config)
        self.encoder = model.encoder
        for part in self.encoder.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.requires_grad_(False)
        self.register_buffer("centre", hypersphere_centre(self.encoder, facts.negatives))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The loss ``distance``."""
        embeddings = gather(self.encode(self.encoder, batch.negative))
        return {"distance": hypersphere_loss(embeddings, self.centre)}


@torch.no_grad()
def hypersphere_centre(encoder: nn.Module, patches: Tensor) -> Tensor:
    """Mean embedding of ``patches`` under the encoder as it is, no component within 0.1 of 0.

    A component in (-0.1, 0) becomes -0.1 and one in [0, 0.1) becomes 0.1: a zero could be met by
    weights of zero. Batch norm takes the statistics of the patches, as it will in training; its
    running ones, which say nothing before training, are left as they are.

    Args:
        encoder: maps [N, C, H, W] to [N, d].
        patches: [N, C, H, W], N >= 1.

    Returns:
        [d].
    """
    encoder = copy.deepcopy(encoder).train()
    n_chunks = -(-len(patches) // _CENTRE_CHUNK)
    centre = torch.cat([encoder(chunk) for chunk in patches.tensor_split(n_chunks)]).mean(dim=0)
    away = torch.where(centre < 0, -LEAST_CENTRE, LEAST_CENTRE).to(centre.dtype)
    return torch.where(centre.abs() < LEAST_CENTRE, away, centre)


OBJECTIVES: dict[str, type[Objective]] = {
    "slam-ags": SlamAGS,
    "weaksupcon": WeakSupCon,
    "simclr": SimCLR,
    "ws-sil": WSSIL,
    "supervised": Supervised,
    "one-class": OneClass,
}


def _pairs(views: Tensor) -> tuple[Tensor, Tensor]:
    """First and second views of the patches of all processes, from this one's [2n, d]."""
    first, second = gather(torch.stack(views.chunk(2), dim=1)).unbind(1)
    return first, second


def _false(views: Tensor) -> Tensor:
    return torch.zeros(len(views), dtype=torch.bool, device=views.device)
