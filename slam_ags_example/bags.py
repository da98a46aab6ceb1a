"""Bags of patches: the manifest that says which image is in which bag of which split."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slam_ags_example.config import InputError, stream_seed

__all__ = ["SPLITS", "Bag", "Instance", "Manifest", "make_manifest", "read_manifest"]

SPLITS = ("train", "validation", "test")
_SPLIT_SHARE = {"validation": 0.2, "test": 0.3}  # the rest trains
_FORMAT = "slam-ags bags, version 1"


@dataclass(frozen=True)
class Instance:
    """One patch of a bag: the image's reference, its class, and whether that is abnormal."""

    image: str
    cell_class: str
    abnormal: bool


@dataclass(frozen=True)
class Bag:
    """One slide: its instances in an order that says nothing about their classes."""

    name: str
    split: str
    positive: bool
    instances: tuple[Instance, ...]


@dataclass(frozen=True)
class Manifest:
    """A bag set: references to images, never copies, and what it was made from.

    Attributes:
        source: the ``--data`` that the references belong to.
        seed: the seed that drew it.
        witness_rate: share of abnormal patches that was asked for in a positive bag, in (0, 1].
        bag_size: instances per bag.
        abnormal: the abnormal class.
        bags: all bags, split after split.
    """

    source: str
    seed: int
    witness_rate: float
    bag_size: int
    abnormal: str
    bags: tuple[Bag, ...]

    def split(self, name: str) -> list[Bag]:
        """The bags of one split, in the manifest's order."""
        return [bag for bag in self.bags if bag.split == name]

    def write(self, path: Path) -> None:
        """Write as JSON; :func:`read_manifest` reads it back equal."""
        path.write_text(json.dumps({"format": _FORMAT, **asdict(self)}, indent=1) + "\n")


def make_manifest(
    references: Sequence[str],
    classes: Sequence[str],
    *,
    source: str,
    abnormal: str,
    witness_rate: float,
    bag_size: int,
    seed: int,
    n_bags: int | None = None,
) -> Manifest:
    """Draw bags without replacement: half negative, half positive, one bag at most for an image.

    A positive bag of n holds round(witness_rate · n) abnormal patches. Train, validation and test
    get half, a fifth and three tenths of the bags, each the same number of either label.

    Args:
        references: N image references, all different.
        classes: the class of each image, N names.
        source: the ``--data`` that the references belong to.
        abnormal: the abnormal class; every other one is normal.
        witness_rate: in (0, 1].
        bag_size: instances per bag, n >= 1.
        seed: the same seed and images give the same manifest.
        n_bags: how many bags, an even number from 6; None takes as many as the images allow.

    Raises:
        InputError: a ValueError; no such class, a witness rate that leaves a positive bag without
            an abnormal patch, or too few images (with the counts needed and available).
    """
    if abnormal not in set(classes):
        known = ", ".join(sorted(set(classes)))
        raise InputError(f"--abnormal must be one of the classes {known}, got {abnormal!r}")
    n_abnormal = round(witness_rate * bag_size)
    if n_abnormal < 1:
        raise InputError(
            f"a positive bag of {bag_size} at witness rate {witness_rate:g} would hold no abnormal "
            f"patch: raise --bag-size to {round(1 / witness_rate)} or more, or --witness-rate"
        )
    random = np.random.default_rng(stream_seed(seed, "bags"))
    order = random.permutation(len(references)).tolist()
    pool = {
        flag: [
            Instance(references[row], classes[row], flag)
            for row in order
            if (classes[row] == abnormal) == flag
        ]
        for flag in (False, True)
    }
    per_pair = {False: 2 * bag_size - n_abnormal, True: n_abnormal}
    n_pairs = _count_pairs(pool, per_pair, n_bags)
    bags: list[Bag] = []
    for split, positive in _layout(n_pairs):
        contents = [pool[True].pop() for _ in range(n_abnormal if positive else 0)]
        contents += [pool[False].pop() for _ in range(bag_size - len(contents))]
        places = random.permutation(bag_size).tolist()
        instances = tuple(contents[place] for place in places)
        bags.append(Bag(f"bag-{len(bags):04d}", split, positive, instances))
    return Manifest(source, seed, witness_rate, bag_size, abnormal, tuple(bags))


def read_manifest(path: Path) -> Manifest:
    """Read a manifest that :meth:`Manifest.write` wrote.

    Raises:
        InputError: the file is not there or is not a manifest.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        if content.pop("format") != _FORMAT:
            raise InputError(f"{path} is not a bag manifest of this version: make the bags again")
        bags = tuple(
            Bag(
                **{
                    **bag,
                    "instances": tuple(Instance(**instance) for instance in bag["instances"]),
                }
            )
            for bag in content.pop("bags")
        )
        return Manifest(**content, bags=bags)
    except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} cannot be read as a bag manifest: make the bags again") from error


def _count_pairs(
    pool: dict[bool, list[Instance]], per_pair: dict[bool, int], n_bags: int | None
) -> int:
    """Pairs of a negative and a positive bag: those asked for, or all that the images allow."""
    fitting = min(len(pool[flag]) // per_pair[flag] for flag in pool if per_pair[flag])
    n_pairs = fitting if n_bags is None else n_bags // 2
    needed_pairs = max(n_pairs, len(SPLITS))
    if needed_pairs > fitting:
        needed = {flag: needed_pairs * count for flag, count in per_pair.items()}
        raise InputError(
            f"too few images for {2 * needed_pairs} bags: needed {needed[False]} normal and "
            f"{needed[True]} abnormal, available {len(pool[False])} and {len(pool[True])}; "
            "lower --bag-size or --bags"
        )
    return n_pairs


def _layout(n_pairs: int) -> list[tuple[str, bool]]:
    """Split and label of each bag in turn: every split gets at least one pair."""
    count = {split: max(1, round(share * n_pairs)) for split, share in _SPLIT_SHARE.items()}
    count["train"] = n_pairs - sum(count.values())
    return [
        (split, positive)
        for split in SPLITS
        for _ in range(count[split])
        for positive in (False, True)
    ]
