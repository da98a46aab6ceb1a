"""What of a history is shown: its figures, those of a model in parts put together, and the plot."""

from __future__ import annotations

from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradsurgery.report.summary import SurgeryReport

__all__ = ["ALONE", "BY_TASK", "figures", "plot", "whole"]

ALONE = {"conflict_rate": ".0%", "lowest_cosine": "+.3f", "scale": ".3g", "cosine_to_sum": ".3f"}
"""What there is one of at each step, with the format for tables."""
BY_TASK = {"norms": "norm", "weights": "w", "effect": "g·Δθ"}
"""What there may be one of for each task, with its title in tables."""

# Okabe and Ito's colours, which people with any colour vision tell apart.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", ":")
# A running mean over this share of the steps: with two tasks each step's rate is 0 or 1.
_WINDOW = 0.05


def figures(report: SurgeryReport, effect: Tensor | None) -> dict[str, Tensor]:
    """What `History.read` gives, of reports with N first."""
    pairs = len(report.names) * (len(report.names) - 1) // 2
    measured = ~report.gram.isnan().any(-1).any(-1)
    found = {
        "gram": report.gram,
        "norms": report.norms,
        "cosine": report.cosine,
        "weights": report.weights,
        "conflict_rate": torch.where(measured, report.conflicts.double() / pairs, torch.nan),
        "scale": report.scale,
        "cosine_to_sum": report.cosine_to_sum,
    }
    return found if effect is None else found | {"effect": effect}


def whole(report: SurgeryReport, effect: Tensor | None) -> dict[str, Tensor]:
    """The same of the model as a whole, and "lowest_cosine" [N] of all pairs.

    Parts do not overlap, so squares and products of their gradients add up. There is no one w.
    """
    found = figures(report, effect)
    first, second = torch.triu_indices(len(report.names), len(report.names), 1)
    cosines = found["cosine"][..., first, second].flatten(1)
    found["lowest_cosine"] = cosines.amin(1)
    if report.gram.dim() == 3:
        return found
    plain, combined, both = (each.sum(1) for each in report._products())
    gram = report.gram.sum(1)
    del found["weights"]
    return found | {
        "gram": gram,
        "norms": gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt(),
        "cosine": type(report)(report.names, gram, gram[..., 0]).cosine,
        "conflict_rate": found["conflict_rate"].mean(1),
        "scale": combined.sqrt() / plain.sqrt(),
        "cosine_to_sum": (both / (plain.sqrt() * combined.sqrt())).clamp(-1, 1),
    }


class _Panel(NamedTuple):
    title: str
    values: Tensor
    labels: list[str]
    scale: str = "linear"


def plot(path: str | PathLike[str], names: tuple[str, ...], found: dict[str, Tensor]) -> None:
    """Draw what `whole` gives.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("History.plot needs matplotlib: pip install matplotlib") from error
    panels = _panels(names, found)
    steps = found["step"].tolist()
    figure = Figure(figsize=(9, 2.1 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, panel in zip(axes, panels, strict=True):
        for number, label in enumerate(panel.labels):
            style = _STYLES[number // len(_COLORS) % len(_STYLES)]
            color = _COLORS[number % len(_COLORS)]
            axis.plot(
                steps, panel.values[:, number].tolist(), style, color=color, lw=1.2, label=label
            )
        axis.set_ylabel(panel.title)
        axis.grid(alpha=0.3)
        _set_scale(axis, panel)
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8, frameon=False)
    axes[-1].set_xlabel("step")
    figure.savefig(path, dpi=120)


def _panels(names: tuple[str, ...], found: dict[str, Tensor]) -> list[_Panel]:
    tasks = list(names)
    first, second = torch.triu_indices(len(names), len(names), 1)
    cosines = found["cosine"][:, first, second]
    labels = [f"{names[i]}, {names[j]}" for i, j in zip(first, second, strict=True)]
    if len(labels) > len(_COLORS):
        middle = cosines.median(1).values
        cosines = torch.stack([found["lowest_cosine"], middle, cosines.amax(1)], 1)
        labels = ["lowest", "median", "highest"]
    beside = torch.stack([found["scale"], found["cosine_to_sum"]], 1)
    rate = _running_mean(found["conflict_rate"])[:, None]
    panels = [
        _Panel("pairs in conflict", rate, ["running mean"]),
        _Panel("cosine of a pair", cosines, labels),
        _Panel("gradient norm", found["norms"], tasks, "log"),
        _Panel("beside the sum", beside, ["length", "cosine"]),
    ]
    if "weights" in found:
        panels.insert(3, _Panel("task weight", found["weights"], tasks))
    if "effect" in found:
        panels.append(_Panel("g·Δθ of the step", found["effect"], tasks, "symlog"))
    return [panel for panel in panels if panel.values.isfinite().any()]


def _running_mean(values: Tensor) -> Tensor:
    """Over the steps up to each one; NaN counts for nothing."""
    width = max(round(_WINDOW * len(values)), 1)
    sums = torch.stack([values.nan_to_num(), (~values.isnan()).double()]).cumsum(1)
    sums[:, width:] -= sums[:, :-width].clone()
    return sums[0] / sums[1]


def _set_scale(axis: Any, panel: _Panel) -> None:
    sizes = panel.values[panel.values.isfinite()].abs()
    sizes = sizes[sizes > 0]
    if panel.scale == "log" and len(sizes):
        axis.set_yscale("log", nonpositive="mask")
    elif panel.scale == "symlog":
        axis.axhline(0, color="0.6", lw=0.8)
        if len(sizes):
            axis.set_yscale("symlog", linthresh=float(sizes.median()))
