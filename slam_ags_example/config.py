"""The settings of a run: names, presets, checks, files, and the random streams of a seed."""

import difflib
import json
import math
import types
import typing
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gradsurgery import methods

__all__ = [
    "AGGREGATORS",
    "ENCODERS",
    "METHODS",
    "OPTIMIZERS",
    "PRECISIONS",
    "PRESETS",
    "PUBLISHED_TOP_K",
    "InputError",
    "RunConfig",
    "TrainingFailedError",
    "generator",
    "one_of",
    "read_settings",
    "resolve_device",
    "settle",
    "stream_seed",
]

METHODS = (
    "slam-ags",
    "weaksupcon",
    "simclr",
    "ws-sil",
    "supervised",
    "one-class",
    "random",
)
AGGREGATORS = ("pamil", "abmil", "mean", "max")
ENCODERS = ("small", "resnet18")
OPTIMIZERS = ("adamw", "sgd")
PRECISIONS = ("float32", "bfloat16", "float16")
PUBLISHED_TOP_K = 400

# What a preset sets; --config and options set on top of it. "quick" is the dataclass's defaults.
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {},
    "digits": {
        "data": "digits",
        "normal": "rest",
        "abnormal": "8",
        "image_px": 8,
        "bag_size": 20,
        "n_bags": None,
        "epochs": 60,
        "mil_epochs": 200,
    },
    # The published hyperparameters (arXiv 2511.14639 and its script). Not published: bag size.
    "paper": {
        "image_px": 250,
        "bag_size": 500,
        "n_bags": None,
        "encoder": "resnet18",
        "optimizer": "sgd",
        "epochs": 150,
        "batch_size": 256,
        "learning_rate": 1e-3,
        "weight_decay": 1e-4,
        "warm_up": 10 / 150,
        "crop": 224 / 250,
        "precision": "bfloat16",
        "mil": "pamil",
        "mil_epochs": 100,
    },
}


class InputError(ValueError):
    """Wrong input from a person: the message is one line that says what to change."""


class TrainingFailedError(RuntimeError):
    """Training cannot go on; the message is one line that says what to try."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides the numbers of a run.

    ``surgery`` belongs to slam-ags, where None stands for ``"ags"``; no other method takes one.
    What a setting does stands in :data:`slam_ags_example.options.OPTIONS`, which is also the help
    of the command line.

    Raises:
        InputError: a value is out of its range; the message names the option.
    """

    preset: str = "quick"
    data: str = "synthetic"
    normal: str = "LYT"
    abnormal: str = "BLA"
    image_px: int = 64
    skip_corrupt: bool = False
    witness_rate: float = 0.1
    bag_size: int = 100
    n_bags: int | None = 100
    seed: int = 0
    method: str = "slam-ags"
    surgery: str | None = None
    encoder: str = "small"
    epochs: int = 6
    batch_size: int = 256
    micro_batches: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 3e-3
    weight_decay: float = 1e-4
    warm_up: float = 1 / 15
    crop: float = 0.7
    temperature: float = 0.07
    precision: str = "float32"
    checkpoint: str = "last"
    embedding: str = "encoder"
    mil: str = "max"
    mil_init: str | None = None
    mil_epochs: int = 100
    mil_learning_rate: float | None = None
    mil_weight_decay: float | None = None
    top_k: int | None = None
    device: str = "auto"
    workers: int = 0

    def __post_init__(self) -> None:
        for option, value, allowed in [
            ("--preset", self.preset, tuple(PRESETS)),
            ("--method", self.method, METHODS),
            ("--encoder", self.encoder, ENCODERS),
            ("--optimizer", self.optimizer, OPTIMIZERS),
            ("--precision", self.precision, PRECISIONS),
            ("--checkpoint", self.checkpoint, ("last", "best")),
            ("--embedding", self.embedding, ("encoder", "head")),
            ("--mil", self.mil, AGGREGATORS),
        ]:
            one_of(option, value, allowed)
        self._settle_surgery()
        self._check_counts()
        self._check_rates()

    def _settle_surgery(self) -> None:
        """Check ``surgery``, and put slam-ags's own default in place of None."""
        if self.surgery is not None:
            one_of("--surgery", self.surgery, tuple(methods.available()))
            if self.method != "slam-ags":
                raise InputError(
                    f"--surgery belongs to --method slam-ags: leave --surgery {self.surgery} out "
                    f"for --method {self.method}"
                )
        elif self.method == "slam-ags":
            object.__setattr__(self, "surgery", "ags")  # the class is frozen

    def _check_counts(self) -> None:
        for option, count, least in [
            ("--image-px", self.image_px, 8),
            ("--bag-size", self.bag_size, 1),
            ("--seed", self.seed, 0),
            ("--epochs", self.epochs, 1),
            ("--micro-batches", self.micro_batches, 1),
            ("--mil-epochs", self.mil_epochs, 1),
            ("--top-k", 1 if self.top_k is None else self.top_k, 1),
            ("--workers", self.workers, 0),
        ]:
            if count < least:
                raise InputError(f"{option} must be at least {least}, got {count}")
        if self.batch_size < 4 * self.micro_batches:
            raise InputError(
                "--batch-size must be at least 4 for each of --micro-batches (two patches for each "
                f"of the two tasks), got {self.batch_size} for {self.micro_batches}"
            )
        if self.n_bags is not None and (self.n_bags < 6 or self.n_bags % 2):
            raise InputError(
                "--bags must be even and at least 6 (a negative and a positive bag for each of "
                f"train, validation and test), got {self.n_bags}"
            )

    def _check_rates(self) -> None:
        if not 0 < self.witness_rate <= 1:
            raise InputError(f"--witness-rate must be in (0, 1], got {self.witness_rate:g}")
        if not 0.1 <= self.crop <= 1:
            raise InputError(f"--crop must be in [0.1, 1], got {self.crop:g}")
        if not 0 <= self.warm_up < 1:
            raise InputError(f"--warm-up must be in [0, 1), got {self.warm_up:g}")
        for option, rate in [
            ("--lr", self.learning_rate),
            ("--temperature", self.temperature),
            ("--mil-lr", 1.0 if self.mil_learning_rate is None else self.mil_learning_rate),
        ]:
            if not (math.isfinite(rate) and rate > 0):
                raise InputError(f"{option} must be positive and finite, got {rate:g}")
        for option, decay in [
            ("--weight-decay", self.weight_decay),
            ("--mil-weight-decay", 0.0 if self.mil_weight_decay is None else self.mil_weight_decay),
        ]:
            if not (math.isfinite(decay) and decay >= 0):
                raise InputError(f"{option} must be finite and not negative, got {decay:g}")

    @property
    def resolved_top_k(self) -> int:
        """K of the retrieval measures, never more than the bag holds.

        The published K = 400 counts cells of bags with thousands; by default a smaller bag gets
        the top quarter, so that K stays a short list there too.
        """
        wanted = min(PUBLISHED_TOP_K, self.bag_size // 4) if self.top_k is None else self.top_k
        return min(max(wanted, 1), self.bag_size)


def settle(stored: Mapping[str, Any], given: Mapping[str, Any]) -> RunConfig:
    """A configuration from three layers: a preset, a file on top of it, options on top of both.

    Args:
        stored: settings from a file; empty where there is none.
        given: settings from the command line.

    Raises:
        InputError: a setting is not known, of the wrong type, or out of its range.
    """
    layers = {**stored, **given}
    default = "digits" if layers.get("data") == "digits" else "quick"
    preset = layers.get("preset", default)
    if preset in PRESETS:
        layers = {**PRESETS[preset], **layers}
    known = {field.name for field in fields(RunConfig)}
    for name, value in layers.items():
        one_of("a setting", name, sorted(known))
        _check_type(name, value)
    return RunConfig(**{**layers, "preset": preset})


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a JSON file: a run's config.json, or an object of settings alone.

    Raises:
        InputError: the file cannot be read or holds no object.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    content = content.get("config", content) if isinstance(content, dict) else content
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold one JSON object of settings")
    return content


def _check_type(name: str, value: object) -> None:
    hint = typing.get_type_hints(RunConfig)[name]
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    fits = isinstance(value, allowed) and not (isinstance(value, bool) and bool not in allowed)
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        fits = True
    if not fits:
        kind = " or ".join("null" if kind is types.NoneType else kind.__name__ for kind in allowed)
        raise InputError(f"setting {name} must be {kind}, got {json.dumps(value, default=str)}")


def one_of(option: str, value: str, allowed: Sequence[str]) -> None:
    """Raise an InputError that offers the nearest name unless ``value`` is allowed."""
    if value in allowed:
        return
    near = difflib.get_close_matches(str(value), allowed, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise InputError(f"{option} must be one of {', '.join(allowed)}, got {value!r}{hint}")


def resolve_device(name: str) -> torch.device:
    """The torch device of ``--device``; ``"auto"`` is CUDA where there is one, else the CPU.

    Raises:
        InputError: torch does not know the device, or it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {name} cannot be used here; try --device auto") from error
    return device


def stream_seed(seed: int, purpose: str) -> int:
    """A 64-bit seed of its own for each purpose, so that no stage shifts another's numbers."""
    sequence = np.random.SeedSequence([seed, zlib.crc32(purpose.encode())])
    return int(sequence.generate_state(1, np.uint64)[0])


def generator(seed: int, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator on ``device`` for one purpose of a run with this seed."""
    return torch.Generator(device=device).manual_seed(stream_seed(seed, purpose) % 2**63)
