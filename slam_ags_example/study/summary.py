"""Means over seeds with their intervals, and differences within pairs of runs on the same bags."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

from slam_ags_example.study.rows import CHANCE, MEASURES, Row

__all__ = ["Difference", "Interval", "Summary", "mean_interval", "paired_difference", "summarise"]

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and how sure it is.

    Attributes:
        n: seeds.
        mean: over the seeds.
        half_width: the 95% interval is mean ± half_width; None for a single seed.
    """

    n: int
    mean: float
    half_width: float | None

    def flat(self, name: str) -> dict[str, Any]:
        """The interval as summary.csv has it: ``name``, ``name_low``, ``name_high``."""
        width = self.half_width
        return {
            name: self.mean,
            f"{name}_low": None if width is None else self.mean - width,
            f"{name}_high": None if width is None else self.mean + width,
        }


@dataclass(frozen=True)
class Difference:
    """The reference method minus another, seed by seed.

    Attributes:
        interval: of the mean difference, over seeds that both methods have.
        won: seeds at which the reference is higher.
        lost: seeds at which the reference is lower.
    """

    interval: Interval
    won: int
    lost: int


@dataclass(frozen=True)
class Summary:
    """What all seeds say about one measure of one method at one witness rate.

    Attributes:
        witness_rate: share of abnormal patches in a positive bag.
        method: its label.
        measure: a name of ``MEASURES``.
        interval: over seeds.
        chance: mean chance level of the same runs; None where the measure has none.
        difference: the reference minus this method; None for the reference itself, and where no
            seed has both.
    """

    witness_rate: float
    method: str
    measure: str
    interval: Interval
    chance: float | None
    difference: Difference | None

    def flat(self, reference: str) -> dict[str, Any]:
        """The row as summary.csv has it."""
        difference = self.difference
        nothing = dict.fromkeys(("difference", "difference_low", "difference_high"))
        return {
            "witness_rate": self.witness_rate,
            "method": self.method,
            "measure": self.measure,
            "n_seeds": self.interval.n,
            **self.interval.flat("mean"),
            "chance": self.chance,
            "reference": reference if difference else None,
            "n_pairs": difference.interval.n if difference else None,
            **(difference.interval.flat("difference") if difference else nothing),
            "won": difference.won if difference else None,
            "lost": difference.lost if difference else None,
        }


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean and its 95% Student-t interval.

    ::

        x̄ ± t(0.975; n - 1) · s / sqrt(n),    s² = Σ (x_i - x̄)² / (n - 1)

    Args:
        values: [n], n >= 1, one a seed.

    Source: Student 1908, "The Probable Error of a Mean".
    """
    sample = np.asarray(values, dtype=np.float64)
    n, mean = len(sample), float(sample.mean())
    if n == 1:
        return Interval(n, mean, None)
    quantile = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2))
    return Interval(n, mean, quantile * float(sample.std(ddof=1)) / math.sqrt(n))


def paired_difference(
    reference: Mapping[int, float], other: Mapping[int, float]
) -> Difference | None:
    """Reference minus other over the seeds that both have; None where there is no such seed.

    Both met the same bags, weights and views, so what a seed adds to both cancels, and the
    interval of the difference is narrower than two separate intervals suggest.

    Args:
        reference: a measure of the reference method by seed.
        other: the same measure of the method it is compared to.
    """
    differences = [reference[seed] - other[seed] for seed in reference if seed in other]
    if not differences:
        return None
    return Difference(
        interval=mean_interval(differences),
        won=sum(difference > 0 for difference in differences),
        lost=sum(difference < 0 for difference in differences),
    )


def summarise(rows: Sequence[Row], reference: str) -> list[Summary]:
    """One summary for each witness rate, method and measure that has a value.

    Args:
        rows: of a study; those that failed have no measures, and count nowhere.
        reference: label of the method that others are compared to.

    Returns:
        By witness rate, method and measure, in the order of the rows and of ``MEASURES``.
    """
    summaries = []
    for rate in dict.fromkeys(row.witness_rate for row in rows):
        at_rate = [row for row in rows if row.witness_rate == rate]
        for method in dict.fromkeys(row.label for row in at_rate):
            for measure in MEASURES:
                values = _by_seed(at_rate, method, measure)
                if not values:
                    continue
                chance = [row.chance.get(measure) for row in at_rate if row.label == method]
                difference = paired_difference(_by_seed(at_rate, reference, measure), values)
                summaries.append(
                    Summary(
                        witness_rate=rate,
                        method=method,
                        measure=measure,
                        interval=mean_interval(list(values.values())),
                        chance=_mean(chance) if measure in CHANCE else None,
                        difference=None if method == reference else difference,
                    )
                )
    return summaries


def _by_seed(rows: Sequence[Row], method: str, measure: str) -> dict[int, float]:
    return {
        row.seed: value
        for row in rows
        if row.label == method
        for value in [row.measures.get(measure)]
        if value is not None
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
