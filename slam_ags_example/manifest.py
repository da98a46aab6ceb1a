"""The bag manifest: what it says, how it is written, and what is checked when it is read."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from slam_ags_example.config import InputError, one_of
from slam_ags_example.output import write_whole

__all__ = ["SPLITS", "Bag", "Instance", "Manifest", "read_manifest"]

SPLITS = ("train", "validation", "test")
_FORMAT = "slam-ags bags, version 2"
_INSTANCE = {"image": str, "cell_class": str, "abnormal": bool}
_BAG = {"name": str, "split": str, "positive": bool, "instances": list}
_MANIFEST = {
    "source": str,
    "seed": int,
    "witness_rate": float,
    "bag_size": int,
    "normal": str,
    "abnormal": str,
    "excluded": int,
    "bags": list,
}


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
        normal: the normal classes, as asked for.
        abnormal: the abnormal classes, as asked for.
        excluded: how many images of the source were left out because they cannot be read.
        bags: all bags, split after split.
    """

    source: str
    seed: int
    witness_rate: float
    bag_size: int
    normal: str
    abnormal: str
    excluded: int
    bags: tuple[Bag, ...]

    def split(self, name: str) -> list[Bag]:
        """The bags of one split, in the manifest's order."""
        return [bag for bag in self.bags if bag.split == name]

    def references(self, split: str | None = None) -> list[str]:
        """The image of each instance, bag after bag, of one split or of all."""
        bags = self.bags if split is None else self.split(split)
        return [instance.image for bag in bags for instance in bag.instances]

    def counts(self) -> dict[str, dict[str, int]]:
        """Bags, positive bags, patches and abnormal patches of each split."""
        return {
            split: {
                "bags": len(bags),
                "positive_bags": sum(bag.positive for bag in bags),
                "patches": sum(len(bag.instances) for bag in bags),
                "abnormal_patches": sum(cell.abnormal for bag in bags for cell in bag.instances),
            }
            for split in SPLITS
            for bags in [self.split(split)]
        }

    def write(self, path: Path) -> None:
        """Write as JSON, an instance a line; :func:`read_manifest` reads it back equal.

        Written beside its place and renamed, so that it is there whole or not at all.
        """
        try:
            write_whole(path, lambda file: file.writelines(map(str.encode, self._lines())))
        except OSError as error:
            raise InputError(
                f"{path} cannot be written ({error.strerror}): name another folder"
            ) from error

    def _lines(self) -> Iterator[str]:
        yield f'{{"format": {json.dumps(_FORMAT)},\n'
        for name in (field.name for field in fields(self) if field.name != "bags"):
            yield f'"{name}": {json.dumps(getattr(self, name))},\n'
        yield '"bags": ['
        for n_before, bag in enumerate(self.bags):
            head = {"name": bag.name, "split": bag.split, "positive": bag.positive}
            cells = ",\n  ".join(json.dumps(vars(cell)) for cell in bag.instances)
            comma = "," if n_before else ""
            yield f'{comma}\n {json.dumps(head)[:-1]}, "instances": [\n  {cells}]}}'
        yield "\n]}\n"


def read_manifest(path: Path) -> Manifest:
    """Read a manifest that :meth:`Manifest.write` wrote, or that a person wrote or changed.

    Raises:
        InputError: the file is not there or is not a manifest, an image is in it twice, a bag has
            another size than it should, a split has no name of ``SPLITS`` or lacks one of the two
            labels, or a bag's label is not that of its instances.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as a bag manifest: make the bags again") from error
    if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
        raise InputError(f"{path} is not a bag manifest of this version: make the bags again")
    try:
        manifest = _build(content)
        _check(manifest)
    except InputError as error:
        raise InputError(f"{path}: {error}; put it right, or make the bags again") from error
    return manifest


def _build(content: dict[str, Any]) -> Manifest:
    """The content of a file as dataclasses, every field of the right type."""
    _require_fields("the manifest", content, _MANIFEST)
    bags = []
    for place, bag in enumerate(content["bags"]):
        _require_fields(f"bag {place}", bag, _BAG)
        for cell in bag["instances"]:
            _require_fields(f"an instance of bag {bag['name']}", cell, _INSTANCE)
        bags.append(Bag(**bag | {"instances": tuple(Instance(**x) for x in bag["instances"])}))
    return Manifest(**content | {"bags": tuple(bags)})


def _require_fields(what: str, record: Any, types: dict[str, type]) -> None:
    if not isinstance(record, dict) or record.keys() != types.keys():
        raise InputError(f"{what} must have {', '.join(types)} and nothing else")
    for name, kind in types.items():
        value = record[name]
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise InputError(f"{name} of {what} must be of type {kind.__name__}, got {value!r:.80}")


def _check(manifest: Manifest) -> None:
    """What holds of every manifest that :func:`make_manifest` makes and that a run relies on."""
    if not 0 < manifest.witness_rate <= 1:
        raise InputError(f"witness_rate must be in (0, 1], got {manifest.witness_rate:g}")
    for name, n in (("seed", manifest.seed), ("excluded", manifest.excluded)):
        if n < 0:
            raise InputError(f"{name} must not be negative, got {n}")
    if manifest.bag_size < 1:
        raise InputError(f"bag_size must be at least 1, got {manifest.bag_size}")
    for bag in manifest.bags:
        one_of(f"the split of {bag.name}", bag.split, SPLITS)
        if len(bag.instances) != manifest.bag_size:
            raise InputError(
                f"{bag.name} holds {len(bag.instances)} instances and bag_size is "
                f"{manifest.bag_size}"
            )
        if bag.positive != any(cell.abnormal for cell in bag.instances):
            label, found = ("positive", "no") if bag.positive else ("negative", "an")
            raise InputError(f"{bag.name} is {label} and holds {found} abnormal instance")
    name, n = next(iter(Counter(bag.name for bag in manifest.bags).most_common(1)), ("", 0))
    if n > 1:
        raise InputError(f"{n} bags have the name {name}")
    _check_images_once(manifest.bags)
    labels = {(bag.split, bag.positive) for bag in manifest.bags}
    for split in SPLITS:
        for positive in (False, True):
            if (split, positive) not in labels:
                raise InputError(f"{split} has no {'positive' if positive else 'negative'} bag")


def _check_images_once(bags: Sequence[Bag]) -> None:
    bag_of: dict[str, Bag] = {}
    for bag in bags:
        for cell in bag.instances:
            other = bag_of.setdefault(cell.image, bag)
            if other is not bag:
                raise InputError(
                    f"image {cell.image!r} is in {other.name} ({other.split}) and in {bag.name} "
                    f"({bag.split})"
                )
        if len({cell.image for cell in bag.instances}) < len(bag.instances):
            raise InputError(f"an image is in {bag.name} twice")
