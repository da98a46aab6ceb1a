"""The files of a run: which there are, and how each kind is written."""

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slam_ags_example.config import InputError
from slam_ags_example.evaluate import BagPrediction, rank_cells

__all__ = ["OUTPUT_FILES", "prepare_output", "write_csv", "write_json", "write_predictions"]

# metrics.json is written last: where it is, the run was finished.
OUTPUT_FILES = (
    "metrics.json",
    "config.json",
    "bags.json",
    "pretraining.csv",
    "embeddings.npz",
    "mil.csv",
    "test_bags.csv",
    "test_cells.csv",
    "timing.json",
    "report.html",
)


def prepare_output(output: Path, overwrite: bool) -> None:
    """Make the folder, and remove what an earlier run left there under our names.

    Raises:
        InputError: it is no folder, cannot be written, or holds a finished run that stays.
    """
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output} is a file: name a folder")
    if (output / "metrics.json").exists() and not overwrite:
        raise InputError(
            f"--output {output} holds a finished run: pass --overwrite to replace it, "
            "or name another folder"
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name in OUTPUT_FILES:
            (output / name).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"--output {output} cannot be written: {error.strerror}") from error


def write_predictions(output: Path, predictions: Sequence[BagPrediction]) -> None:
    """One row a bag and one row a cell: every number of metrics.json follows from them."""
    bags, cells = [], []
    for bag in predictions:
        bags.append({"bag": bag.bag, "positive": int(bag.positive), "probability": bag.probability})
        for rank, row in enumerate(rank_cells(bag.attention), start=1):
            cells.append(
                {
                    "bag": bag.bag,
                    "rank": rank,
                    "image": bag.images[row],
                    "attention": bag.attention[row],
                    "abnormal": int(bag.abnormal[row]),
                }
            )
    write_csv(output / "test_bags.csv", bags)
    write_csv(output / "test_cells.csv", cells)


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows under the names of the first; an empty file where there are none."""
    with path.open("w", newline="") as file:
        if rows:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write to a file beside it and rename, so that the file is there whole or not at all."""
    beside = path.with_suffix(".json.partial")
    beside.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    os.replace(beside, path)
