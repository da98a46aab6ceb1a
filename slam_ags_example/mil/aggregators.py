"""What every aggregator of bags shares, and those without prototypes: attention, mean and max."""

import math
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

__all__ = [
    "Aggregation",
    "Aggregator",
    "GatedAttention",
    "MaxPooling",
    "MeanPooling",
    "Standardise",
    "linear",
]

FEATURE_RMS = 0.3  # of what the aggregator is given: small, so that it does not learn by heart
HIDDEN_DIM = 64


class Aggregation(NamedTuple):
    """What an aggregator says about bags.

    Attributes:
        logit: [...], of each bag being positive.
        scores: [..., n], the higher the more suspicious the instance. Attention, which sums to 1
            over a bag, where the aggregator has it; else the instance's own logit.
        auxiliary: [...], what the method adds to each bag's cross entropy; 0 where it adds nothing.
    """

    logit: Tensor
    scores: Tensor
    auxiliary: Tensor


class Standardise(nn.Module):
    """(x - centre) / scale, with one scale for all features; the identity until :meth:`fit`.

    Encoders of any output scale then meet the same aggregator. No whitening: it would raise
    directions that are noise to the rank of those that tell classes apart.

    Attributes:
        centre: [d], the mean of the training embeddings.
        scale: 0-dim; after division by it the root mean square of the training embeddings, over
            all instances and features, is ``FEATURE_RMS``.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.centre: Tensor
        self.scale: Tensor
        self.register_buffer("centre", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def fit(self, instances: Tensor) -> None:
        """Take centre and scale from training embeddings [..., d]."""
        rows = instances.flatten(end_dim=-2)
        centre = rows.mean(dim=0)
        scale = (rows - centre).square().mean().sqrt() / FEATURE_RMS
        self.centre.copy_(centre)
        self.scale.copy_(scale.clamp_min(torch.finfo(scale.dtype).tiny))  # all embeddings equal

    def forward(self, instances: Tensor) -> Tensor:
        """Embeddings [..., d] as the aggregator takes them."""
        return (instances - self.centre) / self.scale


class Aggregator(nn.Module, ABC):
    """Raw embeddings of bags in, :class:`Aggregation` out; one ``state_dict`` holds all of it.

    Attributes:
        standardise: the transform in front, fitted on training embeddings.
        intercept: 0-dim, the only additive constant of the logit, so that it can be set by itself.
        attends: whether ``scores`` is attention.
    """

    attends: ClassVar[bool] = False

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.standardise = Standardise(dim)
        self.intercept = nn.Parameter(torch.zeros(()))

    def forward(self, instances: Tensor, labels: Tensor | None = None) -> Aggregation:
        """Classify bags and score their instances.

        Args:
            instances: [..., n, d], embeddings as the encoder gave them.
            labels: [...], 1 for a positive bag and 0 for a negative one. They take part in
                ``auxiliary`` alone, and only where the method has a loss that needs them.
        """
        standardised: Tensor = self.standardise(instances)
        return self.aggregate(standardised, labels)

    @abstractmethod
    def aggregate(self, instances: Tensor, labels: Tensor | None = None) -> Aggregation:
        """The same of standardised embeddings."""


class GatedAttention(Aggregator):
    """Gated attention pooling and a linear classifier on the pooled bag.

    For instances h_k of a bag::

        a_k   = softmax_k( wᵀ( tanh(V h_k) ⊙ sigmoid(U h_k) ) )
        logit = cᵀ Σ_k a_k h_k + c_0

    Source: Ilse, Tomczak and Welling 2018 (arXiv 1802.04712), equations 7 and 9.
    """

    attends = True

    def __init__(
        self, dim: int, hidden_dim: int = HIDDEN_DIM, *, generator: torch.Generator
    ) -> None:
        super().__init__(dim)
        self.value = linear(dim, hidden_dim, generator=generator)
        self.gate = linear(dim, hidden_dim, generator=generator)
        # From zero the model starts as logistic regression on the bag's mean, a convex problem, and
        # attention then follows the direction that it found. From random weights, with few bags,
        # training often settles on attending to what is absent from a positive bag.
        self.score = nn.Parameter(torch.zeros(hidden_dim))
        self.classifier = nn.Parameter(torch.zeros(dim))

    def aggregate(self, instances: Tensor, labels: Tensor | None = None) -> Aggregation:
        """Pool standardised instances [..., n, d] by attention."""
        gated = torch.tanh(self.value(instances)) * torch.sigmoid(self.gate(instances))
        attention = (gated @ self.score).softmax(dim=-1)
        pooled = (attention.unsqueeze(-2) @ instances).squeeze(-2)
        logit = pooled @ self.classifier + self.intercept
        return Aggregation(logit, attention, torch.zeros_like(logit))


class MeanPooling(Aggregator):
    """The mean of the instances' logits, which for a linear score is the logit of the bag's mean.

    ``logit = 1/n Σ_k (cᵀ h_k + c_0)``. The weights start at zero: the problem is convex.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.classifier = nn.Parameter(torch.zeros(dim))

    def aggregate(self, instances: Tensor, labels: Tensor | None = None) -> Aggregation:
        """Score standardised instances [..., n, d] and pool the scores."""
        scores = instances @ self.classifier + self.intercept
        logit = self._pool(scores)
        return Aggregation(logit, scores, torch.zeros_like(logit))

    def _pool(self, scores: Tensor) -> Tensor:
        return scores.mean(dim=-1)


class MaxPooling(MeanPooling):
    """The largest of the instances' logits, ``logit = max_k (cᵀ h_k + c_0)``.

    Logits are pooled and not features: the bag is positive because of one instance, and that
    instance has a score of its own. A feature-wise maximum would mix instances into one.
    """

    def _pool(self, scores: Tensor) -> Tensor:
        return scores.amax(dim=-1)


def linear(
    inputs: int, outputs: int, *, generator: torch.Generator, bias: bool = True
) -> nn.Linear:
    """A linear layer with He's normal weights (arXiv 1502.01852) from ``generator``; biases are 0.

    torch's own initialisation would draw from the global stream, which belongs to the caller.
    """
    layer = nn.Linear(inputs, outputs, bias=bias, device="meta").to_empty(device="cpu")
    nn.init.normal_(layer.weight, std=math.sqrt(2 / inputs), generator=generator)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer
