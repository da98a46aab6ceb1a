"""Prototype-attention MIL: attention that instances get from how they relate to prototypes."""

import warnings

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor, nn
from torch.nn import functional

from slam_ags_example.mil.aggregators import Aggregation, Aggregator, linear

__all__ = ["PrototypeAttention", "initial_prototypes"]

FEATURE_DIM = 512
ATTENTION_DIM = 256
SPREAD_WEIGHT = 0.005  # of each of the two terms that tie instances and prototypes together
AGREEMENT_WEIGHT = 0.1
INSTANCE_WEIGHT = 0.5
N_LABELLED = 8  # instances at either end of the attention that the instance loss labels
CLUSTERED_INSTANCES = 20_000  # k-means sees at most so many


class PrototypeAttention(Aggregator):
    """Attention for each of the two classes from the instances' affinity to prototypes.

    For instances x_n of a bag, prototypes p_j and classes c (0 negative, 1 positive)::

        h_n  = norm(ReLU(W x_n)),  q_j = norm(ReLU(W p_j))
        S_nj = sigmoid(B h_n) · tanh(A q_j)
        a_nc = softmax_n( Σ_j S_nj C_jc ),  z_c = Σ_n a_nc h_n
        s_c  = g_c v_c·z_c / |v_c|,         logit = s_1 - s_0 + intercept
        auxiliary = 0.005 (1 - mean_n max_j R_nj) + 0.005 (1 - mean_j max_n R_nj)

    with R_n = softmax_j S_n. The cross entropy of softmax(s) over two classes is the binary cross
    entropy of the logit, and of two class intercepts only the difference counts. ``scores`` is
    a_n1.

    With ``prototype_prediction`` the prototypes vote too, each by its best instance::

        r = softmax_j(max_n S_nj),  s' = E Σ_j r_j q_j
        s <- (s + s') / 2,  auxiliary += 0.1 KL(softmax(s') || softmax(s)), s' held fixed there

    With ``instance_loss`` and labels, u_nc = f_c·h_n + f_c0 is a logit of instance n belonging to
    class c. The 8 instances with the largest a_nc count as of class c in a bag with that label,
    those with the smallest as not; in a bag of the other label the 8 largest count as not.
    ``auxiliary`` gets 0.5 times the mean binary cross entropy, averaged over the two classes.

    Source: Liu et al., PAMIL, in the form that the SLAM-AGS authors use. Where their equations
    leave room, and deviations: norm is layer norm without weights of its own, since the linear
    layers behind it have them (their script scales h and q to unit length); z_c is not scaled
    again; r needs no division by its largest affinity, which may be 0 or negative. C starts at
    zero, so that attention starts even (see ``GatedAttention``). Prototypes are standardised
    embeddings, learnt like any weight.
    """

    attends = True

    def __init__(
        self,
        prototypes: Tensor,
        *,
        generator: torch.Generator,
        feature_dim: int = FEATURE_DIM,
        attention_dim: int = ATTENTION_DIM,
        prototype_prediction: bool = False,
        instance_loss: bool = False,
    ) -> None:
        """Start from prototypes [P, d]; all other weights come from ``generator``."""
        n_prototypes, dim = prototypes.shape
        super().__init__(dim)
        self.prototypes = nn.Parameter(prototypes.detach().clone())
        self.project = linear(dim, feature_dim, generator=generator)
        self.gate = linear(feature_dim, attention_dim, generator=generator)
        self.value = linear(feature_dim, attention_dim, generator=generator)
        self.mix = nn.Parameter(torch.zeros(n_prototypes, 2))
        self.direction = nn.Parameter(torch.randn(2, feature_dim, generator=generator))
        self.magnitude = nn.Parameter(torch.ones(2))
        self.vote = (
            linear(feature_dim, 2, generator=generator, bias=False)
            if prototype_prediction
            else None
        )
        self.instance = linear(feature_dim, 2, generator=generator) if instance_loss else None

    def aggregate(self, instances: Tensor, labels: Tensor | None = None) -> Aggregation:
        """Pool standardised instances [..., n, d] by each class's attention."""
        features, prototypes = self._features(instances), self._features(self.prototypes)
        affinity = torch.sigmoid(self.gate(features)) @ torch.tanh(self.value(prototypes)).mT
        attention = (affinity @ self.mix).softmax(dim=-2)
        pooled = attention.mT @ features
        classes = (pooled * functional.normalize(self.direction, dim=-1)).sum(dim=-1)
        classes = classes * self.magnitude + self._intercepts()
        auxiliary = SPREAD_WEIGHT * _spread(affinity)
        if self.vote is not None:
            share = affinity.amax(dim=-2).softmax(dim=-1)
            voted = self.vote(share @ prototypes) + self._intercepts()
            auxiliary = auxiliary + AGREEMENT_WEIGHT * _divergence(voted.detach(), classes)
            classes = (classes + voted) / 2
        if self.instance is not None and labels is not None:
            logits = self.instance(features)
            auxiliary = auxiliary + INSTANCE_WEIGHT * _instance_loss(logits, attention, labels)
        return Aggregation(classes[..., 1] - classes[..., 0], attention[..., 1], auxiliary)

    def _features(self, embeddings: Tensor) -> Tensor:
        rectified = torch.relu(self.project(embeddings))
        return functional.layer_norm(rectified, rectified.shape[-1:])

    def _intercepts(self) -> Tensor:
        """Of the two classes, [2]: only their difference counts, so the negative class has 0."""
        return torch.stack([torch.zeros_like(self.intercept), self.intercept])


def _spread(affinity: Tensor) -> Tensor:
    """[...] of [..., n, P]: each instance near one prototype, each prototype near an instance."""
    share = affinity.softmax(dim=-1)
    return 2 - share.amax(dim=-1).mean(dim=-1) - share.amax(dim=-2).mean(dim=-1)


def _divergence(target: Tensor, classes: Tensor) -> Tensor:
    """KL(softmax(target) || softmax(classes)), [...] of [..., 2]."""
    log_target, log_classes = target.log_softmax(dim=-1), classes.log_softmax(dim=-1)
    return (log_target.exp() * (log_target - log_classes)).sum(dim=-1)


def _instance_loss(logits: Tensor, attention: Tensor, labels: Tensor) -> Tensor:
    """[...] of logits and attention [..., n, 2] and labels [...]."""
    k = min(N_LABELLED, attention.shape[-2])
    own = torch.stack([1 - labels, labels], dim=-1)  # 1 for the class that the bag's label names
    top = logits.gather(-2, attention.topk(k, dim=-2).indices)
    bottom = logits.gather(-2, attention.topk(k, dim=-2, largest=False).indices)
    of_top = functional.binary_cross_entropy_with_logits(
        top, own.unsqueeze(-2).expand_as(top), reduction="none"
    ).mean(dim=-2)
    of_bottom = functional.softplus(bottom).mean(dim=-2)
    return torch.where(own == 1, (of_top + of_bottom) / 2, of_top).mean(dim=-1)


def initial_prototypes(instances: Tensor, n_prototypes: int, *, seed: int) -> Tensor:
    """Centres of k-means, [P, d]: the same seed gives the same ones.

    Args:
        instances: [..., d], standardised training embeddings; of more than
            ``CLUSTERED_INSTANCES`` a random subset is clustered.
        n_prototypes: P, lowered to the number of instances where there are fewer.
        seed: of the subset and of k-means++.
    """
    rows = instances.flatten(end_dim=-2).cpu().numpy()
    random = np.random.default_rng(seed)
    if len(rows) > CLUSTERED_INSTANCES:
        rows = rows[random.choice(len(rows), CLUSTERED_INSTANCES, replace=False)]
    model = KMeans(min(n_prototypes, len(rows)), n_init=1, random_state=int(random.integers(2**31)))
    with warnings.catch_warnings():
        # Of embeddings that coincide there are fewer than P; centres that coincide do no harm.
        warnings.simplefilter("ignore", ConvergenceWarning)
        centres = model.fit(rows).cluster_centers_
    return torch.from_numpy(centres).to(instances)
