"""Which runs a study consists of, where each has its folder, and in which order they run."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from slam_ags_example.config import InputError, RunConfig

__all__ = ["Cell", "Study", "first_difference", "method_label", "plain_settings"]

VARIED = ("method", "surgery", "witness_rate", "seed")


def method_label(method: str, surgery: str | None) -> str:
    """``slam-ags:pcgrad``, or the method alone where the surgery is its own default."""
    return method if surgery in (None, "ags") else f"{method}:{surgery}"


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        config: all settings of the run.
    """

    config: RunConfig

    @property
    def label(self) -> str:
        """The method as tables and figures name it."""
        return method_label(self.config.method, self.config.surgery)

    @property
    def folder(self) -> Path:
        """The run's folder, relative to the study's."""
        method = self.label.replace(":", "_")  # a colon cannot be in a folder's name everywhere
        return Path("cells", f"wr{self.config.witness_rate}", method, f"seed{self.config.seed}")


@dataclass(frozen=True)
class Study:
    """Every method at every witness rate with every seed, all else equal.

    All methods of one witness rate and seed share bags, initial weights, batches and views, so
    that they can be compared in pairs.

    Attributes:
        base: what all runs share; its method, surgery, witness rate and seed are not used.
        methods: names, as ``slam-ags`` or with a surgery, as ``slam-ags:pcgrad``.
        witness_rates: each in (0, 1].
        seeds: each at least 0.

    Raises:
        InputError: a list is empty or says something twice, or a run's settings are wrong.
    """

    base: RunConfig
    methods: Sequence[str]
    witness_rates: Sequence[float]
    seeds: Sequence[int]

    def __post_init__(self) -> None:
        configs = [self._of_method(method) for method in self.methods]
        columns: dict[str, list[Any]] = {
            "methods": [method_label(config.method, config.surgery) for config in configs],
            "witness_rates": [float(rate) for rate in self.witness_rates],
            "seeds": list(self.seeds),
        }
        for field, values in columns.items():
            name = field.replace("_", " ")
            if not values:
                raise InputError(f"a study needs {name}: name at least one")
            twice = [value for value in values if values.count(value) > 1]
            if twice:
                raise InputError(f"the study's {name} hold {twice[0]} twice: leave one out")
            object.__setattr__(self, field, tuple(values))  # the class is frozen
        self.cells()

    def cells(self) -> tuple[Cell, ...]:
        """All runs, in the order in which they start.

        Runs on the same images stand next to each other, and a study that was stopped has whole
        seeds, at every witness rate and of every method.
        """
        return tuple(
            Cell(replace(self._of_method(method), witness_rate=rate, seed=seed))
            for seed in self.seeds
            for rate in self.witness_rates
            for method in self.methods
        )

    def reference(self, wanted: str | None = None) -> str:
        """The method that others are compared to: slam-ags, or else the first.

        Raises:
            InputError: ``wanted`` is not among the methods.
        """
        if wanted is None:
            return "slam-ags" if "slam-ags" in self.methods else self.methods[0]
        if wanted not in self.methods:
            raise InputError(
                f"the reference must be one of the study's methods, {', '.join(self.methods)}; "
                f"got {wanted!r}"
            )
        return wanted

    def _of_method(self, label: str) -> RunConfig:
        method, colon, surgery = label.partition(":")
        return replace(self.base, method=method, surgery=surgery if colon else None)


def plain_settings(config: RunConfig) -> dict[str, Any]:
    """The settings as they come back from a JSON file."""
    settings: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return settings


def first_difference(
    there: Mapping[str, Any], asked: Mapping[str, Any], *, besides: Sequence[str] = ()
) -> str | None:
    """Say what differs first between stored settings and those asked for; None: nothing.

    Args:
        there: settings as stored.
        asked: settings as asked for now.
        besides: names of settings that may differ.
    """
    for name in (*asked, *(name for name in there if name not in asked)):
        if name in besides or there.get(name, ...) == asked.get(name, ...):
            continue
        old, new = (
            json.dumps(settings[name]) if name in settings else "not set"
            for settings in (there, asked)
        )
        return f"{name} is {old} there and {new} here"
    return None
