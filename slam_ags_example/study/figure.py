"""The figure of a study: cell average precision and bag AUROC with intervals, seeds and chance."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from slam_ags_example.study.rows import Row
from slam_ags_example.study.summary import Interval, Summary, summarise

__all__ = ["draw_figure"]

_PANELS = {
    "cell_average_precision": "cell average precision",
    "bag_auroc": "bag AUROC",
}
# Okabe and Ito 2008, "Color Universal Design": told apart under the common colour blindnesses. Grey
# is in place of yellow, which is too pale for dots. One marker more than colours: no pair repeats.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#7F7F7F")
_MARKERS = "osD^vPX<p"
_SPREAD = 0.8  # of the way from one group to the next, that a group's methods take
_CAPTION = (
    "marker and bar: mean over seeds, 95% Student-t interval (cut at 0 and 1); dots: single seeds"
)
_MARGIN = 0.02  # beyond 0 and 1, for markers that lie there
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "slam-ags",  # the same figure gives the same file
    "svg.fonttype": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
}


@dataclass(frozen=True)
class _Series:
    """One measure of one method: each seed's value, and the mean, by witness rate."""

    method: str
    colour: str
    marker: str
    seeds: list[tuple[float, float]]
    means: list[tuple[float, Interval]]


def draw_figure(rows: Sequence[Row], path: Path) -> None:
    """Draw against witness rate, or against method where there is one witness rate.

    Args:
        rows: of a study, at least one of which did not fail.
        path: without the suffix; ``.png`` and ``.svg`` are written.
    """
    summaries = summarise(rows, "")
    rates = sorted({summary.witness_rate for summary in summaries})
    panels = {measure: _series(rows, summaries, measure) for measure in _PANELS}
    chance = {
        measure: {rate: _chance(summaries, measure, rate) for rate in rates} for measure in _PANELS
    }
    draw = _against_rate if len(rates) > 1 else _against_method
    with matplotlib.rc_context(_STYLE):
        figure = draw(panels, chance)
        figure.supxlabel(_CAPTION, fontsize=8, color="0.4")
        figure.savefig(path.with_suffix(".png"), dpi=200)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def _series(rows: Sequence[Row], summaries: Sequence[Summary], measure: str) -> list[_Series]:
    methods = dict.fromkeys(summary.method for summary in summaries)
    return [
        _Series(
            method=method,
            colour=_COLOURS[index % len(_COLOURS)],
            marker=_MARKERS[index % len(_MARKERS)],
            seeds=[
                (row.witness_rate, value)
                for row in rows
                for value in [row.measures.get(measure)]
                if row.label == method and value is not None
            ],
            means=[
                (summary.witness_rate, summary.interval)
                for summary in summaries
                if (summary.method, summary.measure) == (method, measure)
            ],
        )
        for index, method in enumerate(methods)
    ]


def _chance(summaries: Sequence[Summary], measure: str, rate: float) -> float:
    levels = [
        summary.chance
        for summary in summaries
        if (summary.witness_rate, summary.measure) == (rate, measure) and summary.chance is not None
    ]
    return float(np.mean(levels))


def _against_rate(
    panels: Mapping[str, list[_Series]], chance: Mapping[str, Mapping[float, float]]
) -> Figure:
    """Groups of methods side by side, so that intervals do not lie on each other."""
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    for axes, measure in zip(figure.subplots(1, 2), panels, strict=True):
        n_methods, rates = len(panels[measure]), list(chance[measure])
        slot = _SPREAD / n_methods
        for index, series in enumerate(panels[measure]):
            offset = (index - (n_methods - 1) / 2) * slot
            at = {rate: group + offset for group, rate in enumerate(rates)}
            _draw_series(axes, series, at, beside=-slot / 4, upright=True)
        for group, level in enumerate(chance[measure].values()):
            label = None if group else "chance"
            ends = (group - 0.5, group + 0.5)
            axes.plot(ends, (level, level), color="0.4", ls="--", lw=1, label=label, zorder=1)
            axes.axvline(group - 0.5, color="0.9", lw=0.8, zorder=0)
        axes.set_xticks(range(len(rates)), [f"{100 * rate:g}%" for rate in rates])
        axes.tick_params(axis="x", length=0)
        axes.grid(axis="y", alpha=0.3)
        axes.set(xlabel="witness rate", ylabel=_PANELS[measure], xlim=(-0.5, len(rates) - 0.5))
        axes.set_ylim(_within_shares(axes.get_ylim()))
    handles, labels = axes.get_legend_handles_labels()  # lines first: chance stands last instead
    figure.legend(
        [*handles[1:], handles[0]],
        [*labels[1:], labels[0]],
        loc="outside upper center",
        ncols=min(len(labels), 5),
        frameon=False,
    )
    return figure


def _against_method(
    panels: Mapping[str, list[_Series]], chance: Mapping[str, Mapping[float, float]]
) -> Figure:
    """A line for each method, its name beside it."""
    methods = [series.method for series in next(iter(panels.values()))]
    figure = Figure(figsize=(9.6, 1.4 + 0.34 * len(methods)), layout="constrained")
    for axes, measure in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        [(rate, level)] = chance[measure].items()
        for index, series in enumerate(panels[measure]):
            _draw_series(axes, series, {rate: index}, beside=0.25, upright=False)
        axes.axvline(level, color="0.4", ls="--", lw=1, zorder=1)
        axes.text(
            level,
            1,
            "chance",
            transform=axes.get_xaxis_transform(),
            color="0.4",
            va="bottom",
            ha="center",
        )
        axes.set_yticks(range(len(methods)), methods)
        axes.set(xlabel=_PANELS[measure], ylim=(len(methods) - 0.5, -0.5))
        axes.set_xlim(_within_shares(axes.get_xlim()))
        axes.grid(axis="x", alpha=0.3)
    figure.suptitle(f"witness rate {100 * rate:g}%", fontsize=9)
    return figure


def _within_shares(limits: tuple[float, float]) -> tuple[float, float]:
    """The part where a share can be: the interval of two seeds would squeeze all else to a line."""
    return max(limits[0], -_MARGIN), min(limits[1], 1 + _MARGIN)


def _draw_series(
    axes: Axes, series: _Series, at: Mapping[float, float], *, beside: float, upright: bool
) -> None:
    """Means with intervals at the places ``at``, and the single seeds ``beside`` them."""
    places = [at[rate] + beside for rate, _ in series.seeds]
    values = [value for _, value in series.seeds]
    axes.scatter(
        *((places, values) if upright else (values, places)),
        s=8,
        color=series.colour,
        alpha=0.5,
        linewidths=0,
    )
    places = [at[rate] for rate, _ in series.means]
    means = [interval.mean for _, interval in series.means]
    widths = [interval.half_width or 0.0 for _, interval in series.means]
    axes.errorbar(
        *((places, means) if upright else (means, places)),
        yerr=widths if upright else None,
        xerr=None if upright else widths,
        color=series.colour,
        marker=series.marker,
        ms=5,
        ls="none",
        lw=1.4,
        capsize=2,
        label=series.method,
        zorder=3,
    )
