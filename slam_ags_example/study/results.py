"""The files that a study ends in: rows.csv, summary.csv, table.md, figure.png and figure.svg."""

from collections.abc import Sequence
from pathlib import Path

from slam_ags_example.output import write_csv
from slam_ags_example.study.figure import draw_figure
from slam_ags_example.study.rows import Row
from slam_ags_example.study.summary import summarise
from slam_ags_example.study.tables import markdown

__all__ = ["write_results"]


def write_results(output: Path, rows: Sequence[Row], reference: str) -> None:
    """Write what the rows say; a figure only where at least one run did not fail.

    Args:
        output: the study's folder.
        rows: of all cells, failed ones too.
        reference: label of the method that others are compared to.
    """
    write_csv(output / "rows.csv", [row.flat() for row in rows])
    summaries = summarise(rows, reference)
    write_csv(output / "summary.csv", [summary.flat(reference) for summary in summaries])
    (output / "table.md").write_text(markdown(rows, reference), encoding="utf-8")
    if summaries:
        draw_figure(rows, output / "figure")
