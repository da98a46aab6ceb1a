"""The intercept of an aggregator, fitted by itself to whole bags."""

import torch
from torch import Tensor
from torch.nn import functional

from slam_ags_example.mil.aggregators import Aggregator

__all__ = ["fit_intercept", "fitted_loss"]


@torch.no_grad()
def fit_intercept(model: Aggregator, instances: Tensor, labels: Tensor) -> None:
    """Set the intercept to its maximum likelihood on standardised bags [B, n, d]."""
    logits = model.aggregate(instances).logit.double().cpu()
    model.intercept.add_(_shift(logits, float(labels.mean())))


@torch.no_grad()
def fitted_loss(model: Aggregator, instances: Tensor, labels: Tensor) -> float:
    """Mean cross entropy with the intercept that fits these bags; NaN if a logit is not finite."""
    logits = model.aggregate(instances).logit.double().cpu()
    if not logits.isfinite().all():
        return float("nan")
    shifted = logits + _shift(logits, float(labels.mean()))
    return float(functional.binary_cross_entropy_with_logits(shifted, labels.double().cpu()))


def _shift(logits: Tensor, positive_share: float) -> float:
    """Maximum likelihood of an intercept: the mean probability is the share of positives.

    The mean grows with the intercept, so bisection finds it; 60 halvings are exact to rounding.
    """
    high = float(logits.abs().max()) + 40.0  # beyond 40 a probability is 0 or 1 to rounding
    low = -high
    for _ in range(60):
        middle = (low + high) / 2
        if float((logits + middle).sigmoid().mean()) < positive_share:
            low = middle
        else:
            high = middle
    return middle
