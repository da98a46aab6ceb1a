"""A first guess of what makes a bag positive: one direction, searched from many starts."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Concept", "find_concept"]

MAX_STARTS, MIN_STARTS = 256, 16
# Products of an embedding's feature and a direction's in one pass over the training bags: 256
# starts on 40 bags of 100 instances of 256 features. Larger sets get fewer starts.
PRODUCTS = 256 * 40 * 100 * 256
STEPS = 100
STEPS_PER_CHECK = 10
LEARNING_RATE = 3e-2
WEIGHT_DECAY = 1e-2
START_NORM = 4.0  # on embeddings of rms 0.3 per feature: logits that spread by about one


@dataclass(frozen=True)
class Concept:
    """A linear logit of an instance being what makes its bag positive: ``wᵀ h + b``.

    Attributes:
        weight: w, [d].
        bias: b, 0-dim.
    """

    weight: Tensor
    bias: Tensor

    def logits(self, instances: Tensor) -> Tensor:
        """[..., n] of standardised instances [..., n, d]."""
        return instances @ self.weight + self.bias


def find_concept(
    instances: Tensor,
    labels: Tensor,
    validation_instances: Tensor,
    validation_labels: Tensor,
    *,
    random: torch.Generator,
) -> Concept:
    """Search one direction from many starts; keep the one with the lowest validation loss.

    The bag's logit is the smooth maximum of its instances' (Ramon and De Raedt 2000)::

        logit = log Σ_k exp(wᵀ h_k + b)

    A start points at a random instance of a positive bag, as in diverse density (Maron and
    Lozano-Pérez 1998). All starts descend side by side on whole bags. With one abnormal instance
    of 100 and 20 bags of a kind, single descents mostly end in a direction that only tells the
    training bags apart.

    Args:
        instances: [B, n, d], standardised, of the training bags.
        labels: [B], 0 or 1, both there.
        validation_instances: [B', n', d].
        validation_labels: [B'].
        random: a CPU generator, which draws the starts.
    """
    weight = _starts(instances, labels, random)
    peaks = torch.stack([(bag @ weight).amax(dim=0) for bag in instances])
    bias = -peaks.mean(dim=0)
    weight.requires_grad_()
    bias.requires_grad_()
    optimizer = torch.optim.AdamW([weight, bias], lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    best = torch.full_like(bias, torch.inf, requires_grad=False)
    kept_weight, kept_bias = weight.detach().clone(), bias.detach().clone()
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        torch.autograd.backward(_losses(instances, labels, weight, bias).sum())
        optimizer.step()
        if step % STEPS_PER_CHECK == 0:
            with torch.no_grad():
                losses = _losses(validation_instances, validation_labels, weight, bias)
                better = losses < best
                best = torch.where(better, losses, best)
                kept_weight = torch.where(better, weight, kept_weight)
                kept_bias = torch.where(better, bias, kept_bias)
    chosen = best.argmin()
    return Concept(kept_weight[:, chosen].clone(), kept_bias[chosen].clone())


def _starts(instances: Tensor, labels: Tensor, random: torch.Generator) -> Tensor:
    """Directions of norm START_NORM as columns, [d, R]."""
    suspects = instances[labels == 1].flatten(end_dim=1)
    n_starts = max(MIN_STARTS, min(MAX_STARTS, PRODUCTS // instances.numel()))
    rows = torch.randperm(len(suspects), generator=random)[:n_starts]
    return START_NORM * functional.normalize(suspects[rows.to(suspects.device)], dim=1).T


def _losses(instances: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Mean cross entropy of each of R directions over the bags, [R]."""
    logits = (instances @ weight).logsumexp(dim=1) + bias
    targets = labels.unsqueeze(1).expand_as(logits)
    loss = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return loss.mean(dim=0)
