"""What a study's rows say together: intervals, paired differences, tables and the figure."""

from io import StringIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats

from slam_ags_example.config import METHODS
from slam_ags_example.study import Row, tables
from slam_ags_example.study.figure import draw_figure
from slam_ags_example.study.rows import CHANCE, MEASURES
from slam_ags_example.study.summary import mean_interval, paired_difference, summarise
from slam_ags_example.study.tables import markdown

VALUES = st.floats(-1e3, 1e3).map(lambda x: round(x, 6))  # no squares that underflow


def row(method, rate, seed, value, error=None):
    name, _, surgery = method.partition(":")
    surgery = surgery or ("ags" if name == "slam-ags" else None)
    if error:
        return Row(name, surgery, rate, seed, {}, {}, error=error)
    measures = {measure: value for measure in MEASURES if not measure.startswith("conflict")}
    return Row(name, surgery, rate, seed, measures, dict.fromkeys(CHANCE, 0.2), seconds=1.0)


@settings(deadline=None)  # the first call of scipy takes long
@given(st.lists(VALUES, min_size=2, max_size=12))
def test_the_interval_is_students(values):
    interval = mean_interval(values)
    mean = sum(values) / len(values)
    # Rounding of twelve float64 sums of size 1e3, and of t, which reaches 12.7 at two values.
    assert interval.mean == pytest.approx(mean, rel=1e-12, abs=1e-10)
    if len(set(values)) == 1:  # scipy warns where nothing varies
        assert interval.half_width == pytest.approx(0, abs=1e-9)
        return
    low, high = stats.t.interval(0.95, len(values) - 1, loc=mean, scale=stats.sem(values))
    assert interval.mean - interval.half_width == pytest.approx(low, rel=1e-9, abs=1e-9)
    assert interval.mean + interval.half_width == pytest.approx(high, rel=1e-9, abs=1e-9)


@settings(deadline=None)
@given(st.lists(st.tuples(VALUES, VALUES), min_size=2, max_size=12))
def test_the_difference_is_that_of_a_paired_test(pairs):
    ours, theirs = ({seed: pair[side] for seed, pair in enumerate(pairs)} for side in (0, 1))
    difference = paired_difference({**ours, 77: 1.0}, {88: 5.0, **theirs})
    assert difference.interval.n == len(pairs)
    assert difference.won == sum(a > b for a, b in pairs)
    assert difference.lost == sum(a < b for a, b in pairs)
    if len({round(a - b, 6) for a, b in pairs}) == 1:
        return  # scipy gives no interval where nothing varies
    wanted = stats.ttest_rel(list(ours.values()), list(theirs.values())).confidence_interval(0.95)
    half_width = (wanted.high - wanted.low) / 2
    assert difference.interval.half_width == pytest.approx(half_width, rel=1e-6, abs=1e-9)
    assert difference.interval.mean - difference.interval.half_width == pytest.approx(
        wanted.low, rel=1e-6, abs=1e-8
    )


def test_a_difference_by_hand():
    difference = paired_difference({0: 0.5, 1: 0.7, 2: 0.9}, {2: 0.6, 1: 0.7, 0: 0.4, 3: 0.1})
    # 0.1, 0 and 0.3: mean 2/15, s = sqrt(7/300), and Student's table has 4.302653 for two degrees.
    assert difference.interval.mean == pytest.approx(2 / 15, rel=1e-12)
    expected = 4.302653 * (7 / 300 / 3) ** 0.5
    assert difference.interval.half_width == pytest.approx(expected, rel=1e-6)  # the table's digits
    assert (difference.interval.n, difference.won, difference.lost) == (3, 2, 0)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
    assert mean_interval([0.25]).half_width is None


def test_what_failed_or_is_missing_counts_nowhere():
    rows = [
        row("slam-ags", 0.1, 0, 0.6),
        row("simclr", 0.1, 0, 0.5),
        row("slam-ags", 0.1, 1, 0.8),
        row("simclr", 0.1, 1, 0, error="failed"),
        row("slam-ags", 0.01, 0, 0, error="failed"),
        row("simclr", 0.01, 0, 0.3),
    ]
    found = {(s.witness_rate, s.method, s.measure): s for s in summarise(rows, "slam-ags")}
    assert not any(measure == "conflict_rate" for _, _, measure in found)
    ours = found[0.1, "slam-ags", "bag_f1"]
    assert (ours.interval.n, ours.difference, ours.chance) == (2, None, 0.2)
    theirs = found[0.1, "simclr", "bag_f1"]
    assert (theirs.interval.n, theirs.interval.half_width) == (1, None)
    assert theirs.difference.interval.mean == pytest.approx(0.1, abs=1e-15)  # one rounding
    assert (theirs.difference.interval.n, theirs.difference.won) == (1, 1)
    assert found[0.01, "simclr", "bag_f1"].difference is None
    assert found[0.1, "simclr", "mean_cosine"].chance is None
    flat = theirs.flat("slam-ags")
    assert flat.keys() == ours.flat("slam-ags").keys()
    assert (flat["n_pairs"], flat["difference_low"], flat["mean_low"]) == (1, None, None)


def every_method(rates=(0.1, 0.05), n_seeds=3):
    """Rows of every method there is, and of the surgery with the longest name."""
    methods = ["slam-ags", "slam-ags:gradvac", *METHODS[1:]]
    return [
        row(method, rate, seed, seed / 3 + index / 100)
        for seed in range(n_seeds)
        for rate in rates
        for index, method in enumerate(methods)
    ]


def test_tables_fit_into_100_columns_and_lose_nothing():
    file = StringIO()
    console = Console(file=file, width=100)
    rows = [row(r.label, r.witness_rate, r.seed, r.seed / 3) for r in every_method()]
    for table in tables(rows, "slam-ags"):
        assert console.measure(table).maximum <= 100
        console.print(table)
    text = file.getvalue()
    assert "…" not in text
    for label in {r.label for r in rows}:
        lines = [line for line in text.splitlines() if line.startswith(f" {label} ")]
        assert len(lines) == (2 if label == "slam-ags" else 4)
    assert "0.333±0.828" in text  # t(0.975; 2) / 3 / sqrt(3)
    assert "+0.000±0.000 0/3" in text


def test_markdown_says_what_the_terminal_says():
    text = markdown(every_method(), "slam-ags")
    drawn = tables(every_method(), "slam-ags")
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) == sum(table.row_count + 2 for table in drawn)
    assert text.startswith("48 runs, 3 seeds, 0 failed.")
    assert "95% Student-t interval" in text
    assert all(f"**{table.title}**" in text for table in drawn)
    cells = [list(column.cells) for column in drawn[1].columns]
    assert "| " + " | ".join(cell[0] for cell in cells) + " |" in lines


@pytest.mark.parametrize(("rates", "n_seeds"), [((0.1, 0.005), 3), ((0.1,), 2), ((0.1, 0.05), 1)])
def test_the_figure_names_methods_and_chance(rates, n_seeds, tmp_path):
    rows = every_method(rates, n_seeds)
    draw_figure(rows, tmp_path / "figure")
    svg = (tmp_path / "figure.svg").read_text()
    for words in ("chance", "cell average precision", "bag AUROC", "10%", "single seeds"):
        assert words in svg
    assert all(f">{r.label}</text>" in svg for r in rows)
    assert (tmp_path / "figure.png").stat().st_size > 10_000
