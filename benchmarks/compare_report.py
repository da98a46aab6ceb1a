"""Turns rows of `compare` into tables and pictures: means, intervals, paired differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.compare import GRID, STATIC, SUM
from benchmarks.problems import PROBLEMS, Problem, front
from benchmarks.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

__all__ = ["Estimate", "estimate", "plots", "tables"]

_METHOD, _BASELINE, _CONTROL, _LONGER = "#0072b2", "#d55e00", "#009e73", "#cc79a7"


# --------------------------------------------------------------------------------- statistics


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and half the width of its 95% interval by Student's t."""

    mean: float
    half: float
    """NaN for a single value."""

    def __str__(self) -> str:
        """Both to the decimals of the half width's second digit."""
        if not self.half > 0:
            return f"{self.mean:.4g}"
        decimals = 1 - math.floor(math.log10(self.half))
        if decimals > 6 or abs(self.mean) >= 1e6:
            return f"{self.mean:.3g} ± {self.half:.2g}"
        shown = max(decimals, 0)
        return f"{round(self.mean, decimals) + 0.0:.{shown}f} ± {self.half:.{shown}f}"


def estimate(values: Sequence[float]) -> Estimate | None:
    """None for no values."""
    if not values:
        return None
    if len(values) == 1:
        return Estimate(values[0], math.nan)
    from scipy.stats import t

    spread = statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(statistics.fmean(values), spread * float(t.ppf(0.975, len(values) - 1)))


class _Results:
    """The test rows of one problem of one run."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.kind: type[Problem] = PROBLEMS[rows[0]["problem"]]
        self.score = self.kind.metrics[0]
        self.all = rows
        self.rows = [row for row in rows if row["split"] == "test"]
        self.methods = list(dict.fromkeys(row["method"] for row in self.rows if "method" in row))

    def of(self, case: str, time_of: str | None = None) -> list[Row]:
        """Rows of a contender: of the common number of steps, or of a method's time."""
        return [r for r in self.rows if r["case"] == case and r.get("time_of") == time_of]

    def values(self, rows: Iterable[Row], metric: str | None = None) -> dict[int, float]:
        """Seed -> value, where the run came to its end."""
        field = metric or self.score
        return {row["seed"]: row[field] for row in rows if field in row}

    def against(self, rows: Iterable[Row], others: Iterable[Row]) -> tuple[str, str]:
        """The mean difference of the scores with its interval, and seeds won : lost."""
        own, base = self.values(rows), self.values(others)
        both = [(own[seed], base[seed]) for seed in own if seed in base]
        # Less than the rounding of float32 training is a tie.
        pairs = [0.0 if math.isclose(a, b, rel_tol=1e-5) else a - b for a, b in both]
        found = estimate(pairs)
        if found is None:
            return "", ""
        sign = 1 if self.kind.higher_is_better else -1
        won, lost = (sum(way * sign * pair > 0 for pair in pairs) for way in (1, -1))
        plus = "+" if found.mean > 0 else ""
        return f"{plus}{found}", f"{won} : {lost}"

    def ranked(self) -> list[str]:
        """Contenders, the best first; those without a result last."""
        cases = [SUM, STATIC, GRID, *self.methods]
        scores = {case: estimate([*self.values(self.of(case)).values()]) for case in cases}
        worst = -math.inf if self.kind.higher_is_better else math.inf

        def key(case: str) -> float:
            found = scores[case]
            return worst if found is None else found.mean

        return sorted(cases, key=key, reverse=self.kind.higher_is_better)


def _control(results: _Results, method: str) -> list[Row]:
    """The norm-matched sum; the sum itself for methods that keep its length."""
    return results.of(f"{method}: norm-matched sum") or results.of(SUM)


def _results(rows: Iterable[Row]) -> list[_Results]:
    blocks: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row["benchmark"] == "compare":
            blocks.setdefault((row["date"], row["commit"], row["problem"]), []).append(row)
    return [_Results(block) for block in blocks.values()]


# ------------------------------------------------------------------------------------- tables


def tables(rows: Iterable[Row]) -> str:
    """Markdown: for each run and problem the contenders at equal steps, then the two controls."""
    return "\n\n".join(
        f"### compare: {results.kind.name}\n\n{_contenders(results)}\n\n{_controls(results)}\n\n"
        f"{_note(results)}"
        for results in _results(rows)
    )


def _contenders(results: _Results) -> str:
    better = "higher" if results.kind.higher_is_better else "lower"
    head = ["contender", "lr", f"{results.score}, {better} is better", "minus tuned sum"]
    lines = [[*head, "won : lost", *results.kind.metrics[1:], "failed"]]
    for case in results.ranked():
        rows = results.of(case)
        means = [
            estimate([*results.values(rows, metric).values()]) for metric in results.kind.metrics
        ]
        difference = ("", "") if case == SUM else results.against(rows, results.of(SUM))
        others = ["" if found is None else f"{found.mean:.4g}" for found in means[1:]]
        lines.append([case, _setting(rows), _text(means[0]), *difference, *others, _failed(rows)])
    return _markdown(lines)


def _controls(results: _Results) -> str:
    head = ["method", "step time over the sum's", "the sum's steps", "the sum's lr"]
    head += [f"its {results.score}", "method minus it", "won : lost", "norm-matched lr"]
    lines = [[*head, f"its {results.score}", "method minus it", "won : lost"]]
    for method in results.ranked():
        if method not in results.methods:
            continue
        own, longer = results.of(method), results.of(SUM, method)
        control = _control(results, method)
        ratio = next((f"{row['over_sum']:.2f}" for row in own if "over_sum" in row), "")
        steps = next((str(row["steps"]) for row in longer), "")
        lines.append([method, ratio, steps])
        for others in (longer, control):
            found = estimate([*results.values(others).values()])
            lines[-1] += [_setting(others), _text(found), *results.against(own, others)]
    return _markdown(lines)


def _setting(rows: Sequence[Row]) -> str:
    """Learning rate, with * at an end of the grid, and static weights."""
    first = next((row for row in rows if "lr" in row), None)
    if first is None:
        return ""
    weights = " : ".join(f"{weight:g}" for weight in first.get("weights", ()))
    edge = "*" if first.get("edge") else ""
    return f"{first['lr']:g}{edge}" + (f", {weights}" if weights else "")


def _text(found: Estimate | None) -> str:
    return "" if found is None else str(found)


def _failed(rows: Sequence[Row]) -> str:
    errors = [row["error"] for row in rows if "error" in row]
    return f"{len(errors)} of {len(rows)}: {errors[0]}" if errors else ""


def _note(results: _Results) -> str:
    row = results.all[0]
    tried = {r["lr"] for r in results.all if "lr" in r}
    seeds = {split: _seeds(results, split) for split in ("test", "validation")}
    steps = next((r["steps"] for r in results.rows if "method" in r and "steps" in r), "?")
    tests = 3 * len(results.methods)
    return (
        f"{results.kind.optimizer.__name__}, {steps} steps; mean ± half of the 95% t interval over "
        f"{seeds['test']} seeds; lr chosen by {seeds['validation']} other seeds out of "
        f"{', '.join(f'{rate:g}' for rate in sorted(tried))} (* at an end of it). {tests} "
        f"differences: about {tests * 0.05:.0f} intervals would miss 0 by chance. "
        f"{row['device']}, {row['threads']} threads, torch {row['torch']}, gradsurgery "
        f"{row['gradsurgery']}, python {row['python']}, commit {row['commit']}, {row['date']}"
    )


def _seeds(results: _Results, split: str) -> int:
    return len({r["seed"] for r in results.all if r["split"] == split and "seed" in r})


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    rows = ["| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "---|" * len(lines[0]), *rows[1:]])


# -------------------------------------------------------------------------------------- plots


def plots(rows: Iterable[Row], directory: Path) -> list[Path]:
    """Write one PNG per problem, of its last run, and return their paths."""
    from matplotlib.figure import Figure

    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for results in {found.kind: found for found in _results(rows)}.values():
        cases = [case for case in results.ranked() if results.values(results.of(case))]
        if not cases:
            continue
        wide = results.kind.name == "pareto"
        size = (12.0 if wide else 7.2, max(4.2, 1.8 + 0.24 * len(cases)))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(1, 2 if wide else 1, squeeze=False)[0]
        _scores(axes[0], results, cases)
        if wide:
            _front(axes[1], results, cases)
        figure.legend(
            handles=_handles(), loc="outside lower center", ncols=2, frameon=False, fontsize=8
        )
        row = results.all[0]
        figure.suptitle(
            f"{results.kind.name}: {results.score} on {_seeds(results, 'test')} test seeds\n"
            f"torch {row['torch']}, commit {row['commit']}",
            fontsize=9,
        )
        paths.append(directory / f"compare-{results.kind.name}.png")
        figure.savefig(paths[-1], dpi=120, metadata={"Software": None})
    return paths


def _scores(axes: Axes, results: _Results, cases: Sequence[str]) -> None:
    """A line per contender: mean and interval, each seed, and both controls beside it."""
    band = estimate([*results.values(results.of(SUM)).values()])
    if band is not None:
        axes.axvline(band.mean, color=_BASELINE, linewidth=0.8, zorder=0)
    every: list[float] = []
    for place, case in enumerate(cases):
        shown = [(results.of(case), 0.0, _colour(results, case), "o")]
        if case in results.methods:
            shown.append((_control(results, case), 0.25, _CONTROL, "D"))
            shown.append((results.of(SUM, case), -0.25, _LONGER, "^"))
        for rows, offset, colour, mark in shown:
            values = [*results.values(rows).values()]
            every += values
            found = estimate(values)
            if found is None:
                continue
            alone = mark == "o"
            if alone:
                axes.plot(values, [place] * len(values), "|", color=colour, markersize=8, alpha=0.6)
                if found.half > 0:
                    ends = found.mean - found.half, found.mean + found.half
                    axes.plot(ends, [place, place], color=colour, linewidth=1.2)
            face, size = (colour, 5) if alone else ("white", 4)
            at = place + offset
            axes.plot(found.mean, at, mark, color=colour, markerfacecolor=face, markersize=size)
    axes.set_yticks(range(len(cases)), _numbered(cases), fontsize=8)
    axes.set_ylim(len(cases) - 0.4, -0.6)
    _scale(axes, results, every)
    axes.grid(visible=True, axis="x", color="0.9")
    axes.set_axisbelow(True)


def _colour(results: _Results, case: str) -> str:
    return _METHOD if case in results.methods else _BASELINE


def _numbered(cases: Sequence[str]) -> list[str]:
    return [f"{case}  {number}" for number, case in enumerate(cases, 1)]


def _scale(axes: Axes, results: _Results, values: Sequence[float]) -> None:
    """Logarithmic where errors span more than a factor of 20; an interval may leave the picture."""
    logarithmic = min(values) > 0 and max(values) > 20 * min(values)
    better = "higher" if results.kind.higher_is_better else "lower"
    label = f"{results.score.replace('_', ' ')}, {better} is better"
    axes.set_xlabel(label + (", logarithmic" if logarithmic else ""))
    if logarithmic:
        # What exploded and did not quite overflow would press all others together.
        most = min(max(values), 1000 * statistics.median(values))
        axes.set(xscale="log", xlim=(min(values) / 1.3, most * 1.3))
        # Over one decade matplotlib writes out minor ticks, one over the other.
        axes.xaxis.set_minor_formatter("")
        return
    margin = 0.03 * (max(values) - min(values)) or 1.0
    axes.set_xlim(min(values) - margin, max(values) + margin)


def _handles() -> list[Line2D]:
    from matplotlib.lines import Line2D

    looks = [
        (_METHOD, "o", _METHOD, "method: mean, 95% interval, seeds"),
        (_BASELINE, "o", _BASELINE, "tuned baseline"),
        (_CONTROL, "D", "white", "the sum at this method's length"),
        (_LONGER, "^", "white", "the sum in this method's time"),
    ]
    return [
        Line2D([], [], color=colour, marker=mark, markerfacecolor=face, linestyle="", label=label)
        for colour, mark, face, label in looks
    ]


def _front(axes: Axes, results: _Results, cases: Sequence[str]) -> None:
    """Where the mean of each contender lies beside the exact front."""
    exact = front().T
    axes.plot(exact[0], exact[1], color="black", linewidth=1, label="exact Pareto front")
    first, second = results.kind.metrics[1:]
    labels: dict[tuple[float, float], list[str]] = {}
    for number, case in enumerate(cases, 1):
        rows = results.of(case)
        x, y = (statistics.fmean(results.values(rows, m).values()) for m in (first, second))
        axes.plot(x, y, "o", color=_colour(results, case), markersize=5, alpha=0.8)
        near = next((place for place in labels if math.dist(place, (x, y)) < 0.03), (x, y))
        labels.setdefault(near, []).append(str(number))
    for place, numbers in labels.items():
        text = ", ".join(numbers)
        axes.annotate(text, place, textcoords="offset points", xytext=(6, 4), fontsize=7)
    axes.set_xlabel("loss of the first task, normalized")
    axes.set_ylabel("loss of the second task, normalized")
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    axes.grid(visible=True, color="0.9")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8)
