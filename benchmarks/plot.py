"""Turns rows into pictures: time against T, D, parameters and batch, and bars beside the peers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plots"]

_CURVES = {
    # benchmark: (field on the x axis, its label)
    "projection": ("T", "tasks T"),
    "scaling/T": ("T", "tasks T"),
    "scaling/D": ("D", "parameters under surgery D"),
    "scaling/parameters": ("parameters", "parameter tensors, 8 elements each"),
}
_BARS = {
    # benchmark: (ratio, its label)
    "peers/aggregate": ("over_ours", "time over gradsurgery's"),
    "peers/step": ("over_ours", "step time over gradsurgery's"),
    "step": ("over_sum", "step time over the plain sum's"),
}
_SETTINGS = ("model", "graph", "dtype", "backend", "amp", "batch", "pixels", "D", "T")
"""Fields that a picture has one value of, unless they are what it is about."""

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f7f", "#000000")


def plots(rows: Iterable[Row], directory: Path) -> list[Path]:
    """Write a PNG for each benchmark and setting, of its last run, and return their paths."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "gradsurgery[benchmarks]"') from error
    mpl.use("Agg")
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, block in _pictures(rows).items():
        benchmark = block[0]["benchmark"]
        if benchmark in _CURVES:
            figure = _curves(block, *_CURVES[benchmark])
        elif benchmark == "scaling/batch":
            figure = _batches(block)
        else:
            figure = _bars(block, *_BARS[benchmark])
        paths.append(directory / f"{name}.png")
        figure.savefig(paths[-1], dpi=120, metadata={"Software": None})
    return paths


def _pictures(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Name of the file -> rows that have a time, of the last run only."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        benchmark = row["benchmark"]
        if "median_ms" not in row or benchmark not in {*_CURVES, *_BARS, "scaling/batch"}:
            continue
        parts = [benchmark.replace("/", "-"), row.get("model"), row.get("graph"), row.get("dtype")]
        if benchmark == "step":
            parts = [benchmark, row["model"], "amp" if row["amp"] else None]
        name = "-".join(str(part) for part in parts if part is not None)
        block = found.setdefault(name, [])
        if block and block[0]["date"] != row["date"]:
            block.clear()
        block.append(row)
    return found


def _new(block: Sequence[Row], about: Sequence[str]) -> tuple[Figure, Axes]:
    """A figure whose title says what was measured, with what, and where."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    axes = figure.subplots()
    first = block[0]
    fixed = [
        f"{key} = {first[key]:,}" if key in ("T", "D") else f"{key} {first[key]}"
        for key in _SETTINGS
        if key in first and key not in about and all(row.get(key) == first[key] for row in block)
    ]
    title = ", ".join([first["benchmark"], *fixed])
    where = f"{first['device']}, {first['threads']} threads, torch {first['torch']}"
    axes.set_title(f"{title}\n{where}, commit {first['commit']}", fontsize=9)
    axes.grid(visible=True, which="major", color="0.9")
    axes.set_axisbelow(True)
    return figure, axes


def _names(block: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["case"] for row in block))


def _curves(block: Sequence[Row], field: str, label: str) -> Figure:
    """Median time, with the 20th to 80th percentile, on two logarithmic axes."""
    figure, axes = _new(block, (field,))
    others = [case for case in _names(block) if case != "floor"]
    for case in _names(block):
        _line(axes, [row for row in block if row["case"] == case], field, case, others)
    axes.set(xscale="log", yscale="log", xlabel=label, ylabel="time, ms")
    _ticks(axes, sorted({row[field] for row in block}))
    axes.legend(frameon=False)
    return figure


def _line(axes: Axes, points: Sequence[Row], field: str, case: str, others: Sequence[str]) -> None:
    x = [row[field] for row in points]
    y = [row["median_ms"] for row in points]
    if case == "floor":
        axes.plot(x, y, "k--", marker=".", label="floor: read G twice, write g once")
        return
    colour = _COLOURS[others.index(case) % len(_COLOURS)]
    axes.plot(x, y, marker="o", markersize=4, color=colour, label=case)
    low, high = [row["p20_ms"] for row in points], [row["p80_ms"] for row in points]
    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def _ticks(axes: Axes, values: Sequence[float]) -> None:
    """Numbers written out: x at each measured value unless they are large, y at 1, 2, 5."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter

    if axes.get_yscale() == "log":
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    if max(values) <= 10_000:
        axes.set_xticks(values, [f"{value:,}" for value in values])
        axes.xaxis.set_minor_locator(NullLocator())


def _batches(block: Sequence[Row]) -> Figure:
    """Surgery's percentage over the steps that it replaces, and the floor's share of the sum."""
    figure, axes = _new(block, ("batch",))
    surgery = [row for row in block if row["case"] == "surgery"]
    for base, colour in zip(("sum", "T_backwards"), _COLOURS, strict=False):
        points = [row for row in surgery if f"percent_over_{base}" in row]
        x = [row["batch"] for row in points]
        y = [row[f"percent_over_{base}"] for row in points]
        label = f"surgery over {base.replace('_', ' ')}"
        axes.plot(x, y, marker="o", markersize=4, color=colour, label=label)
    floor = [row for row in block if row["case"] == "floor" and "over_sum" in row]
    axes.plot(
        [row["batch"] for row in floor],
        [100 * row["over_sum"] for row in floor],
        "k--",
        marker=".",
        label="floor: read G twice, write g once, over sum",
    )
    axes.axhline(0, color="0.5", linewidth=0.8)
    axes.set(xscale="log", xlabel="samples in a batch", ylabel="added time, %")
    _ticks(axes, sorted({row["batch"] for row in block}))
    axes.legend(frameon=False)
    return figure


def _bars(block: Sequence[Row], field: str, label: str) -> Figure:
    """A group of bars for each case, one bar for each T (and graph), with the ratio on it."""
    block = [row for row in block if field in row]
    figure, axes = _new(block, ("T",))
    cases = _names(block)
    groups = list(dict.fromkeys((row.get("graph"), row["T"]) for row in block))
    height = 0.8 / max(len(groups), 1)
    for g, (graph, tasks) in enumerate(groups):
        members = [row for row in block if (row.get("graph"), row["T"]) == (graph, tasks)]
        places = [cases.index(row["case"]) + (g + 0.5) * height - 0.4 for row in members]
        ratios = [row[field] for row in members]
        name = f"T = {tasks}" if graph is None else f"{graph}, T = {tasks}"
        bars = axes.barh(places, ratios, height * 0.9, color=_COLOURS[g % 8], label=name)
        axes.bar_label(bars, fmt="%.3g", padding=2, fontsize=7)
    axes.axvline(1, color="0.4", linewidth=0.8)
    axes.set_yticks(range(len(cases)), cases)
    axes.invert_yaxis()
    largest = max((row[field] for row in block), default=1.0)
    if largest > 10:
        axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.set_xlabel(label + (", logarithmic" if largest > 10 else ""))
    axes.legend(frameon=False, fontsize=8)
    return figure
