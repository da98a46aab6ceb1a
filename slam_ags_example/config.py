"""The settings of a run: names, defaults, checks, and the random streams that a seed stands for."""

import difflib
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gradsurgery import methods

__all__ = [
    "METHODS",
    "PUBLISHED_TOP_K",
    "InputError",
    "RunConfig",
    "generator",
    "one_of",
    "resolve_device",
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
PUBLISHED_TOP_K = 400


class InputError(ValueError):
    """Wrong input from a person: the message is one line that says what to change."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides the numbers of a run.

    ``surgery`` belongs to slam-ags, where None stands for ``"ags"``; no other method takes one.

    Raises:
        InputError: a value is out of its range; the message names the option.
    """

    data: str = "digits"
    abnormal: str = "8"
    witness_rate: float = 0.1
    bag_size: int = 20
    n_bags: int | None = None
    seed: int = 0
    method: str = "slam-ags"
    surgery: str | None = None
    epochs: int = 60
    batch_size: int = 256
    learning_rate: float = 3e-3
    weight_decay: float = 1e-4
    temperature: float = 0.07
    mil_epochs: int = 200
    mil_learning_rate: float = 1e-3
    mil_weight_decay: float = 1e-2
    top_k: int | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        one_of("--method", self.method, METHODS)
        self._settle_surgery()
        if not 0 < self.witness_rate <= 1:
            raise InputError(f"--witness-rate must be in (0, 1], got {self.witness_rate:g}")
        for option, count in [
            ("--bag-size", self.bag_size),
            ("--epochs", self.epochs),
            ("--mil-epochs", self.mil_epochs),
            ("--top-k", 1 if self.top_k is None else self.top_k),
        ]:
            if count < 1:
                raise InputError(f"{option} must be at least 1, got {count}")
        if self.batch_size < 4:
            raise InputError(
                "--batch-size must be at least 4 (two patches for each of the two tasks), "
                f"got {self.batch_size}"
            )
        if self.n_bags is not None and (self.n_bags < 6 or self.n_bags % 2):
            raise InputError(
                "--bags must be even and at least 6 (a negative and a positive bag for each of "
                f"train, validation and test), got {self.n_bags}"
            )
        if self.seed < 0:
            raise InputError(f"--seed must not be negative, got {self.seed}")
        for option, rate in [
            ("--lr", self.learning_rate),
            ("--temperature", self.temperature),
            ("--mil-lr", self.mil_learning_rate),
        ]:
            if not (math.isfinite(rate) and rate > 0):
                raise InputError(f"{option} must be positive and finite, got {rate:g}")
        for option, decay in [
            ("--weight-decay", self.weight_decay),
            ("--mil-weight-decay", self.mil_weight_decay),
        ]:
            if not (math.isfinite(decay) and decay >= 0):
                raise InputError(f"{option} must be finite and not negative, got {decay:g}")

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

    @property
    def resolved_top_k(self) -> int:
        """K of the retrieval measures, never more than the bag holds.

        The published K = 400 counts cells of bags with thousands; by default a smaller bag gets
        the top quarter, so that K stays a short list there too.
        """
        wanted = min(PUBLISHED_TOP_K, self.bag_size // 4) if self.top_k is None else self.top_k
        return min(max(wanted, 1), self.bag_size)


def one_of(option: str, value: str, allowed: Sequence[str]) -> None:
    """Raise an InputError that offers the nearest name unless ``value`` is allowed."""
    if value in allowed:
        return
    near = difflib.get_close_matches(value, allowed, n=1)
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
