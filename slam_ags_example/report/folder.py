"""What the report needs of a finished run, read back from the files of its folder."""

import csv
import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slam_ags_example.bags import Manifest, read_manifest
from slam_ags_example.config import InputError

__all__ = ["Columns", "FinishedRun", "RankedCell", "TestBag", "read_run", "task_names"]

Columns = dict[str, list[float]]

# Columns of pretraining.csv that are no task's loss.
_NOT_A_LOSS = {
    "epoch",
    "cosine",
    "conflict_rate",
    "effective_rank",
    "feature_std",
    "validation_loss",
}


@dataclass(frozen=True)
class RankedCell:
    """One cell of a test bag: its image's reference, its class, the truth, and its score."""

    image: str
    cell_class: str
    abnormal: bool
    score: float


@dataclass(frozen=True)
class TestBag:
    """One test bag as predicted, its cells by falling score."""

    __test__ = False  # for pytest, which takes the name for a test's

    name: str
    positive: bool
    probability: float
    cells: tuple[RankedCell, ...]

    @property
    def n_abnormal(self) -> int:
        """How many of the cells are abnormal."""
        return sum(cell.abnormal for cell in self.cells)


@dataclass(frozen=True)
class FinishedRun:
    """The content of a run folder.

    Attributes:
        description: config.json, the settings under ``"config"``.
        manifest: bags.json.
        pretraining: pretraining.csv by column; empty for an untrained encoder.
        mil: mil.csv by column.
        bags: test_bags.csv and test_cells.csv.
        metrics: metrics.json.
        timing: timing.json.
    """

    description: dict[str, Any]
    manifest: Manifest
    pretraining: Columns
    mil: Columns
    bags: tuple[TestBag, ...]
    metrics: dict[str, Any]
    timing: dict[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        """The settings."""
        return dict(self.description["config"])


def read_run(folder: Path) -> FinishedRun:
    """Read what the stages of a run wrote.

    Raises:
        InputError: a file is not there, cannot be read, or does not belong to the others.
    """
    manifest = read_manifest(folder / "bags.json")
    pretraining = folder / "pretraining.csv"
    try:
        return FinishedRun(
            description=_json(folder / "config.json", "config"),
            manifest=manifest,
            pretraining=_columns(_rows(pretraining)) if pretraining.exists() else {},
            mil=_columns(_rows(folder / "mil.csv", "epoch", "train_loss", "validation_loss")),
            bags=_test_bags(folder, manifest),
            metrics=_json(folder / "metrics.json", "bag", "cell", "pretraining", "mil", "splits"),
            timing=_json(folder / "timing.json"),
        )
    except InputError:
        raise
    except ValueError as error:
        raise InputError(
            f"a table in {folder} holds what is not a number ({error}): run again"
        ) from error


def task_names(pretraining: Columns) -> list[str]:
    """The tasks of pretraining, by the columns that hold their losses."""
    return [
        name
        for name in pretraining
        if name not in _NOT_A_LOSS and not name.startswith(("norm_", "weight_"))
    ]


def _test_bags(folder: Path, manifest: Manifest) -> tuple[TestBag, ...]:
    class_of = {
        instance.image: instance.cell_class
        for bag in manifest.split("test")
        for instance in bag.instances
    }
    path = folder / "test_cells.csv"
    cells: dict[str, list[tuple[int, RankedCell]]] = {}
    for row in _rows(path, "bag", "rank", "image", "score", "abnormal"):
        if row["image"] not in class_of:
            raise InputError(
                f"{path} ranks {row['image']}, which bags.json has in no test bag: "
                "the files are of different runs, so evaluate again"
            )
        cell = RankedCell(
            row["image"], class_of[row["image"]], row["abnormal"] == "1", float(row["score"])
        )
        cells.setdefault(row["bag"], []).append((int(row["rank"]), cell))
    bags = _rows(folder / "test_bags.csv", "bag", "positive", "probability", "n_cells")
    expected = {row["bag"]: int(row["n_cells"]) for row in bags}
    if expected != Counter({name: len(ranked) for name, ranked in cells.items()}):
        raise InputError(
            f"{path} and test_bags.csv do not list the same bags and numbers of cells: evaluate "
            "again"
        )
    return tuple(
        TestBag(
            name=row["bag"],
            positive=row["positive"] == "1",
            probability=float(row["probability"]),
            cells=tuple(cell for _, cell in sorted(cells[row["bag"]], key=lambda pair: pair[0])),
        )
        for row in bags
    )


def _json(path: Path, *required: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(path) from error
    missing = [name for name in required if not isinstance(content, dict) or name not in content]
    if missing:
        raise InputError(f"{path} has no {', '.join(missing)}: it is of no finished run; run again")
    return dict(content)


def _rows(path: Path, *required: str) -> list[dict[str, str]]:
    """The rows of a table; none where the file is empty and nothing is required of it."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            names = reader.fieldnames or []
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise _unreadable(path) from error
    missing = [name for name in required if name not in names]
    if missing or (required and not rows):
        what = f"no column {', '.join(missing)}" if missing else "no row"
        raise InputError(f"{path} has {what}: it is of no finished run; run again")
    return rows


def _columns(rows: list[dict[str, str]]) -> Columns:
    """The numbers of a table by column; an empty field becomes NaN, a gap in the curve."""
    names = rows[0] if rows else {}
    return {name: [float(row[name] or math.nan) for row in rows] for name in names}


def _unreadable(path: Path) -> InputError:
    return InputError(f"{path} cannot be read: a report needs the folder of a finished run")
