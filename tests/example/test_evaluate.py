"""Bag and cell measures: by hand, scikit-learn, random rankings, resampled bags, tables."""

import csv
import itertools
import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    f1_score,
    roc_auc_score,
)

from slam_ags_example.config import stream_seed
from slam_ags_example.evaluate import (
    BagPrediction,
    CellMetrics,
    bag_metrics,
    cell_metrics,
    expected_average_precision,
    per_bag_rows,
    per_cell_rows,
    rank_cells,
    summarise,
)
from slam_ags_example.output import write_csv

INTERVALS = ("f1", "auroc", "balanced_accuracy")
CELL_MEASURES = ("average_precision", "precision_at_positives", "recall_at_k")


def draw_predictions(n_bags, n_cells, seed):
    """Every other bag positive, with one to three abnormal cells; two bags share a probability."""
    random = np.random.default_rng(seed)
    predictions = []
    for row in range(n_bags):
        positive = row % 2 == 1
        abnormal = np.zeros(n_cells, dtype=bool)
        if positive:
            abnormal[random.permutation(n_cells)[: 1 + row % 3]] = True
        predictions.append(
            BagPrediction(
                bag=f"bag-{row}",
                positive=positive,
                probability=0.5 if row < 2 else float(random.beta(2 + 2 * positive, 3)),
                images=tuple(f"{row}/{cell}.png" for cell in range(n_cells)),
                scores=tuple((random.normal(size=n_cells) + 1.5 * abnormal).tolist()),
                abnormal=tuple(abnormal.tolist()),
            )
        )
    return predictions


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
        st.lists(st.floats(0, 1), min_size=len(truth), max_size=len(truth)), label="scores"
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
    ("scores", "abnormal", "k"),
    [([0.5, 0.5], [False, False], 1), ([0.5, 0.5], [True, False], 0), ([1.0], [True, False], 1)],
)
def test_wrong_rankings_are_refused(scores, abnormal, k):
    with pytest.raises(ValueError, match="scores and abnormal"):
        cell_metrics(scores, abnormal, k)


def test_cell_summary_is_the_mean_over_positive_bags_alone():
    def bag(name, positive, scores, abnormal):
        images = tuple(f"{name}/{row}" for row in range(len(scores)))
        return BagPrediction(name, positive, 0.5, images, scores, abnormal)

    predictions = [
        bag("a", True, (0.7, 0.2, 0.1), (True, False, False)),
        bag("b", True, (3.0, -2.0, -4.0), (False, True, False)),  # logits rank as attention does
        bag("c", False, (0.7, 0.2, 0.1), (False, False, False)),
    ]
    cell = summarise(predictions, k=1, seed=0)["cell"]
    assert cell["average_precision"] == pytest.approx((1 + 1 / 2) / 2)
    assert cell["top_k"] == {
        "k": 1,
        "positives": 0.5,
        "positives_interval": [0.0, 1.0],
        "chance": pytest.approx(1 / 3),
    }
    assert cell["n_bags"] == 2


def test_intervals_are_percentiles_over_the_resampled_bags():
    """The vectorised measures against scikit-learn's, on lists of bags drawn one by one."""
    n_resamples, predictions = 60, draw_predictions(14, 9, seed=1)
    found = summarise(predictions, 3, seed=5, n_resamples=n_resamples)
    random = np.random.default_rng(stream_seed(5, "intervals"))
    drawn = [random.multinomial(7, [1 / 7] * 7, size=n_resamples) for _ in range(2)]
    positive = [bag for bag in predictions if bag.positive]
    negative = [bag for bag in predictions if not bag.positive]
    values = {name: [] for name in (*INTERVALS, *CELL_MEASURES, "positives_at_k")}
    for times in zip(*drawn, strict=True):
        bags = [
            bag
            for group, counts in zip((positive, negative), times, strict=True)
            for bag, count in zip(group, counts, strict=True)
            for _ in range(count)
        ]
        truth = [bag.positive for bag in bags]
        probability = np.array([bag.probability for bag in bags])
        values["f1"].append(f1_score(truth, probability >= 0.5))
        values["auroc"].append(roc_auc_score(truth, probability))
        values["balanced_accuracy"].append(balanced_accuracy_score(truth, probability >= 0.5))
        cells = [cell_metrics(bag.scores, bag.abnormal, 3) for bag in bags if bag.positive]
        for name in (*CELL_MEASURES, "positives_at_k"):
            values[name].append(np.mean([getattr(cell, name) for cell in cells]))
    found["cell"]["positives_at_k_interval"] = found["cell"]["top_k"]["positives_interval"]
    for name, resampled in values.items():
        part = found["bag" if name in INTERVALS else "cell"]
        # The same float64 sums in another order: a dozen terms of order one.
        expected = np.percentile(resampled, [2.5, 97.5])
        assert part[f"{name}_interval"] == pytest.approx(expected, abs=1e-14)
    assert found["bag"]["n_resamples"] == found["cell"]["n_resamples"] == n_resamples


def test_intervals_agree_with_scipy():
    predictions = draw_predictions(80, 12, seed=2)
    found = summarise(predictions, 3, seed=0)
    score = [[b.probability for b in predictions if b.positive == label] for label in (True, False)]

    def auroc(positive, negative, axis=-1):
        wins = positive[..., :, None] > negative[..., None, :]
        ties = positive[..., :, None] == negative[..., None, :]
        return (wins + 0.5 * ties).mean(axis=(-2, -1))

    precision = [
        cell_metrics(bag.scores, bag.abnormal, 3).average_precision
        for bag in predictions
        if bag.positive
    ]
    for interval, samples, statistic in [
        (found["bag"]["auroc_interval"], score, auroc),
        (found["cell"]["average_precision_interval"], [precision], np.mean),
    ]:
        result = stats.bootstrap(
            samples, statistic, method="percentile", n_resamples=5000, batch=500, rng=0
        )
        # Both ends are off by chance, with a standard error of 0.038 of the bootstrap's standard
        # error each (the 2.5% quantile of 5000 normal draws); four times their difference's.
        tolerance = 4 * 2**0.5 * 0.038 * result.standard_error
        assert interval == pytest.approx(list(result.confidence_interval), abs=tolerance)


def test_intervals_hold_the_value_and_narrow_with_the_number_of_bags():
    def width(n_bags):
        part = summarise(draw_predictions(n_bags, 12, seed=3), 3, seed=0)
        low, high = part["cell"]["average_precision_interval"]
        assert low < part["cell"]["average_precision"] < high
        return high - low

    # Sixteen times the bags: a quarter of the width, give or take what 20 bags say of their spread.
    assert 0.15 < width(640) / width(40) < 0.4


def test_where_every_bag_is_right_the_interval_has_no_width():
    predictions = [
        BagPrediction(f"{row}", row > 2, 0.9 if row > 2 else 0.1, ("a",), (1.0,), (row > 2,))
        for row in range(6)
    ]
    bag = summarise(predictions, 1, seed=0)["bag"]
    assert [bag[f"{name}_interval"] for name in INTERVALS] == [[1.0, 1.0]] * 3


def test_the_seed_alone_decides_the_intervals():
    predictions = draw_predictions(20, 8, seed=4)
    assert summarise(predictions, 2, seed=0) == summarise(predictions, 2, seed=0)
    other = summarise(predictions, 2, seed=1)
    assert other != summarise(predictions, 2, seed=0)
    assert other["bag"]["auroc"] == summarise(predictions, 2, seed=0)["bag"]["auroc"]


def read_rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_number_follows_from_the_written_rows(tmp_path):
    predictions, k = draw_predictions(16, 10, seed=6), 3
    write_csv(tmp_path / "bags.csv", per_bag_rows(predictions, k))
    rows = read_rows(tmp_path / "bags.csv")
    metrics = json.loads(json.dumps(summarise(predictions, k, seed=0), allow_nan=False))
    bag, cell = metrics["bag"], metrics["cell"]
    truth = [row["positive"] == "1" for row in rows]
    probability = np.array([float(row["probability"]) for row in rows])
    assert bag["f1"] == f1_score(truth, probability >= 0.5)
    assert bag["auroc"] == roc_auc_score(truth, probability)
    assert bag["balanced_accuracy"] == balanced_accuracy_score(truth, probability >= 0.5)
    assert (bag["n_bags"], bag["n_positive"]) == (16, 8)
    assert bag["f1_chance"] == pytest.approx(2 / 3)
    positive = [row for row in rows if row["positive"] == "1"]

    def mean(column):
        return np.mean([float(row[column]) for row in positive])

    for name in CELL_MEASURES:
        assert cell[name] == mean(name)
    for name, column in {
        "chance": "prevalence",
        "precision_at_positives_chance": "prevalence",
        "average_precision_chance": "average_precision_chance",
        "recall_at_k_chance": "recall_at_k_chance",
    }.items():
        assert cell[name] == mean(column)
    assert cell["top_k"]["k"] == max(int(row["k"]) for row in positive) == k
    assert cell["top_k"]["positives"] == mean("positives_at_k")
    assert cell["top_k"]["chance"] == mean("positives_at_k_chance")
    assert cell["n_bags"] == len(positive)


def test_rows_of_bags_and_of_cells_say_the_same(tmp_path):
    predictions, k = draw_predictions(8, 7, seed=7), 2
    write_csv(tmp_path / "bags.csv", per_bag_rows(predictions, k))
    write_csv(tmp_path / "cells.csv", per_cell_rows(predictions))
    cells = read_rows(tmp_path / "cells.csv")
    for bag, row in zip(predictions, read_rows(tmp_path / "bags.csv"), strict=True):
        own = [cell for cell in cells if cell["bag"] == row["bag"] == bag.bag]
        assert [int(cell["rank"]) for cell in own] == list(range(1, 8))
        scores = [float(cell["score"]) for cell in own]
        assert scores == sorted(bag.scores, reverse=True)
        by_image = dict(zip(bag.images, zip(bag.scores, bag.abnormal, strict=True), strict=True))
        assert {cell["image"]: (float(cell["score"]), cell["abnormal"] == "1") for cell in own} == (
            by_image
        )
        truth = [cell["abnormal"] == "1" for cell in own]
        assert (int(row["n_cells"]), int(row["n_abnormal"])) == (len(own), sum(truth))
        measured = {name: row[name] for name in row if name in CellMetrics.__dataclass_fields__}
        if bag.positive:
            # Ranked by the same scores, whose order here is that of the ranks.
            expected = asdict(cell_metrics(scores, truth, k))
            assert {name: float(value) for name, value in measured.items()} == expected
        else:
            assert set(measured.values()) == {""}
        assert len(measured) == 9
