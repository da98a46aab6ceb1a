"""Retrieval curves: what is found among the top k cells of positive bags, for every k."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["RetrievalCurve", "retrieval_curve"]


@dataclass(frozen=True)
class RetrievalCurve:
    """Recall and precision among the top k cells of B bags of n, for k = 1 to n.

    Attributes:
        recall: [B, n], share of each bag's abnormal cells that is among its top k.
        recall_chance: [n], the expectation under a random ranking, k/n.
        precision: [B, n], share of abnormal cells among the top k.
        precision_chance: [B], the prevalence, whatever k is.
    """

    recall: NDArray[np.float64]
    recall_chance: NDArray[np.float64]
    precision: NDArray[np.float64]
    precision_chance: NDArray[np.float64]


def retrieval_curve(ranked: ArrayLike) -> RetrievalCurve:
    """Count what is found among the top k, for every k.

    Args:
        ranked: [B, n] booleans, the truth about the cells of each bag by falling score.

    Raises:
        ValueError: a bag holds no abnormal cell, or ``ranked`` is no matrix.
    """
    truth = np.asarray(ranked, dtype=bool)
    if truth.ndim != 2 or not truth.any(axis=1).all():
        raise ValueError(
            "ranked must be [B, n] with an abnormal cell in every row, got "
            f"shape {truth.shape} with {truth.sum(axis=-1).tolist()} abnormal"
        )
    n = truth.shape[1]
    found, k = truth.cumsum(axis=1), np.arange(1, n + 1)
    n_positive = found[:, -1]
    return RetrievalCurve(
        recall=found / n_positive[:, None],
        recall_chance=k / n,
        precision=found / k,
        precision_chance=n_positive / n,
    )
