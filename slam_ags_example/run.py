"""One run from images to report: each stage reads what the stage before it wrote."""

import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

import gradsurgery
from slam_ags_example.bags import SPLITS, Bag, Manifest, make_manifest, read_manifest
from slam_ags_example.config import RunConfig, generator, resolve_device
from slam_ags_example.data import PatchSet, load_patches
from slam_ags_example.embed import collapse_measures, embed, read_embeddings, write_embeddings
from slam_ags_example.encoder import PretrainingModel
from slam_ags_example.evaluate import BagPrediction, summarise
from slam_ags_example.mil import BagSet, GatedAttentionMIL, train_mil
from slam_ags_example.objectives import TrainingPatches
from slam_ags_example.output import prepare_output, write_csv, write_json, write_predictions
from slam_ags_example.pretrain import EpochRecord, pretrain
from slam_ags_example.report import write_report

__all__ = ["run"]

FEATURE_RMS = 0.3  # of what the aggregator is given: small, so that it does not learn by heart


def run(config: RunConfig, output: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Make bags, pretrain, embed, train the aggregator, evaluate, report.

    Args:
        config: all settings.
        output: folder for the files named in ``output.OUTPUT_FILES``; made where it is not there.
        overwrite: replace a finished run in ``output``.

    Returns:
        The content of metrics.json. It holds no times: the same config gives the same metrics.

    Raises:
        InputError: ``output`` holds a finished run, or the images or the device do not allow it.
        TrainingFailedError: a pretraining loss is no longer finite.
    """
    device = resolve_device(config.device)
    patches = load_patches(config.data)
    manifest = _make_manifest(config, patches)
    prepare_output(output, overwrite)
    write_json(output / "config.json", _describe(config, device))
    manifest.write(output / "bags.json")
    manifest = read_manifest(output / "bags.json")
    seconds: dict[str, float] = {}

    with _progress() as progress, torch.backends.cudnn.flags(benchmark=False, deterministic=True):
        model = PretrainingModel(
            patches.images.shape[1], generator=generator(config.seed, "encoder")
        )
        model.to(device)
        history: list[EpochRecord] = []
        with _timed(seconds, "pretraining_s"):
            if config.method != "random":
                bar = progress.add_task("pretraining", total=config.epochs)
                history = pretrain(
                    model,
                    _training_patches(manifest, patches, device),
                    _images(patches, manifest.split("validation")).to(device),
                    config,
                    on_epoch=lambda record: progress.advance(bar),
                )
        with _timed(seconds, "embedding_s"):
            embeddings = embed(model.encoder, _images(patches, manifest.bags).to(device))
            write_embeddings(output / "embeddings.npz", embeddings, _references(manifest.bags))
        with _timed(seconds, "mil_s"):
            bags = _bag_sets(manifest, output / "embeddings.npz", device)
            bar = progress.add_task("attention MIL", total=config.mil_epochs)
            mil, mil_history, mil_epoch = train_mil(
                bags["train"],
                bags["validation"],
                config,
                on_epoch=lambda record: progress.advance(bar),
            )
    write_csv(output / "pretraining.csv", [record.row() for record in history])
    write_csv(output / "mil.csv", [asdict(record) for record in mil_history])

    predictions = _predict(mil, bags["test"], manifest.split("test"))
    write_predictions(output, predictions)
    held_out = embeddings[_split_rows(manifest, "test")]
    metrics = {
        **summarise(predictions, config.resolved_top_k),
        "pretraining": _summarise_pretraining(history, held_out),
        "mil": {"epoch": mil_epoch, "validation_loss": mil_history[mil_epoch - 1].validation_loss},
        "splits": _count(manifest),
    }
    write_json(output / "timing.json", seconds)
    write_report(
        output / "report.html",
        config=config,
        metrics=metrics,
        seconds=seconds,
        history=history,
        mil_history=mil_history,
        predictions=predictions,
        patches=patches,
    )
    write_json(output / "metrics.json", metrics)
    return metrics


def _make_manifest(config: RunConfig, patches: PatchSet) -> Manifest:
    return make_manifest(
        patches.references,
        patches.classes,
        source=config.data,
        abnormal=config.abnormal,
        witness_rate=config.witness_rate,
        bag_size=config.bag_size,
        seed=config.seed,
        n_bags=config.n_bags,
    )


def _describe(config: RunConfig, device: torch.device) -> dict[str, Any]:
    """What it takes to run this again: settings, versions, device, threads."""
    return {
        "config": asdict(config),
        "top_k": config.resolved_top_k,
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "gradsurgery": gradsurgery.__version__,
            "torch": str(torch.__version__),
            **{name: version(name) for name in ("numpy", "scikit-learn")},
        },
    }


def _references(bags: Sequence[Bag]) -> list[str]:
    return [instance.image for bag in bags for instance in bag.instances]


def _images(patches: PatchSet, bags: Sequence[Bag]) -> Tensor:
    return patches.images[patches.rows(_references(bags))]


def _training_patches(
    manifest: Manifest, patches: PatchSet, device: torch.device
) -> TrainingPatches:
    train = manifest.split("train")
    positive = [bag for bag in train if bag.positive]
    truth = [instance.abnormal for bag in positive for instance in bag.instances]
    return TrainingPatches(
        positive=_images(patches, positive).to(device),
        negative=_images(patches, [bag for bag in train if not bag.positive]).to(device),
        abnormal=torch.tensor(truth, device=device),
    )


def _split_rows(manifest: Manifest, split: str) -> list[int]:
    """Rows of a split among the instances of all bags, in the manifest's order."""
    of_row = [bag.split for bag in manifest.bags for _ in bag.instances]
    return [row for row, name in enumerate(of_row) if name == split]


def _bag_sets(manifest: Manifest, path: Path, device: torch.device) -> dict[str, BagSet]:
    """The stored embeddings as bags, centred and scaled by what the training bags show.

    One scale for all features, so that encoders of any output scale meet the same aggregator. No
    whitening: it would raise directions that are noise to the rank of those that tell classes
    apart.
    """
    embeddings = read_embeddings(path, _references(manifest.bags)).to(device)
    train = embeddings[_split_rows(manifest, "train")]
    centre = train.mean(dim=0)
    scale = (train - centre).square().mean().sqrt() / FEATURE_RMS
    scaled = (embeddings - centre) / scale.clamp_min(torch.finfo(scale.dtype).tiny)
    bag_sets = {}
    for split in SPLITS:
        bags = manifest.split(split)
        instances = scaled[_split_rows(manifest, split)].view(len(bags), manifest.bag_size, -1)
        labels = torch.tensor([float(bag.positive) for bag in bags], device=device)
        bag_sets[split] = BagSet(instances, labels)
    return bag_sets


@torch.no_grad()
def _predict(model: GatedAttentionMIL, bag_set: BagSet, bags: Sequence[Bag]) -> list[BagPrediction]:
    logits, attention = model(bag_set.instances)
    return [
        BagPrediction(
            bag=bag.name,
            positive=bag.positive,
            probability=probability,
            images=tuple(instance.image for instance in bag.instances),
            attention=tuple(weights),
            abnormal=tuple(instance.abnormal for instance in bag.instances),
        )
        for bag, probability, weights in zip(
            bags, logits.sigmoid().tolist(), attention.tolist(), strict=True
        )
    ]


def _summarise_pretraining(history: Sequence[EpochRecord], held_out: Tensor) -> dict[str, Any]:
    """Conflict over all epochs, losses of the last, and collapse measures on the test patches."""
    rank, spread = collapse_measures(held_out)
    summary: dict[str, Any] = {
        "epochs": len(history),
        "effective_rank": rank,
        "feature_std": spread,
    }
    conflicts = [record.conflict for record in history if record.conflict is not None]
    if conflicts:
        summary |= {
            "conflict_rate": float(np.mean([conflict.rate for conflict in conflicts])),
            "mean_cosine": float(np.mean([conflict.cosine for conflict in conflicts])),
        }
    return summary | (history[-1].losses if history else {})


def _count(manifest: Manifest) -> dict[str, dict[str, int]]:
    return {
        split: {
            "bags": len(bags),
            "positive_bags": sum(bag.positive for bag in bags),
            "patches": len(_references(bags)),
            "abnormal_patches": sum(cell.abnormal for bag in bags for cell in bag.instances),
        }
        for split in SPLITS
        for bags in [manifest.split(split)]
    }


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - start, 3)


def _progress() -> Progress:
    """A bar on the terminal's standard error; nothing where that is a file or a pipe."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
