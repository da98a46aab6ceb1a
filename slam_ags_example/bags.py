"""Drawing bags of patches: which image goes into which bag of which split."""

from collections.abc import Collection, Sequence

import numpy as np

from slam_ags_example.config import InputError, one_of, stream_seed
from slam_ags_example.manifest import SPLITS, Bag, Instance, Manifest, read_manifest

__all__ = [
    "MOST_BAGS",
    "REST",
    "SPLITS",
    "Bag",
    "Instance",
    "Manifest",
    "make_manifest",
    "read_manifest",
]

REST = "rest"  # every class that the other of --normal and --abnormal does not name
MOST_BAGS = 1000  # unless more are asked for
_SPLIT_SHARE = {"validation": 0.2, "test": 0.3}  # the rest trains


def make_manifest(
    references: Sequence[str],
    classes: Sequence[str],
    *,
    source: str,
    normal: str,
    abnormal: str,
    witness_rate: float,
    bag_size: int,
    seed: int,
    n_bags: int | None = None,
    excluded: Collection[str] = (),
) -> Manifest:
    """Draw bags without replacement: half negative, half positive, one bag at most for an image.

    A positive bag of n holds round(witness_rate · n) abnormal patches. Train, validation and test
    get half, a fifth and three tenths of the bags, each the same number of either label.

    Args:
        references: N image references, all different.
        classes: the class of each image, N names.
        source: the ``--data`` that the references belong to.
        normal: the normal classes: a name, names with commas between, or ``"rest"`` for all that
            ``abnormal`` does not name. Images of classes in neither are left out.
        abnormal: the abnormal classes, likewise.
        witness_rate: in (0, 1].
        bag_size: instances per bag, n >= 1.
        seed: the same seed and images give the same manifest.
        n_bags: how many bags, an even number from 6; None takes as many as the images allow, but
            ``MOST_BAGS`` at most.
        excluded: references that are left out, as they cannot be read.

    Raises:
        InputError: a ValueError; no such class, a class that is both, a witness rate that leaves a
            positive bag without an abnormal patch, or too few images (with the counts needed and
            available).
    """
    flag_of = _settle_classes(sorted(set(classes)), normal, abnormal)
    n_abnormal = round(witness_rate * bag_size)
    if n_abnormal < 1:
        raise InputError(
            f"a positive bag of {bag_size} at witness rate {witness_rate:g} would hold no abnormal "
            f"patch: raise --bag-size to {round(1 / witness_rate)} or more, or --witness-rate"
        )
    random = np.random.default_rng(stream_seed(seed, "bags"))
    left_out = frozenset(excluded)
    pool: dict[bool, list[int]] = {False: [], True: []}
    for row in random.permutation(len(references)).tolist():
        flag = flag_of.get(classes[row])
        if flag is not None and references[row] not in left_out:
            pool[flag].append(row)
    n_excluded = len(left_out.intersection(references))
    per_pair = {False: 2 * bag_size - n_abnormal, True: n_abnormal}
    n_pairs = _count_pairs(pool, per_pair, n_bags, n_excluded)
    bags: list[Bag] = []
    for split, positive in _layout(n_pairs):
        contents = [(pool[True].pop(), True) for _ in range(n_abnormal if positive else 0)]
        contents += [(pool[False].pop(), False) for _ in range(bag_size - len(contents))]
        instances = tuple(
            Instance(references[row], classes[row], flag)
            for row, flag in (contents[place] for place in random.permutation(bag_size).tolist())
        )
        bags.append(Bag(f"bag-{len(bags):04d}", split, positive, instances))
    return Manifest(source, seed, witness_rate, bag_size, normal, abnormal, n_excluded, tuple(bags))


def _settle_classes(known: Sequence[str], normal: str, abnormal: str) -> dict[str, bool]:
    """Whether a class is abnormal, for each class that goes into bags."""
    normals, abnormals = _named("--normal", normal, known), _named("--abnormal", abnormal, known)
    if normals is None and abnormals is None:
        raise InputError(f"--normal and --abnormal cannot both be {REST}: name the classes of one")
    if normals is None:
        normals = set(known) - (abnormals or set())
    if abnormals is None:
        abnormals = set(known) - normals
    if both := sorted(normals & abnormals):
        raise InputError(f"--normal and --abnormal both name {', '.join(both)}: leave it to one")
    for option, names in (("--normal", normals), ("--abnormal", abnormals)):
        if not names:
            raise InputError(f"{option} {REST} holds no class: the other option names all of them")
    return dict.fromkeys(normals, False) | dict.fromkeys(abnormals, True)


def _named(option: str, text: str, known: Sequence[str]) -> set[str] | None:
    """The classes that an option names; None for the rest."""
    names = [name.strip() for name in text.split(",")]
    if names == [REST]:
        return None
    for name in names:
        one_of(option, name, known if len(names) > 1 else [*known, REST])
    return set(names)


def _count_pairs(
    pool: dict[bool, list[int]], per_pair: dict[bool, int], n_bags: int | None, n_excluded: int
) -> int:
    """Pairs of a negative and a positive bag: those asked for, or all that the images allow."""
    fitting = min(len(pool[flag]) // per_pair[flag] for flag in pool)
    n_pairs = min(fitting, MOST_BAGS // 2) if n_bags is None else n_bags // 2
    needed_pairs = max(n_pairs, len(SPLITS))
    if needed_pairs > fitting:
        needed = {flag: needed_pairs * count for flag, count in per_pair.items()}
        unreadable = f" ({n_excluded} cannot be read)" if n_excluded else ""
        raise InputError(
            f"too few images for {2 * needed_pairs} bags: needed {needed[False]} normal and "
            f"{needed[True]} abnormal, available {len(pool[False])} and {len(pool[True])}"
            f"{unreadable}; lower --bag-size or --bags"
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
