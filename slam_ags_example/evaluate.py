"""Bag-level and cell-level measures, each beside its 95% interval and its chance level."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    f1_score,
    roc_auc_score,
)

from slam_ags_example.config import stream_seed

__all__ = [
    "DECISION_THRESHOLD",
    "BagPrediction",
    "CellMetrics",
    "bag_metrics",
    "cell_metrics",
    "expected_average_precision",
    "per_bag_rows",
    "per_cell_rows",
    "rank_cells",
    "summarise",
]

DECISION_THRESHOLD = 0.5
N_RESAMPLES = 5000  # an interval's end is then off by a hundredth of the width (standard error)
_INTERVAL = (0.025, 0.975)


@dataclass(frozen=True)
class BagPrediction:
    """What the model said about one bag, beside the truth.

    Attributes:
        bag: the bag's name.
        positive: the bag's label.
        probability: of the bag being positive, in [0, 1].
        images: the reference of each instance.
        scores: by which the instances are ranked, one each, the higher the more suspicious:
            attention, or the instance's own logit where the model pools without attention.
        abnormal: the truth about each instance.
    """

    bag: str
    positive: bool
    probability: float
    images: tuple[str, ...]
    scores: tuple[float, ...]
    abnormal: tuple[bool, ...]


@dataclass(frozen=True)
class CellMetrics:
    """How well the scores rank the cells of one positive bag; ``*_chance``: a random ranking's.

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


def rank_cells(scores: ArrayLike) -> NDArray[np.int64]:
    """Instances by falling score, [n]; ties keep the bag's order, which is random."""
    return np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable")


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


def cell_metrics(scores: ArrayLike, abnormal: ArrayLike, k: int) -> CellMetrics:
    """Measure the ranking of one positive bag.

    Args:
        scores: [n], the higher the more suspicious.
        abnormal: [n] booleans, at least one true.
        k: K >= 1; a smaller bag is taken whole.

    Raises:
        ValueError: there is no abnormal cell, K < 1, or the lengths differ.
    """
    truth = np.asarray(abnormal, dtype=bool)
    n, n_positive = len(truth), int(truth.sum())
    if n_positive < 1 or k < 1 or np.shape(scores) != truth.shape:
        raise ValueError(
            "scores and abnormal must have one length, with an abnormal cell, and k >= 1; got "
            f"shapes {np.shape(scores)} and {truth.shape}, {n_positive} abnormal, k = {k}"
        )
    k = min(k, n)
    ranked = truth[rank_cells(scores)]
    positives_at_k = int(ranked[:k].sum())
    return CellMetrics(
        average_precision=float(average_precision_score(truth, scores)),
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


def summarise(
    predictions: Sequence[BagPrediction], k: int, *, seed: int, n_resamples: int = N_RESAMPLES
) -> dict[str, dict[str, Any]]:
    """The ``bag`` and ``cell`` parts of metrics.json; cell measures are means over positive bags.

    Beside each measure ``x`` stands ``x_interval``, its 95% percentile bootstrap interval: test
    bags are drawn again with replacement, as many of either label as there are. It holds the
    chance of which bags were tested, not that of training; with few bags it is too narrow, and
    where every bag is right it has no width at all.

    Args:
        predictions: of all bags of a split, both labels.
        k: K of the retrieval measures.
        seed: the run's; the resamples have a stream of their own.
        n_resamples: bootstrap resamples.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", section 13.3.
    """
    random = np.random.default_rng(stream_seed(seed, "intervals"))
    labels = [prediction.positive for prediction in predictions]
    probabilities = [prediction.probability for prediction in predictions]
    measures = bag_metrics(labels, probabilities)  # first, as it refuses bags of one kind
    drawn = {
        label: random.multinomial(count, np.full(count, 1 / count), size=n_resamples)
        for label, count in [(True, labels.count(True)), (False, labels.count(False))]
    }
    intervals = _bag_intervals(np.array(labels), np.array(probabilities), drawn)
    cells = [cell_metrics(bag.scores, bag.abnormal, k) for bag in predictions if bag.positive]
    return {
        "bag": {**measures, **intervals, "n_resamples": n_resamples},
        "cell": {**_summarise_cells(cells, drawn[True]), "n_resamples": n_resamples},
    }


def _bag_intervals(
    labels: NDArray[np.bool_],
    probabilities: NDArray[np.float64],
    drawn: dict[bool, NDArray[np.int64]],
) -> dict[str, list[float]]:
    """Intervals of the bag measures; ``drawn``: how often each bag of a label is in a resample."""
    positive, negative = probabilities[labels], probabilities[~labels]
    n_positive, n_negative = len(positive), len(negative)
    wins = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
    auroc = ((drawn[True] @ wins) * drawn[False]).sum(axis=1) / (n_positive * n_negative)
    true_positive = drawn[True] @ (positive >= DECISION_THRESHOLD)
    false_positive = drawn[False] @ (negative >= DECISION_THRESHOLD)
    sensitivity, specificity = true_positive / n_positive, 1 - false_positive / n_negative
    return {
        "f1_interval": _interval(2 * true_positive / (true_positive + false_positive + n_positive)),
        "auroc_interval": _interval(auroc),
        "balanced_accuracy_interval": _interval((sensitivity + specificity) / 2),
    }


def _summarise_cells(cells: Sequence[CellMetrics], drawn: NDArray[np.int64]) -> dict[str, Any]:
    """Means over bags, and intervals; ``drawn``: how often each bag is in a resample."""

    def mean(field: str) -> float:
        return float(np.mean([getattr(cell, field) for cell in cells]))

    def measure(field: str, name: str) -> dict[str, Any]:
        values = np.array([getattr(cell, field) for cell in cells], dtype=np.float64)
        # Not @: how BLAS adds up, and so the last bit, may depend on the number of threads.
        resampled = np.einsum("rb,b->r", drawn, values) / len(cells)
        return {name: mean(field), f"{name}_interval": _interval(resampled)}

    return {
        **measure("average_precision", "average_precision"),
        "chance": mean("prevalence"),
        "average_precision_chance": mean("average_precision_chance"),
        **measure("precision_at_positives", "precision_at_positives"),
        "precision_at_positives_chance": mean("prevalence"),
        **measure("recall_at_k", "recall_at_k"),
        "recall_at_k_chance": mean("recall_at_k_chance"),
        "top_k": {
            "k": max(cell.k for cell in cells),
            **measure("positives_at_k", "positives"),
            "chance": mean("positives_at_k_chance"),
        },
        "n_bags": len(cells),
    }


def _interval(resampled: NDArray[np.float64]) -> list[float]:
    low, high = np.quantile(resampled, _INTERVAL)
    return [float(low), float(high)]


def per_bag_rows(predictions: Sequence[BagPrediction], k: int) -> list[dict[str, Any]]:
    """The rows of test_bags.csv; every number of ``summarise`` follows from them.

    Args:
        predictions: of bags of any label.
        k: K of the retrieval measures.

    Returns:
        One row a bag: its name, label and probability, the number of its cells and of the abnormal
        ones, and the fields of :class:`CellMetrics`, all None for a negative bag.
    """
    nothing = dict.fromkeys(field.name for field in fields(CellMetrics))
    return [
        {
            "bag": bag.bag,
            "positive": int(bag.positive),
            "probability": bag.probability,
            "n_cells": len(bag.images),
            "n_abnormal": sum(bag.abnormal),
            **(asdict(cell_metrics(bag.scores, bag.abnormal, k)) if bag.positive else nothing),
        }
        for bag in predictions
    ]


def per_cell_rows(predictions: Sequence[BagPrediction]) -> list[dict[str, Any]]:
    """The rows of test_cells.csv: the cells of each bag by rank, from 1, with score and truth."""
    return [
        {
            "bag": bag.bag,
            "rank": rank,
            "image": bag.images[row],
            "score": bag.scores[row],
            "abnormal": int(bag.abnormal[row]),
        }
        for bag in predictions
        for rank, row in enumerate(rank_cells(bag.scores), start=1)
    ]
