"""One row a cell: what is read from the folder of a finished run."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slam_ags_example.config import InputError
from slam_ags_example.options import STAGES
from slam_ags_example.study.grid import Cell, method_label

__all__ = ["CHANCE", "MEASURES", "Row", "failed_row", "finished_row", "read_json"]

MEASURES = {  # where each stands in metrics.json
    "bag_f1": ("bag", "f1"),
    "bag_auroc": ("bag", "auroc"),
    "bag_balanced_accuracy": ("bag", "balanced_accuracy"),
    "cell_average_precision": ("cell", "average_precision"),
    "cell_precision_at_positives": ("cell", "precision_at_positives"),
    "cell_recall_at_k": ("cell", "recall_at_k"),
    "positives_at_k": ("cell", "top_k", "positives"),
    "effective_rank": ("pretraining", "effective_rank"),
    "feature_std": ("pretraining", "feature_std"),
    "conflict_rate": ("pretraining", "conflict_rate"),
    "mean_cosine": ("pretraining", "mean_cosine"),
}
CHANCE = {
    "bag_f1": ("bag", "f1_chance"),
    "bag_auroc": ("bag", "auroc_chance"),
    "bag_balanced_accuracy": ("bag", "balanced_accuracy_chance"),
    "cell_average_precision": ("cell", "average_precision_chance"),
    "cell_precision_at_positives": ("cell", "precision_at_positives_chance"),
    "cell_recall_at_k": ("cell", "recall_at_k_chance"),
    "positives_at_k": ("cell", "top_k", "chance"),
}


@dataclass(frozen=True)
class Row:
    """What came of one cell.

    Attributes:
        method: the run's ``--method``.
        surgery: the run's ``--surgery``; None for a method without one.
        witness_rate: share of abnormal patches in a positive bag.
        seed: the run's.
        measures: by the names of ``MEASURES``; None where the method has no such thing.
        chance: chance levels by the names of ``CHANCE``.
        seconds: time of all stages; None where the run failed.
        error: why the run failed, in one line; None where it did not.
    """

    method: str
    surgery: str | None
    witness_rate: float
    seed: int
    measures: Mapping[str, float | None]
    chance: Mapping[str, float | None]
    seconds: float | None = None
    error: str | None = None

    @property
    def label(self) -> str:
        """The method as tables and figures name it."""
        return method_label(self.method, self.surgery)

    def flat(self) -> dict[str, Any]:
        """The row as rows.csv has it."""
        return {
            "method": self.method,
            "surgery": self.surgery,
            "witness_rate": self.witness_rate,
            "seed": self.seed,
            **{name: self.measures.get(name) for name in MEASURES},
            **{f"{name}_chance": self.chance.get(name) for name in CHANCE},
            "seconds": self.seconds,
            "error": self.error,
        }


def finished_row(cell: Cell, folder: Path) -> Row:
    """The row of a finished run.

    Args:
        cell: whose run it is.
        folder: of the run.

    Raises:
        InputError: a file of the run cannot be read.
    """
    metrics = read_json(folder / "metrics.json")
    seconds = read_json(folder / "timing.json")
    return Row(
        **_identity(cell),
        measures={name: _look_up(metrics, path) for name, path in MEASURES.items()},
        chance={name: _look_up(metrics, path) for name, path in CHANCE.items()},
        seconds=round(sum(seconds.get(f"{stage}_s", 0.0) for stage in STAGES), 3),
    )


def failed_row(cell: Cell, error: str) -> Row:
    """The row of a run that failed, with the reason in one line."""
    return Row(**_identity(cell), measures={}, chance={}, error=error)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file that a run or a study wrote.

    Raises:
        InputError: it cannot be read, or is no JSON object.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is damaged: remove it to do its work again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object: remove it to do its work again")
    return content


def _identity(cell: Cell) -> dict[str, Any]:
    names = ("method", "surgery", "witness_rate", "seed")
    return {name: getattr(cell.config, name) for name in names}


def _look_up(content: Any, path: tuple[str, ...]) -> float | None:
    """The number under a path of keys; only pretraining's may be missing, by method."""
    for key in path[:-1]:
        content = content[key]
    value = content.get(path[-1]) if path[0] == "pretraining" else content[path[-1]]
    return None if value is None else float(value)
