"""Bag-level and cell-level measures, each beside its chance level."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    f1_score,
    roc_auc_score,
)

__all__ = [
    "BagPrediction",
    "CellMetrics",
    "bag_metrics",
    "cell_metrics",
    "expected_average_precision",
    "rank_cells",
    "summarise",
]

DECISION_THRESHOLD = 0.5


@dataclass(frozen=True)
class BagPrediction:
    """What the model said about one bag, beside the truth.

    Attributes:
        bag: the bag's name.
        positive: the bag's label.
        probability: of the bag being positive, in [0, 1].
        images: the reference of each instance.
        attention: one weight an instance, summing to 1.
        abnormal: the truth about each instance.
    """

    bag: str
    positive: bool
    probability: float
    images: tuple[str, ...]
    attention: tuple[float, ...]
    abnormal: tuple[bool, ...]


@dataclass(frozen=True)
class CellMetrics:
    """How well attention ranks the cells of one positive bag; ``*_chance``: a random ranking's.

    Attributes:
        average_precision: in (0, 1].
        average_precision_chance: its exact expectation; above the prevalence in a small bag.
        precision_at_positives: precision among the top P, where P is the bag's abnormal count.
        prevalence: P/n, the chance level of every precision.
        positives_at_k: abnormal cells among the top K.
        recall_at_k: positives_at_k / P.
        k: K, at most n.
        positives_at_k_chance: K·P/n.
        recall_at_k_chance: K/n.
    """

    average_precision: float
    average_precision_chance: float
    precision_at_positives: float
    prevalence: float
    positives_at_k: int
    recall_at_k: float
    k: int
    positives_at_k_chance: float
    recall_at_k_chance: float


def rank_cells(attention: ArrayLike) -> NDArray[np.int64]:
    """Instances by falling attention, [n]; ties keep the bag's order, which is random."""
    return np.argsort(-np.asarray(attention, dtype=np.float64), kind="stable")


def expected_average_precision(n: int, n_positive: int) -> float:
    """Average precision that a uniformly random ranking has on average.

    The cell at rank i is positive with probability P/n, and the i - 1 before it then hold
    (i - 1)(P - 1)/(n - 1) positives on average::

        E[AP] = 1/n · Σ_{i=1..n} 1/i · (1 + (i - 1)(P - 1)/(n - 1))

    It tends to the prevalence P/n for large n, and is well above it in a small bag: 0.223 for two
    positives among 20.

    Args:
        n: cells in the bag, n >= 1.
        n_positive: P, from 1 to n.
    """
    rank = np.arange(1, n + 1, dtype=np.float64)
    before = (rank - 1) * (n_positive - 1) / max(n - 1, 1)
    return float(((1 + before) / rank).mean())


def cell_metrics(attention: ArrayLike, abnormal: ArrayLike, k: int) -> CellMetrics:
    """Measure the ranking of one positive bag.

    Args:
        attention: [n] weights, the higher the more suspicious.
        abnormal: [n] booleans, at least one true.
        k: K >= 1; a smaller bag is taken whole.

    Raises:
        ValueError: there is no abnormal cell, K < 1, or the lengths differ.
    """
    truth = np.asarray(abnormal, dtype=bool)
    n, n_positive = len(truth), int(truth.sum())
    if n_positive < 1 or k < 1 or np.shape(attention) != truth.shape:
        raise ValueError(
            "attention and abnormal must have one length, with an abnormal cell, and k >= 1; got "
            f"shapes {np.shape(attention)} and {truth.shape}, {n_positive} abnormal, k = {k}"
        )
    k = min(k, n)
    ranked = truth[rank_cells(attention)]
    positives_at_k = int(ranked[:k].sum())
    return CellMetrics(
        average_precision=float(average_precision_score(truth, attention)),
        average_precision_chance=expected_average_precision(n, n_positive),
        precision_at_positives=float(ranked[:n_positive].mean()),
        prevalence=n_positive / n,
        positives_at_k=positives_at_k,
        recall_at_k=positives_at_k / n_positive,
        k=k,
        positives_at_k_chance=k * n_positive / n,
        recall_at_k_chance=k / n,
    )


def bag_metrics(labels: ArrayLike, probabilities: ArrayLike) -> dict[str, float | int]:
    """F1 and balanced accuracy at a threshold of 0.5, and AUROC, over bags of both labels.

    Args:
        labels: [B] booleans.
        probabilities: [B], of being positive.

    Raises:
        ValueError: the labels are all the same.
    """
    truth = np.asarray(labels, dtype=bool)
    if truth.all() or not truth.any():
        raise ValueError(f"labels must hold both kinds of bag, got {len(truth)} of one kind")
    decided = np.asarray(probabilities) >= DECISION_THRESHOLD
    return {
        "f1": float(f1_score(truth, decided, zero_division=0.0)),
        "auroc": float(roc_auc_score(truth, probabilities)),
        "balanced_accuracy": float(balanced_accuracy_score(truth, decided)),
        "n_bags": len(truth),
        "n_positive": int(truth.sum()),
        **_bag_chance(float(truth.mean())),
    }


def _bag_chance(positive_share: float) -> dict[str, float]:
    """F1 of calling every bag positive, which beats a coin's; AUROC and accuracy of a coin."""
    all_positive = 2 * positive_share / (1 + positive_share)
    return {"f1_chance": all_positive, "auroc_chance": 0.5, "balanced_accuracy_chance": 0.5}


def summarise(predictions: Sequence[BagPrediction], k: int) -> dict[str, dict[str, object]]:
    """The ``bag`` and ``cell`` parts of metrics.json; cell measures are means over positive bags.

    Args:
        predictions: of all bags of a split, both labels.
        k: K of the retrieval measures.
    """
    cells = [cell_metrics(p.attention, p.abnormal, k) for p in predictions if p.positive]

    def mean(field: str) -> float:
        return float(np.mean([getattr(cell, field) for cell in cells]))

    return {
        "bag": dict(bag_metrics([p.positive for p in predictions], _probabilities(predictions))),
        "cell": {
            "average_precision": mean("average_precision"),
            "chance": mean("prevalence"),
            "average_precision_chance": mean("average_precision_chance"),
            "precision_at_positives": mean("precision_at_positives"),
            "precision_at_positives_chance": mean("prevalence"),
            "recall_at_k": mean("recall_at_k"),
            "recall_at_k_chance": mean("recall_at_k_chance"),
            "top_k": {
                "k": max(cell.k for cell in cells),
                "positives": mean("positives_at_k"),
                "chance": mean("positives_at_k_chance"),
            },
            "n_bags": len(cells),
        },
    }


def _probabilities(predictions: Sequence[BagPrediction]) -> list[float]:
    return [prediction.probability for prediction in predictions]
