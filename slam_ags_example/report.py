"""report.html: one self-contained file with the numbers, the curves and the top-ranked cells."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from slam_ags_example.config import RunConfig
from slam_ags_example.data import PatchSet
from slam_ags_example.evaluate import BagPrediction, rank_cells
from slam_ags_example.mil import MILRecord
from slam_ags_example.pretrain import EpochRecord

__all__ = ["write_report"]

_THUMBNAIL_PX = 44
_METHOD_TEXT = {  # what the encoder was trained with, as the report's first sentence goes on
    "slam-ags": "NT-Xent on patches of positive bags and the similarity loss on patches of "
    "negative bags, task gradients combined by",  # the surgery's name follows
    "weaksupcon": "NT-Xent on patches of positive bags plus the similarity loss on patches of "
    "negative bags, without surgery (baseline WeakSupCon)",
    "simclr": "NT-Xent on the patches of all bags (baseline SimCLR)",
    "ws-sil": "cross entropy, each patch under its bag's label (baseline WS-SIL)",
    "supervised": "cross entropy under the true patch labels (upper bound: no weak method has "
    "them)",
    "one-class": "Deep SVDD on patches of negative bags (one-class baseline)",
}
_LOSS_LABEL = {
    "nt_xent": "NT-Xent",
    "similarity": "similarity",
    "cross_entropy": "cross entropy (nats)",
    "distance": "squared distance to the centre",
}
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "slam-ags",  # the same figure gives the same file
    "svg.fonttype": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "font.size": 9,
}


def write_report(
    path: Path,
    *,
    config: RunConfig,
    metrics: Mapping[str, Any],
    seconds: Mapping[str, float],
    history: Sequence[EpochRecord],
    mil_history: Sequence[MILRecord],
    predictions: Sequence[BagPrediction],
    patches: PatchSet,
) -> None:
    """Write the report of a finished run.

    Args:
        path: of the HTML file.
        config: the run's settings.
        metrics: the content of metrics.json.
        seconds: time of each stage.
        history: pretraining's epochs; none for an untrained encoder.
        mil_history: the aggregator's epochs.
        predictions: of the test bags.
        patches: where the thumbnails come from.
    """
    with matplotlib.rc_context(_STYLE):
        figures = {"Attention MIL": _mil_figure(mil_history, metrics["mil"]["epoch"])}
        if history:
            figures = {
                "Pretraining losses": _losses_figure(history),
                **_conflict_figures(history),
                "Collapse": _collapse_figure(history),
                **figures,
            }
        figures["Test bags"] = _bags_figure(predictions)
        drawn = {title: Markup(_svg(figure)) for title, figure in figures.items()}
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("slam_ags_example"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("report.html.j2").render(
        config=asdict(config),
        method_text=_METHOD_TEXT.get(config.method),
        metrics=metrics,
        seconds=seconds,
        figures=drawn,
        gallery=_gallery(predictions, patches, 2 * config.resolved_top_k),
        thumbnail_px=_THUMBNAIL_PX,
    )
    path.write_text(html)


def _losses_figure(history: Sequence[EpochRecord]) -> Figure:
    tasks = list(history[0].losses)
    figure = Figure(figsize=(3.2 * max(len(tasks), 1.5), 2.6), layout="constrained")
    all_axes = figure.subplots(1, len(tasks), squeeze=False)[0]
    epochs = [record.epoch for record in history]
    for index, (axes, task) in enumerate(zip(all_axes, tasks, strict=True)):
        axes.plot(epochs, [record.losses[task] for record in history], color=f"C{index}")
        axes.set(xlabel="epoch", ylabel=_LOSS_LABEL[task])
    return figure


def _conflict_figures(history: Sequence[EpochRecord]) -> dict[str, Figure]:
    """The conflict over time under its title; nothing for a method with one task."""
    conflicts = [record.conflict for record in history if record.conflict is not None]
    if not conflicts:
        return {}
    figure = Figure(figsize=(9.6, 2.6), layout="constrained")
    cosine, norms, weights = figure.subplots(1, 3)
    epochs = [record.epoch for record in history]
    cosine.plot(epochs, [conflict.cosine for conflict in conflicts], label="cosine")
    cosine.plot(epochs, [conflict.rate for conflict in conflicts], label="conflict rate")
    cosine.axhline(0, color="black", linewidth=0.8)
    cosine.set(xlabel="epoch", ylabel="task gradients", ylim=(-1.05, 1.05))
    for task in history[0].losses:
        label = _LOSS_LABEL[task]
        norms.plot(epochs, [conflict.norms[task] for conflict in conflicts], label=label)
        weights.plot(epochs, [conflict.weights[task] for conflict in conflicts], label=label)
    norms.set(xlabel="epoch", ylabel="norm of the task gradient")
    weights.set(xlabel="epoch", ylabel="weight of the task gradient")
    norms.set_yscale("log")
    for axes in (cosine, norms, weights):
        axes.legend(frameon=False)
    return {"Conflict and surgery": figure}


def _collapse_figure(history: Sequence[EpochRecord]) -> Figure:
    figure = Figure(figsize=(6.4, 2.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [record.epoch for record in history]
    left.plot(epochs, [record.effective_rank for record in history], color="C2")
    left.set(xlabel="epoch", ylabel="effective rank (1: collapse)", ylim=(0, None))
    right.plot(epochs, [record.feature_std for record in history], color="C3")
    right.set(xlabel="epoch", ylabel="feature std (0: collapse)", ylim=(0, None))
    return figure


def _mil_figure(history: Sequence[MILRecord], chosen: int) -> Figure:
    figure = Figure(figsize=(4.8, 2.6), layout="constrained")
    axes = figure.subplots()
    epochs = [record.epoch for record in history]
    axes.plot(epochs, [record.train_loss for record in history], label="train")
    axes.plot(epochs, [record.validation_loss for record in history], label="validation")
    axes.axvline(chosen, color="black", linewidth=0.8, linestyle="--", label="chosen")
    axes.set(xlabel="epoch", ylabel="cross entropy (nats per bag)", ylim=(0, None))
    axes.legend(frameon=False)
    return figure


def _bags_figure(predictions: Sequence[BagPrediction]) -> Figure:
    figure = Figure(figsize=(4.8, 2.2), layout="constrained")
    axes = figure.subplots()
    for row, (positive, color) in enumerate([(False, "C0"), (True, "C3")]):
        values = [bag.probability for bag in predictions if bag.positive == positive]
        axes.plot(values, np.full(len(values), row), "|", color=color, markersize=22)
    axes.axvline(0.5, color="black", linewidth=0.8, linestyle="--")
    axes.set_yticks([0, 1], ["negative", "positive"])
    axes.set(xlabel="predicted probability of being positive", xlim=(0, 1), ylim=(-0.7, 1.7))
    return figure


def _svg(figure: Figure) -> str:
    """The figure as an <svg> element, without the XML prologue and without a date."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _gallery(
    predictions: Sequence[BagPrediction], patches: PatchSet, n_cells: int
) -> list[dict[str, Any]]:
    """The ``n_cells`` top-ranked cells of each positive test bag, the truth beside each."""
    row_of = {reference: row for row, reference in enumerate(patches.references)}
    gallery = []
    for bag in predictions:
        if not bag.positive:
            continue
        cells = [
            {
                "uri": _png_uri(patches.images[row_of[bag.images[row]]].numpy()),
                "image": bag.images[row],
                "cell_class": patches.classes[row_of[bag.images[row]]],
                "attention": bag.attention[row],
                "abnormal": bag.abnormal[row],
            }
            for row in rank_cells(bag.attention)[:n_cells]
        ]
        gallery.append({"bag": bag, "cells": cells, "n_abnormal": sum(bag.abnormal)})
    return gallery


def _png_uri(image: np.ndarray[Any, np.dtype[np.float32]]) -> str:
    """A data: URI of an image [C, H, W] in [0, 1], with one or three channels."""
    pixels = np.rint(image * 255).astype(np.uint8)
    picture = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
