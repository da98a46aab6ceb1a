"""The stages of a run: each reads the files of those before it, and writes its own."""

import functools
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slam_ags_example.augment import DigitViews, SmearViews, Views
from slam_ags_example.bags import REST, make_manifest
from slam_ags_example.checkpoint import BEST, LAST, Checkpoints, read_checkpoint, read_torch
from slam_ags_example.config import InputError, RunConfig, generator, resolve_device
from slam_ags_example.data import ImageSet, batches, check_images, open_images, open_source
from slam_ags_example.embed import CHUNK, collapse_measures, read_embeddings, write_embeddings
from slam_ags_example.encoder import PretrainingModel
from slam_ags_example.evaluate import BagPrediction, per_bag_rows, per_cell_rows, summarise
from slam_ags_example.launch import Launch
from slam_ags_example.manifest import Manifest, read_manifest
from slam_ags_example.mil import BagSet, load_aggregator, predict, train_mil
from slam_ags_example.options import settings_of
from slam_ags_example.output import read_csv, write_csv, write_json, write_whole
from slam_ags_example.pretrain import TrainingSet, pretrain
from slam_ags_example.progress import bar
from slam_ags_example.ranks import count, rank
from slam_ags_example.report import write_report

__all__ = ["FILES", "STAGE_FUNCTIONS", "Job"]

_MIL_FORMAT = "slam-ags aggregator, version 1"
_HELD_OUT = 256  # patches of validation bags for the measures of each epoch, half of either kind

# What each stage writes, the last of them when it is done.
FILES: dict[str, tuple[str, ...]] = {
    "bags": ("corrupt.txt", "bags.json"),
    "pretrain": (LAST, BEST, "pretraining.csv"),
    "embed": ("embeddings.npz",),
    "mil": ("mil.csv", "mil.pt"),
    "evaluate": ("test_bags.csv", "test_cells.csv", "metrics.json"),
    "report": ("report.html",),
}


@dataclass(frozen=True)
class Job:
    """What a stage works on.

    Attributes:
        config: the settings.
        folder: where the files of the stages before are, and the stage's own go.
        cache: a folder that keeps decoded images for later runs; None keeps none.
        resume: whether to go on from a checkpoint.
        launch: the processes that torchrun started; None in a process that is alone.
    """

    config: RunConfig
    folder: Path
    cache: Path | None = None
    resume: bool = False
    launch: Launch | None = None

    @property
    def device(self) -> torch.device:
        """Where to compute."""
        return resolve_device(self.config.device)

    @functools.cached_property
    def manifest(self) -> Manifest:
        """The bags, read once."""
        return read_manifest(self.folder / "bags.json")

    @functools.cached_property
    def images(self) -> ImageSet:
        """The images of the bags, decoded once where memory allows it."""
        with bar("reading images") as on_progress:
            return open_images(
                open_source(self.config.data),
                self.manifest.references(),
                image_px=self.config.image_px,
                cache=self.cache,
                sharers=1 if self.launch is None else self.launch.local_size,
                on_progress=on_progress,
            )

    def views(self) -> Views:
        """What the encoder sees of a patch."""
        if self.config.data == "digits":
            return DigitViews()
        return SmearViews(crop_share=self.config.crop)

    def model(self, channels: int) -> PretrainingModel:
        """The encoder and head before training, the same for every method."""
        config = self.config
        random = generator(config.seed, "encoder")
        model = PretrainingModel(
            channels, config.image_px, encoder=config.encoder, generator=random
        )
        return model.to(self.device).to(memory_format=torch.channels_last)


def make_bags(job: Job) -> dict[str, Any]:
    """Draw the manifest, after every image of its classes was decoded once.

    Raises:
        InputError: images cannot be read (their list is in corrupt.txt), or do not suffice.
    """
    config = job.config
    source = open_source(config.data)
    source.check_size(config.image_px)

    def draw(excluded: Sequence[str]) -> Manifest:
        return make_manifest(
            source.references,
            source.classes,
            source=config.data,
            normal=config.normal,
            abnormal=config.abnormal,
            witness_rate=config.witness_rate,
            bag_size=config.bag_size,
            seed=config.seed,
            n_bags=config.n_bags,
            excluded=excluded,
        )

    # Settings that no image can satisfy are refused before all are decoded.
    manifest = draw([])
    named = _candidates(source.references, source.classes, config)
    with bar("checking images") as on_progress:
        workers = config.workers or torch.get_num_threads()
        corrupt = check_images(source, named, workers=workers, on_progress=on_progress)
    if corrupt:
        lines = "".join(f"{reference}\t{reason}\n" for reference, reason in corrupt.items())
        (job.folder / "corrupt.txt").write_text(lines)
        if not config.skip_corrupt:
            first = ", ".join(list(corrupt)[:3])
            noun = "image" if len(corrupt) == 1 else "images"
            raise InputError(
                f"{len(corrupt)} {noun} cannot be read, first {first} "
                f"(all: {job.folder / 'corrupt.txt'}): mend them, or pass --skip-corrupt"
            )
        manifest = draw(list(corrupt))
    manifest.write(job.folder / "bags.json")
    return {"images_checked": len(named), "images_skipped": len(corrupt)} if corrupt else {}


def pretrain_encoder(job: Job) -> dict[str, Any]:
    """Train the encoder; an untrained one is written as a checkpoint too."""
    config, images = job.config, job.images
    model = job.model(images.channels)
    settings = {name: getattr(config, name) for name in settings_of(("bags", "pretrain"))}
    checkpoints = Checkpoints(job.folder, settings, job.resume)
    if config.method == "random":
        checkpoints.write({"parts": {"model": model.state_dict()}})
        if rank() == 0:
            write_csv(job.folder / "pretraining.csv", [])
        return {}
    patches = _training_set(job.manifest, images)
    with bar("pretraining") as on_progress, _deterministic(), _asked_to_stop() as stop_asked:
        records, throughput = pretrain(
            model,
            patches,
            job.views(),
            config,
            checkpoints,
            on_epoch=lambda record: on_progress(record.epoch, config.epochs),
            stop_asked=stop_asked,
        )
    if rank() == 0:
        write_csv(job.folder / "pretraining.csv", [record.row() for record in records])
    return throughput.summary()


@torch.no_grad()
def embed_patches(job: Job) -> dict[str, Any]:
    """Embed every patch of every bag with the trained encoder."""
    config, images, views = job.config, job.images, job.views()
    model = job.model(images.channels)
    name = BEST if config.checkpoint == "best" and config.method != "random" else LAST
    model.load_state_dict(read_checkpoint(job.folder / name)["parts"]["model"])
    module = model if config.embedding == "head" else model.encoder
    module.eval()
    chunks = torch.split(torch.arange(len(images)), CHUNK)
    embeddings = []
    with bar("embedding") as on_progress, _deterministic():
        loaded = batches(images, chunks, device=job.device, workers=config.workers)
        for number, patches in enumerate(loaded, start=1):
            embeddings.append(module(views.centre(patches)).cpu())
            on_progress(number, len(chunks))
    write_embeddings(job.folder / "embeddings.npz", torch.cat(embeddings), list(images.references))
    return {}


def train_aggregator(job: Job) -> dict[str, Any]:
    """Train the aggregator on training bags; validation bags choose its epoch."""
    config = job.config
    train, validation = (_bag_set(job, split) for split in ("train", "validation"))
    init = None if config.mil_init is None else _read_mil(Path(config.mil_init))["state"]
    with bar(f"{config.mil} aggregator") as on_progress, _deterministic():
        trained = train_mil(
            train,
            validation,
            aggregator=config.mil,
            epochs=config.mil_epochs,
            learning_rate=config.mil_learning_rate,
            weight_decay=config.mil_weight_decay,
            seed=config.seed,
            init=init,
            on_epoch=lambda record: on_progress(record.epoch, config.mil_epochs),
        )
    write_csv(job.folder / "mil.csv", [asdict(record) for record in trained.records])
    content = {
        "format": _MIL_FORMAT,
        "aggregator": config.mil,
        "state": trained.model.state_dict(),
        "epoch": trained.epoch,
        "validation_loss": trained.records[trained.epoch - 1].validation_loss,
    }
    write_whole(job.folder / "mil.pt", lambda file: torch.save(content, file))
    return {}


def evaluate_bags(job: Job) -> dict[str, Any]:
    """Predict the test bags, rank their cells, and measure both."""
    config, manifest = job.config, job.manifest
    stored = _read_mil(job.folder)
    model = load_aggregator(stored["aggregator"], stored["state"]).to(job.device)
    test = _bag_set(job, "test")
    probabilities, scores = predict(model, test.instances)
    predictions = [
        BagPrediction(
            bag=bag.name,
            positive=bag.positive,
            probability=probability,
            images=tuple(instance.image for instance in bag.instances),
            scores=tuple(of_cells),
            abnormal=tuple(instance.abnormal for instance in bag.instances),
        )
        for bag, probability, of_cells in zip(
            manifest.split("test"), probabilities.tolist(), scores.tolist(), strict=True
        )
    ]
    write_csv(job.folder / "test_bags.csv", per_bag_rows(predictions, config.resolved_top_k))
    write_csv(job.folder / "test_cells.csv", per_cell_rows(predictions))
    metrics = {
        **summarise(predictions, config.resolved_top_k, seed=config.seed),
        "pretraining": _summarise_pretraining(job, test.instances.flatten(0, 1)),
        "mil": {name: stored[name] for name in ("epoch", "validation_loss")},
        "splits": manifest.counts(),
    }
    write_json(job.folder / "metrics.json", metrics)
    return {}


def report_run(job: Job) -> dict[str, Any]:
    """Write the report from the other files."""
    read = open_source(job.config.data).read
    write_report(job.folder, lambda references: read(references, job.config.image_px))
    return {}


STAGE_FUNCTIONS: dict[str, Callable[[Job], dict[str, Any]]] = {
    "bags": make_bags,
    "pretrain": pretrain_encoder,
    "embed": embed_patches,
    "mil": train_aggregator,
    "evaluate": evaluate_bags,
    "report": report_run,
}


def _candidates(references: Sequence[str], classes: Sequence[str], config: RunConfig) -> list[str]:
    """The images whose class may go into a bag."""
    named = [name.strip() for name in f"{config.normal},{config.abnormal}".split(",")]
    pairs = zip(references, classes, strict=True)
    return [reference for reference, name in pairs if REST in named or name in named]


def _training_set(manifest: Manifest, images: ImageSet) -> TrainingSet:
    def rows(split: str, positive: bool, most: int | None = None) -> Tensor:
        bags = [bag for bag in manifest.split(split) if bag.positive == positive]
        found = images.rows([cell.image for bag in bags for cell in bag.instances])
        n_kept = len(found) if most is None else min(most, len(found))
        return found[torch.arange(n_kept) * len(found) // n_kept]

    cells = {cell.image: cell.abnormal for bag in manifest.bags for cell in bag.instances}
    return TrainingSet(
        images=images,
        positive=rows("train", True),
        negative=rows("train", False),
        held_out_positive=rows("validation", True, _HELD_OUT // 2),
        held_out_negative=rows("validation", False, _HELD_OUT // 2),
        abnormal=torch.tensor([cells[reference] for reference in images.references]),
    )


def _read_mil(folder: Path) -> dict[str, Any]:
    """What the mil stage stored.

    Raises:
        InputError: the file is not there, or is not of this version.
    """
    return read_torch(folder / "mil.pt", _MIL_FORMAT, "run `slam-ags mil` there")


def _bag_set(job: Job, split: str) -> BagSet:
    """The stored embeddings of a split as bags."""
    manifest, device = job.manifest, job.device
    bags = manifest.split(split)
    embeddings = read_embeddings(job.folder / "embeddings.npz", manifest.references(split))
    instances = embeddings.view(len(bags), manifest.bag_size, -1)
    labels = torch.tensor([float(bag.positive) for bag in bags])
    return BagSet(instances.to(device), labels.to(device))


def _summarise_pretraining(job: Job, held_out: Tensor) -> dict[str, Any]:
    """Conflict over all epochs, losses of the last, and collapse measures on the test patches."""
    rows = read_csv(job.folder / "pretraining.csv")
    rank, spread = collapse_measures(held_out)
    summary: dict[str, Any] = {
        "epochs": len(rows),
        "effective_rank": rank,
        "feature_std": spread,
    }
    if rows and "cosine" in rows[0]:
        summary |= {
            "conflict_rate": float(np.mean([float(row["conflict_rate"]) for row in rows])),
            "mean_cosine": float(np.mean([float(row["cosine"]) for row in rows])),
        }
    after_losses = ("cosine", "conflict_rate", "norm_", "weight_", "effective_", "feature_")
    last = rows[-1] if rows else {}
    return summary | {
        name: float(value)
        for name, value in last.items()
        if name != "epoch" and not name.startswith(after_losses)
    }


def _deterministic() -> Any:
    # Without enabled=True these flags would switch cuDNN off.
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)


@contextmanager
def _asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C into a question that the loop asks; the second one interrupts.

    With several processes no second one does: torchrun sends its own after that of the terminal.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(number: int, frame: FrameType | None) -> None:
        asked.set()
        if count() == 1:
            signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)
