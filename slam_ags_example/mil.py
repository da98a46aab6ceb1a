"""Multiple-instance learning: gated attention over the instances of a bag."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from slam_ags_example.config import RunConfig, generator
from slam_ags_example.encoder import own_stream

__all__ = ["BagSet", "GatedAttentionMIL", "MILRecord", "train_mil"]

HIDDEN_DIM = 64
BAGS_PER_BATCH = 8
KEPT_SHARE = 0.75  # of a bag's instances, drawn anew at each step of training


@dataclass(frozen=True)
class BagSet:
    """Bags of one split as tensors.

    Attributes:
        instances: [B, n, d], embeddings of the instances of each bag.
        labels: [B], 1 for a positive bag and 0 for a negative one, floating point.
    """

    instances: Tensor
    labels: Tensor


@dataclass(frozen=True)
class MILRecord:
    """Mean cross entropy of one epoch, in nats per bag, on training and on validation bags."""

    epoch: int
    train_loss: float
    validation_loss: float


class GatedAttentionMIL(nn.Module):
    """Gated attention pooling and a linear classifier on the pooled bag.

    For instances h_k of a bag::

        a_k   = softmax_k( wᵀ( tanh(V h_k) ⊙ sigmoid(U h_k) ) )
        logit = cᵀ Σ_k a_k h_k + c_0

    Source: Ilse, Tomczak and Welling 2018 (arXiv 1802.04712), equations 7 and 9.
    """

    def __init__(
        self, dim: int, hidden_dim: int = HIDDEN_DIM, *, generator: torch.Generator
    ) -> None:
        super().__init__()
        with own_stream(self, generator):
            self.value = nn.Linear(dim, hidden_dim)
            self.gate = nn.Linear(dim, hidden_dim)
            self.score = nn.Linear(hidden_dim, 1)
            self.classifier = nn.Linear(dim, 1)
        # From zero the model starts as logistic regression on the bag's mean, a convex problem, and
        # attention then follows the direction that it found. From random weights, with few bags,
        # training often settles on attending to what is absent from a positive bag.
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.classifier.weight)

    def forward(self, instances: Tensor) -> tuple[Tensor, Tensor]:
        """Classify bags.

        Args:
            instances: [..., n, d].

        Returns:
            The logits [...] of a bag being positive, and the attention [..., n], whose sum over the
            instances of a bag is 1.
        """
        gated = torch.tanh(self.value(instances)) * torch.sigmoid(self.gate(instances))
        attention = self.score(gated).squeeze(-1).softmax(dim=-1)
        pooled = (attention.unsqueeze(-1) * instances).sum(dim=-2)
        return self.classifier(pooled).squeeze(-1), attention


def train_mil(
    train: BagSet,
    validation: BagSet,
    config: RunConfig,
    *,
    on_epoch: Callable[[MILRecord], None] = lambda record: None,
) -> tuple[GatedAttentionMIL, list[MILRecord], int]:
    """Train on training bags; keep the epoch with the lowest loss on validation bags.

    The classifier's intercept is then set on the validation bags: training on parts of bags shifts
    it, and what a whole bag looks like decides at which logit 0.5 lies.

    Args:
        train: the bags that gradients come from.
        validation: the bags that choose the epoch and the intercept, and nothing else.
        config: MIL epochs, learning rate, weight decay, seed.
        on_epoch: called after each epoch.

    Returns:
        The model of the chosen epoch, one record an epoch, and the chosen epoch (from 1).
    """
    device = train.instances.device
    # One stream on the CPU, so that every device starts from the same weights and batches.
    random = generator(config.seed, "mil")
    model = GatedAttentionMIL(train.instances.shape[-1], generator=random).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.mil_learning_rate, weight_decay=config.mil_weight_decay
    )
    best_loss, best_epoch, best_state = float("inf"), 0, model.state_dict()
    records: list[MILRecord] = []
    for epoch in range(1, config.mil_epochs + 1):
        model.train()
        for rows in torch.split(
            torch.randperm(len(train.labels), generator=random), BAGS_PER_BATCH
        ):
            rows = rows.to(device)
            optimizer.zero_grad()
            kept = _draw_instances(train.instances[rows], random)
            loss = _loss(model, BagSet(kept, train.labels[rows]))
            torch.autograd.backward(loss)
            optimizer.step()
        model.eval()
        with torch.no_grad():
            record = MILRecord(epoch, float(_loss(model, train)), float(_loss(model, validation)))
        if record.validation_loss < best_loss:
            best_loss, best_epoch = record.validation_loss, epoch
            best_state = copy.deepcopy(model.state_dict())
        records.append(record)
        on_epoch(record)
    model.load_state_dict(best_state)
    _set_intercept(model, validation)
    return model, records, best_epoch


@torch.no_grad()
def _set_intercept(model: GatedAttentionMIL, bags: BagSet) -> None:
    """Maximum likelihood of the intercept alone: the mean probability is the share of positives.

    The mean grows with the intercept, so bisection finds it; 60 halvings are exact to rounding.
    """
    logits = model(bags.instances)[0].double()
    reach = float(logits.abs().max()) + 20.0
    low, high = -reach, reach
    for _ in range(60):
        middle = (low + high) / 2
        if float((logits + middle).sigmoid().mean()) < float(bags.labels.mean()):
            low = middle
        else:
            high = middle
    model.classifier.bias.add_(middle)


def _draw_instances(instances: Tensor, random: torch.Generator) -> Tensor:
    """A random subset of each bag, [B, kept, d]: the few bags are not learnt by heart.

    A positive bag can lose all its abnormal instances; over the epochs that is label noise alike
    for every bag.
    """
    n_bags, n, dim = instances.shape
    n_kept = max(1, round(KEPT_SHARE * n))
    rows = torch.rand(n_bags, n, generator=random).topk(n_kept, dim=1).indices
    index = rows.to(instances.device).unsqueeze(-1).expand(-1, -1, dim)
    return instances.gather(1, index)


def _loss(model: GatedAttentionMIL, bags: BagSet) -> Tensor:
    logits, _ = model(bags.instances)
    return functional.binary_cross_entropy_with_logits(logits, bags.labels)
