"""report.html: one self-contained page, made of the files of a finished run alone."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from torch import Tensor

from slam_ags_example.config import InputError
from slam_ags_example.output import write_whole
from slam_ags_example.report.figures import (
    collapse_panels,
    conflict_panels,
    loss_panels,
    mil_panels,
    prediction_panels,
    retrieval_panels,
)
from slam_ags_example.report.folder import FinishedRun, read_run
from slam_ags_example.report.gallery import draw_galleries
from slam_ags_example.report.panel import Panel
from slam_ags_example.report.words import (
    class_words,
    data_words,
    score_words,
    setting_words,
    title_words,
)

__all__ = ["write_report"]


def write_report(folder: Path, thumbnails: Callable[[Sequence[str]], Tensor]) -> None:
    """Write ``folder/report.html``; the same files give the same bytes.

    Args:
        folder: of a finished run: config.json, bags.json, pretraining.csv (not for an untrained
            encoder), mil.csv, test_bags.csv, test_cells.csv, metrics.json, timing.json.
        thumbnails: from image references to uint8 [n, C, px, px], C = 1 or 3; called once.

    Raises:
        InputError: a file is not there, cannot be read, or does not belong to the others.
    """
    run = read_run(folder)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("slam_ags_example"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    try:
        html = environment.get_template("report.html.j2").render(_content(run, thumbnails))
    except (KeyError, jinja2.UndefinedError) as error:
        raise InputError(
            f"{folder} lacks {error} in its files: it is of no finished run of this version; "
            "run again"
        ) from error
    write_whole(folder / "report.html", lambda file: file.write(html.encode()))


def _content(run: FinishedRun, thumbnails: Callable[[Sequence[str]], Tensor]) -> dict[str, Any]:
    """What the template shows."""
    config, metrics = run.config, run.metrics
    chosen_epoch = metrics["mil"]["epoch"]
    return {
        "title": title_words(config),
        "metrics": metrics,
        "splits": metrics["splits"],
        "setting": setting_words(config, chosen_epoch),
        "data": data_words(config, run.manifest),
        "classes": class_words(run.manifest),
        "score": score_words(config),
        "sections": _sections(run),
        "galleries": draw_galleries(run.bags, thumbnails),
        "settings": _flat(run.description),
        "timing": _flat(run.timing),
    }


def _sections(run: FinishedRun) -> dict[str, list[Panel]]:
    """The figures under their headings, in the order of the pipeline."""
    sections: dict[str, list[Panel]] = {}
    if run.pretraining:
        sections["Pretraining"] = loss_panels(run.pretraining) + collapse_panels(run.pretraining)
        sections["Conflict and surgery"] = conflict_panels(run.pretraining)
    sections["Aggregator"] = mil_panels(run.mil, run.metrics["mil"]["epoch"])
    sections["Test bags"] = prediction_panels(run.bags)
    sections["Cells of positive test bags"] = retrieval_panels(
        run.bags, run.metrics["cell"]["top_k"]["k"]
    )
    return {title: panels for title, panels in sections.items() if panels}


def _flat(content: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested settings as rows; the settings proper keep their names, others get their group's."""
    rows: list[tuple[str, Any]] = []
    for name, value in content.items():
        if isinstance(value, dict):
            rows += _flat(value, "" if name == "config" else f"{prefix}{name} ")
        else:
            rows.append((prefix + name, "—" if value is None else value))
    return rows
