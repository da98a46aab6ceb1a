"""Bag and cell measures: cases by hand, scikit-learn, and what a random ranking gets."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from slam_ags_example.evaluate import (
    BagPrediction,
    bag_metrics,
    cell_metrics,
    expected_average_precision,
    rank_cells,
    summarise,
)


def test_bag_measures_by_hand():
    # Called positive: bags 1, 2, 4. True positives 2, false positives 1, false negatives 1.
    metrics = bag_metrics([True, True, True, False, False], [0.9, 0.5, 0.2, 0.7, 0.1])
    assert metrics["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert metrics["balanced_accuracy"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert metrics["auroc"] == pytest.approx(4 / 6)  # 0.9 beats two, 0.5 one, 0.2 one
    assert metrics["n_bags"] == 5
    assert metrics["n_positive"] == 3
    assert metrics["f1_chance"] == pytest.approx(2 * 0.6 / 1.6)


def test_calling_no_bag_positive_is_an_f1_of_zero_and_no_warning():
    assert bag_metrics([True, False], [0.1, 0.2])["f1"] == 0


@pytest.mark.parametrize("labels", [[True, True], [False, False]])
def test_bags_of_one_kind_are_refused(labels):
    with pytest.raises(ValueError, match="both kinds"):
        bag_metrics(labels, [0.1, 0.9])


def test_cell_measures_by_hand():
    # Ranked: normal, abnormal, normal, abnormal, normal.
    metrics = cell_metrics([0.1, 0.3, 0.2, 0.4, 0.0], [True, True, False, False, False], k=3)
    assert metrics.average_precision == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert metrics.precision_at_positives == pytest.approx(1 / 2)
    assert metrics.positives_at_k == 1
    assert metrics.recall_at_k == pytest.approx(1 / 2)
    assert metrics.k == 3
    assert metrics.prevalence == pytest.approx(2 / 5)
    assert metrics.positives_at_k_chance == pytest.approx(3 * 2 / 5)
    assert metrics.recall_at_k_chance == pytest.approx(3 / 5)


def test_k_beyond_the_bag_takes_the_whole_bag():
    metrics = cell_metrics([0.2, 0.8], [True, False], k=400)
    assert (metrics.k, metrics.positives_at_k, metrics.recall_at_k) == (2, 1, 1.0)
    assert metrics.recall_at_k_chance == 1


@settings(deadline=None, max_examples=100)
@given(truth=st.lists(st.booleans(), min_size=1, max_size=30).filter(any), data=st.data())
def test_average_precision_is_scikit_learns(truth, data):
    scores = data.draw(
        st.lists(st.floats(0, 1), min_size=len(truth), max_size=len(truth)), label="attention"
    )
    metrics = cell_metrics(scores, truth, k=5)
    assert metrics.average_precision == average_precision_score(truth, scores)
    top = rank_cells(scores)[:5]
    assert metrics.positives_at_k == sum(truth[row] for row in top)
    assert 0 <= metrics.recall_at_k <= 1


@pytest.mark.parametrize(("n", "n_positive"), [(1, 1), (2, 1), (5, 2), (6, 3), (6, 6)])
def test_chance_levels_are_the_mean_over_every_ranking(n, n_positive):
    k = 2
    measured = [
        cell_metrics(-np.arange(n), [row in chosen for row in range(n)], k)
        for chosen in itertools.combinations(range(n), n_positive)
    ]

    def mean(field):
        return np.mean([getattr(metrics, field) for metrics in measured])

    assert mean("average_precision") == pytest.approx(expected_average_precision(n, n_positive))
    assert mean("average_precision") == pytest.approx(measured[0].average_precision_chance)
    assert mean("precision_at_positives") == pytest.approx(measured[0].prevalence)
    assert mean("positives_at_k") == pytest.approx(measured[0].positives_at_k_chance)
    assert mean("recall_at_k") == pytest.approx(measured[0].recall_at_k_chance)


def test_random_average_precision_tends_to_the_prevalence():
    assert expected_average_precision(10**6, 10**5) == pytest.approx(0.1, abs=1e-3)
    assert expected_average_precision(20, 2) == pytest.approx(0.22305, abs=1e-5)


@pytest.mark.parametrize(
    ("attention", "abnormal", "k"),
    [([0.5, 0.5], [False, False], 1), ([0.5, 0.5], [True, False], 0), ([1.0], [True, False], 1)],
)
def test_wrong_rankings_are_refused(attention, abnormal, k):
    with pytest.raises(ValueError, match="attention and abnormal"):
        cell_metrics(attention, abnormal, k)


def test_cell_summary_is_the_mean_over_positive_bags_alone():
    def bag(name, positive, attention, abnormal):
        images = tuple(f"{name}/{row}" for row in range(len(attention)))
        return BagPrediction(name, positive, 0.5, images, attention, abnormal)

    predictions = [
        bag("a", True, (0.7, 0.2, 0.1), (True, False, False)),
        bag("b", True, (0.7, 0.2, 0.1), (False, True, False)),
        bag("c", False, (0.7, 0.2, 0.1), (False, False, False)),
    ]
    cell = summarise(predictions, k=1)["cell"]
    assert cell["average_precision"] == pytest.approx((1 + 1 / 2) / 2)
    assert cell["top_k"] == {"k": 1, "positives": 0.5, "chance": pytest.approx(1 / 3)}
    assert cell["n_bags"] == 2
