"""The tables of a study: on the terminal and in Markdown, from the same texts."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

from slam_ags_example.study.rows import Row
from slam_ags_example.study.summary import Interval, Summary, summarise

__all__ = ["failures", "markdown", "tables"]

_COLUMNS = {
    "bag_f1": "bag F1",
    "bag_auroc": "bag AUROC",
    "bag_balanced_accuracy": "bal. acc.",
    "cell_average_precision": "cell AP",
    "cell_precision_at_positives": "cell P at P",
    "positives_at_k": "top-K found",
}
_COMPARED = ("bag_f1", "bag_auroc", "cell_average_precision", "positives_at_k")
_LEGEND = """\
`a±b` is the mean over seeds and its 95% Student-t interval, from a - b to a + b: if the study were
repeated with other seeds again and again, 95% of such intervals would hold the mean over all
seeds. It supposes that the runs scatter about normally, may reach beyond 0 or 1, holds one set of
images, and is not corrected for the number of comparisons. All methods of a seed share bags,
initial weights, batches and views; so a difference is taken within each seed, and where its
interval does not hold 0, the methods differ by more than seeds explain. `w/n` after a difference:
in w of n seeds the first-named method was higher. AP: average precision. P at P: precision among
as many top-ranked cells as the bag has abnormal ones. Top-K found: abnormal cells among the K
top-ranked ones. A mean without an interval comes from one seed.
"""


@dataclass(frozen=True)
class _Texts:
    """One table: title, header, and rows of as many texts."""

    title: str
    header: list[str]
    rows: list[list[str]]


def tables(rows: Sequence[Row], reference: str) -> list[Table]:
    """The tables for the terminal, at most 100 columns wide: two for each witness rate.

    Args:
        rows: of a study; at least one is needed that did not fail, or there is no table.
        reference: label of the method that others are compared to.
    """
    drawn = []
    for texts in _texts(rows, reference):
        table = Table(title=texts.title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
        for index, name in enumerate(texts.header):
            table.add_column(name, justify="right" if index else "left")
        for row in texts.rows:
            table.add_row(*row)
        drawn.append(table)
    return drawn


def markdown(rows: Sequence[Row], reference: str) -> str:
    """The same tables as a Markdown text, with what an interval means and which runs failed.

    Args:
        rows: of a study.
        reference: label of the method that others are compared to.
    """
    n_seeds = len({row.seed for row in rows})
    failed = failures(rows)
    parts = [f"{len(rows)} runs, {n_seeds} seeds, {len(failed)} failed.\n", _LEGEND]
    for texts in _texts(rows, reference):
        ruler = [":--", *["--:"] * (len(texts.header) - 1)]
        lines = ["| " + " | ".join(row) + " |" for row in (texts.header, ruler, *texts.rows)]
        parts.append("\n".join([f"**{texts.title}**", "", *lines, ""]))
    if failed:
        parts.append("\n".join(["**Failed runs**", "", *(f"- {line}" for line in failed), ""]))
    return "\n".join(parts)


def failures(rows: Sequence[Row]) -> list[str]:
    """One line for each run that failed: which, and why."""
    return [
        f"{row.label}, witness rate {row.witness_rate:g}, seed {row.seed}: {row.error}"
        for row in rows
        if row.error is not None
    ]


def _texts(rows: Sequence[Row], reference: str) -> list[_Texts]:
    summaries = summarise(rows, reference)
    found = []
    for rate in dict.fromkeys(summary.witness_rate for summary in summaries):
        at_rate = [summary for summary in summaries if summary.witness_rate == rate]
        found.append(_means(at_rate, rate))
        if any(summary.difference for summary in at_rate):
            found.append(_differences(at_rate, rate, reference))
    return found


def _means(summaries: Sequence[Summary], rate: float) -> _Texts:
    of = {(summary.method, summary.measure): summary for summary in summaries}
    rows = [
        [
            method,
            str(max(summary.interval.n for summary in summaries if summary.method == method)),
            *(_interval_text(of[method, measure]) for measure in _COLUMNS),
        ]
        for method in dict.fromkeys(summary.method for summary in summaries)
    ]
    some_method = summaries[0].method
    chance = [f"{of[some_method, name].chance:.{_decimals(name)}f}" for name in _COLUMNS]
    rows.append(["chance", "", *chance])
    title = f"Witness rate {rate:g}: mean over seeds"
    return _Texts(title, ["method", "seeds", *_COLUMNS.values()], rows)


def _differences(summaries: Sequence[Summary], rate: float, reference: str) -> _Texts:
    of = {(summary.method, summary.measure): summary for summary in summaries}
    rows = [
        [method, *(_difference_text(of[method, measure]) for measure in _COMPARED)]
        for method in dict.fromkeys(summary.method for summary in summaries)
        if method != reference
    ]
    title = f"Witness rate {rate:g}: {reference} minus each method, seed by seed"
    return _Texts(title, ["method", *(_COLUMNS[measure] for measure in _COMPARED)], rows)


def _interval_text(summary: Summary) -> str:
    interval, decimals = summary.interval, _decimals(summary.measure)
    return f"{interval.mean:.{decimals}f}{_half_width_text(interval, decimals)}"


def _difference_text(summary: Summary) -> str:
    """Nothing where no seed has both methods."""
    if summary.difference is None:
        return ""
    interval, decimals = summary.difference.interval, _decimals(summary.measure)
    width = _half_width_text(interval, decimals)
    return f"{interval.mean:+.{decimals}f}{width} {summary.difference.won}/{interval.n}"


def _half_width_text(interval: Interval, decimals: int) -> str:
    return "" if interval.half_width is None else f"±{interval.half_width:.{decimals}f}"


def _decimals(measure: str) -> int:
    """Shares get three, a count of cells two."""
    return 2 if measure == "positives_at_k" else 3
