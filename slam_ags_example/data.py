"""Where patches come from: images, their classes, and the references a manifest names them by."""

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from slam_ags_example.config import InputError

__all__ = ["SOURCES", "PatchSet", "load_patches"]

SOURCES = ("digits",)


@dataclass(frozen=True)
class PatchSet:
    """Images with their classes.

    Attributes:
        images: [N, C, H, W], float32 in [0, 1].
        classes: the class of each image, N names.
        references: what a manifest calls each image, N different strings.
    """

    images: Tensor
    classes: tuple[str, ...]
    references: tuple[str, ...]

    def rows(self, references: list[str]) -> Tensor:
        """The row of ``images`` of each reference, [len(references)], int64.

        Raises:
            InputError: a reference is not in this set.
        """
        row_of = {reference: row for row, reference in enumerate(self.references)}
        missing = [reference for reference in references if reference not in row_of]
        if missing:
            raise InputError(
                f"{len(missing)} images of the manifest are not in the data, first {missing[0]!r}: "
                "pass the --data that the manifest was made from"
            )
        return torch.tensor([row_of[reference] for reference in references], dtype=torch.int64)


def load_patches(source: str) -> PatchSet:
    """Read every image of a source.

    Args:
        source: ``"digits"``: the 1797 handwritten digits, 8x8, that scikit-learn ships (UCI Optical
            Recognition of Handwritten Digits, test part); a class is the digit as a string.

    Raises:
        InputError: the source is not known.
    """
    if source not in SOURCES:
        raise InputError(f"--data must be one of {', '.join(SOURCES)}, got {source!r}")
    digits = load_digits()
    n_levels = 16.0  # ink per pixel is an integer from 0 to 16
    images = torch.from_numpy(np.asarray(digits.images / n_levels, dtype=np.float32)).unsqueeze(1)
    classes = tuple(str(target) for target in digits.target)
    references = tuple(f"digits/{index:04d}" for index in range(len(classes)))
    return PatchSet(images=images, classes=classes, references=references)
