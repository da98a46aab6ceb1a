"""Sources that need no download: drawn marrow smears, and scikit-learn's handwritten digits."""

import functools
import hashlib
from collections.abc import Sequence
from importlib import resources
from importlib.metadata import version

import numpy as np
import torch
from torch import Tensor

from slam_ags_example.data.source import PatchSource
from slam_ags_example.smears import PIXEL_UM, SIZE_PX, draw_cells

__all__ = ["digits_source", "synthetic_source"]

_N_DRAWN = {"LYT": 200_000, "BLA": 50_000}
_SMEAR_SEED = 0  # of the set; which images of it a run uses is the manifest's affair
_FIELD_UM = SIZE_PX * PIXEL_UM
_N_INK_LEVELS = 16  # ink per pixel of a digit is an integer from 0 to 16


def synthetic_source() -> PatchSource:
    """Drawn marrow smears: ``synthetic/LYT/000012`` is lymphocyte 12 of the fixed set."""
    names = sorted(_N_DRAWN)
    return PatchSource(
        name="synthetic",
        references=tuple(
            f"synthetic/{name}/{index:06d}" for name in names for index in range(_N_DRAWN[name])
        ),
        classes=tuple(name for name in names for _ in range(_N_DRAWN[name])),
        channels=3,
        sizes_px=range(16, 4097),
        reader=_draw,
        stamp=_smear_stamp,
        helpers="processes",  # the drawing holds the interpreter's lock
    )


def digits_source() -> PatchSource:
    """UCI Optical Recognition of Handwritten Digits, test part; a class is the digit."""
    _, targets = _digits()
    return PatchSource(
        name="digits",
        references=tuple(f"digits/{index:04d}" for index in range(len(targets))),
        classes=tuple(str(target) for target in targets),
        channels=1,
        sizes_px=range(8, 9),
        reader=_read_digits,
        stamp=lambda _: [f"scikit-learn {version('scikit-learn')}"],
    )


def _draw(references: Sequence[str], image_px: int) -> Tensor:
    parts = [reference.split("/") for reference in references]
    return draw_cells(
        [name for _, name, _ in parts],
        seed=_SMEAR_SEED,
        indices=[int(index) for _, _, index in parts],
        size_px=image_px,
        pixel_um=_FIELD_UM / image_px,
    ).images


def _smear_stamp(references: Sequence[str]) -> list[str]:
    """The generator's own text: no change to it can leave old drawings in a cache."""
    digest = hashlib.sha256()
    for file in sorted(resources.files("slam_ags_example.smears").iterdir(), key=lambda f: f.name):
        if file.name.endswith(".py"):
            digest.update(file.read_bytes())
    return [f"smears {digest.hexdigest()}, seed {_SMEAR_SEED}, numpy {version('numpy')}"]


def _read_digits(references: Sequence[str], image_px: int) -> Tensor:
    images, _ = _digits()
    return images[[int(reference.removeprefix("digits/")) for reference in references]]


@functools.cache
def _digits() -> tuple[Tensor, tuple[int, ...]]:
    # Imported here: it takes a second, and the processes that draw smears do without.
    from sklearn.datasets import load_digits

    digits = load_digits()
    levels = np.rint(digits.images * (255 / _N_INK_LEVELS)).astype(np.uint8)
    return torch.from_numpy(levels).unsqueeze(1), tuple(digits.target.tolist())
