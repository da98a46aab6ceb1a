"""The report's figures, each one panel of its own as SVG, so that a phone can stack them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import roc_curve

from slam_ags_example.evaluate import DECISION_THRESHOLD
from slam_ags_example.report.folder import Columns, TestBag, task_names
from slam_ags_example.report.panel import (
    BLUE,
    GREEN,
    GREY,
    PURPLE,
    VERMILLION,
    Panel,
    draw_panel,
    looks,
)
from slam_ags_example.report.retrieval import retrieval_curve

__all__ = [
    "collapse_panels",
    "conflict_panels",
    "loss_panels",
    "mil_panels",
    "prediction_panels",
    "retrieval_panels",
]

_LOG_FROM = 100  # cells in a bag from which k is on a logarithmic axis: its top is what matters
_POINTS = 300  # of a curve over k: more cannot be seen
_LOSS_NAMES = {
    "nt_xent": "NT-Xent",
    "similarity": "similarity",
    "cross_entropy": "cross entropy",
    "distance": "squared distance to the centre",
}


def loss_panels(pretraining: Columns) -> list[Panel]:
    """The loss of each task over the epochs, and the validation loss where there is one."""
    epochs = pretraining["epoch"]
    curves = {_loss_name(task): pretraining[task] for task in task_names(pretraining)}
    if "validation_loss" in pretraining:
        curves["validation loss"] = pretraining["validation_loss"]
    panels = []
    for (name, values), (colour, line) in zip(curves.items(), looks(), strict=False):

        def draw(axes: Axes, values: Any = values, look: Any = (colour, line)) -> None:
            axes.plot(epochs, values, color=look[0], linestyle=look[1], **_dots(epochs))
            _count_axis(axes, "epoch")

        caption = f"Training loss: {name}, mean over the steps of an epoch."
        if name == "validation loss":
            caption = "Loss on held-out patches after each epoch."
        panels.append(draw_panel(draw, name, caption))
    return panels


def collapse_panels(pretraining: Columns) -> list[Panel]:
    """Effective rank and feature std of held-out embeddings over the epochs."""
    epochs = pretraining["epoch"]

    def rank(axes: Axes) -> None:
        axes.plot(epochs, pretraining["effective_rank"], color=GREEN, **_dots(epochs))
        axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
        _count_axis(axes, "epoch")
        axes.set(ylim=(0, None))

    def spread(axes: Axes) -> None:
        axes.plot(epochs, pretraining["feature_std"], color=PURPLE, **_dots(epochs))
        _count_axis(axes, "epoch")
        axes.set(ylim=(0, None))

    return [
        draw_panel(
            rank,
            "effective rank",
            "Collapse measure 1: in how many directions the embeddings of held-out patches spread. "
            "1 (dashed) is collapse.",
        ),
        draw_panel(
            spread,
            "feature std",
            "Collapse measure 2: how far apart those embeddings point. 0 is collapse, 1 is every "
            "direction alike.",
        ),
    ]


def conflict_panels(pretraining: Columns) -> list[Panel]:
    """Cosine, conflict rate, norms and weights over the epochs; none for a single task."""
    if "cosine" not in pretraining:
        return []
    epochs, tasks = pretraining["epoch"], task_names(pretraining)

    def cosine(axes: Axes) -> None:
        axes.plot(epochs, pretraining["cosine"], color=BLUE, **_dots(epochs))
        axes.axhline(0, color="black", linewidth=0.8)
        _count_axis(axes, "epoch")
        axes.set(ylim=(-1.05, 1.05))

    def rate(axes: Axes) -> None:
        axes.plot(epochs, pretraining["conflict_rate"], color=VERMILLION, **_dots(epochs))
        _count_axis(axes, "epoch")
        axes.set(ylim=(-0.03, 1.03))

    def by_task(prefix: str) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            for task, (colour, line) in zip(tasks, looks(), strict=False):
                values = pretraining[prefix + task]
                look = {"color": colour, "linestyle": line, **_dots(epochs)}
                axes.plot(epochs, values, label=_loss_name(task), **look)
            _count_axis(axes, "epoch")
            if prefix == "norm_" and min(min(pretraining[prefix + task]) for task in tasks) > 0:
                axes.set_yscale("log")

        return draw

    return [
        draw_panel(
            cosine,
            "cosine between task gradients",
            "Cosine between the task gradients, mean over the steps of an epoch. Below 0 the "
            "tasks pull against each other.",
        ),
        draw_panel(rate, "conflict rate", "Share of steps on which that cosine was negative."),
        draw_panel(
            by_task("norm_"), "norm of each task gradient", "Length of each task's gradient."
        ),
        draw_panel(
            by_task("weight_"),
            "weight of each task gradient",
            "Weight that each task's gradient got in the step. 1 for every task is the plain sum.",
        ),
    ]


def mil_panels(mil: Columns, chosen: int) -> list[Panel]:
    """Cross entropy on training and validation bags, the chosen epoch marked."""
    epochs = mil["epoch"]

    def draw(axes: Axes) -> None:
        axes.plot(
            epochs,
            mil["train_loss"],
            color=BLUE,
            linestyle="--",
            label="training bags",
            **_dots(epochs),
        )
        axes.plot(
            epochs,
            mil["validation_loss"],
            color=VERMILLION,
            label="validation bags",
            **_dots(epochs),
        )
        axes.axvline(chosen, color="black", linewidth=0.9, linestyle=":", label=f"epoch {chosen}")
        _count_axis(axes, "epoch")
        axes.set(ylim=(0, None))

    caption = (
        "Loss of the aggregator. The dotted line is the epoch that was kept, chosen on the "
        "validation bags alone."
    )
    return [draw_panel(draw, "loss (nats per bag)", caption)]


def prediction_panels(bags: Sequence[TestBag]) -> list[Panel]:
    """The predicted probability of every test bag, sorted, and the ROC curve over them."""
    ranked = sorted(bags, key=lambda bag: bag.probability)
    looks = {True: ("positive", "^", VERMILLION, True), False: ("negative", "o", BLUE, False)}

    def probabilities(axes: Axes) -> None:
        for label, (name, marker, colour, filled) in looks.items():
            places = [place for place, bag in enumerate(ranked, 1) if bag.positive == label]
            values = [ranked[place - 1].probability for place in places]
            face = colour if filled else "none"
            axes.plot(places, values, marker, color=colour, markerfacecolor=face, label=name)
        axes.axhline(DECISION_THRESHOLD, color="black", linewidth=0.8, linestyle="--")
        _count_axis(axes, "test bags, by predicted probability")
        axes.set(ylim=(-0.04, 1.04))

    n_positive = sum(bag.positive for bag in bags)
    return [
        draw_panel(
            probabilities,
            "predicted probability of being positive",
            f"Every test bag. A perfect model has all triangles above {DECISION_THRESHOLD} "
            "(dashed) and all circles below.",
        ),
        draw_panel(
            lambda axes: _draw_roc(axes, bags),
            "share of positive bags found",
            f"ROC curve over {len(bags)} test bags, {n_positive} of them positive: each step up "
            "is one positive bag. The dashed diagonal is chance, the dot the threshold of "
            f"{DECISION_THRESHOLD}.",
        ),
    ]


def _draw_roc(axes: Axes, bags: Sequence[TestBag]) -> None:
    truth = np.array([bag.positive for bag in bags])
    probabilities = np.array([bag.probability for bag in bags])
    false_rate, true_rate, _ = roc_curve(truth, probabilities, drop_intermediate=False)
    called = probabilities >= DECISION_THRESHOLD
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
    axes.plot(false_rate, true_rate, color=BLUE)
    axes.plot(called[~truth].mean(), called[truth].mean(), "o", color=VERMILLION)
    axes.set(xlabel="share of negative bags called positive", xlim=(-0.03, 1.03))
    axes.set_ylim(-0.03, 1.03)


def retrieval_panels(bags: Sequence[TestBag], top_k: int) -> list[Panel]:
    """Recall and precision among the top k cells, mean over the positive bags."""
    ranked = np.array([[cell.abnormal for cell in bag.cells] for bag in bags if bag.positive])
    curve, best = retrieval_curve(ranked), retrieval_curve(-np.sort(-ranked.astype(int)))
    n = ranked.shape[1]
    shown = np.unique(np.linspace(1, n, _POINTS).astype(int) - 1)
    if n >= _LOG_FROM:
        shown = np.unique(np.geomspace(1, n, _POINTS).astype(int) - 1)

    def draw(axes: Axes, values: Any, chance: Any, ideal: Any) -> None:
        k = shown + 1
        low, high = np.quantile(values[:, shown], (0.25, 0.75), axis=0)
        axes.fill_between(k, low, high, color=BLUE, alpha=0.18, linewidth=0)
        axes.plot(k, ideal.mean(axis=0)[shown], color=GREEN, linestyle=":", label="perfect")
        axes.plot(k, values.mean(axis=0)[shown], color=BLUE, label="this model")
        axes.plot(k, chance[shown], color=GREY, linestyle="--", linewidth=1, label="chance")
        axes.axvline(top_k, color="black", linewidth=0.8)
        _count_axis(axes, "cells looked at in each bag (k)")
        axes.set(ylim=(-0.03, 1.03))
        if n >= _LOG_FROM:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")

    def recall(axes: Axes) -> None:
        draw(axes, curve.recall, curve.recall_chance, best.recall)

    def precision(axes: Axes) -> None:
        level = np.full(n, curve.precision_chance.mean())
        draw(axes, curve.precision, level, best.precision)

    words = (
        f"mean over {len(ranked)} positive test bags; the band holds the middle half of them. "
        f"The upright line is k = {top_k}."
    )
    return [
        draw_panel(recall, "recall: abnormal cells found", f"Recall at k, {words}"),
        draw_panel(precision, "precision: abnormal among shown", f"Precision at k, {words}"),
    ]


def _count_axis(axes: Axes, label: str) -> None:
    axes.set(xlabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _dots(epochs: Sequence[float]) -> dict[str, Any]:
    """A curve of one epoch is a point, which a line would not show."""
    return {"marker": "o"} if len(epochs) == 1 else {}


def _loss_name(task: str) -> str:
    return _LOSS_NAMES.get(task, task.replace("_", " "))
