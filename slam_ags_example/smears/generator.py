"""Marrow smears without a download: patches of labelled cells, drawn from a seed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from slam_ags_example.config import InputError, one_of
from slam_ags_example.smears.morphology import CLASSES
from slam_ags_example.smears.scene import Patch, draw_patch

__all__ = ["PIXEL_UM", "SIZE_PX", "SMEAR_CLASSES", "DrawnCells", "draw_cells"]

SMEAR_CLASSES = tuple(CLASSES)
SIZE_PX = 250
PIXEL_UM = 0.12


@dataclass(frozen=True)
class DrawnCells:
    """Patches with what is known of them.

    Attributes:
        images: [N, 3, size, size], uint8, red, green and blue.
        classes: the class of the cell in the middle, N names.
        area_px: visible area of that cell in pixels, [N], float32.
    """

    images: Tensor
    classes: tuple[str, ...]
    area_px: Tensor


def draw_cells(
    classes: Sequence[str],
    *,
    seed: int,
    indices: Sequence[int] | None = None,
    size_px: int = SIZE_PX,
    pixel_um: float = PIXEL_UM,
) -> DrawnCells:
    """Draw one patch for each class name.

    A patch depends on (seed, its index, its class, size_px, pixel_um) alone: what else is drawn
    with it changes no bit.

    Args:
        classes: N names out of :data:`SMEAR_CLASSES`.
        seed: not negative.
        indices: which patch of the seed's endless stream each one is, N numbers, not negative;
            None takes 0 to N - 1.
        size_px: side of a patch, at least 16.
        pixel_um: side of a pixel in µm. The field of view, size_px times this, is 12 to 120 µm.

    Returns:
        N patches in the order of ``classes``.

    Raises:
        InputError: a ValueError; a class that cannot be drawn, or a value out of its range.

    Example:
        >>> cells = draw_cells(["LYT", "BLA"], seed=0, size_px=64, pixel_um=0.5)
        >>> cells.images.shape, cells.images.dtype
        (torch.Size([2, 3, 64, 64]), torch.uint8)
    """
    indices = range(len(classes)) if indices is None else indices
    _check(classes, seed, indices, size_px, pixel_um)

    def draw(name: str, index: int) -> Patch:
        key = [seed, index, *name.encode()]
        random = np.random.Generator(np.random.SFC64(np.random.SeedSequence(key)))
        return draw_patch(name, random, size_px, pixel_um)

    images = torch.empty((len(classes), 3, size_px, size_px), dtype=torch.uint8)
    area_px = torch.empty(len(classes), dtype=torch.float32)
    # The matrix products are small: more threads in them would only wait for each other.
    with threadpool_limits(limits=1, user_api="blas"):
        for row, (name, index) in enumerate(zip(classes, indices, strict=True)):
            patch = draw(name, index)
            images[row] = torch.from_numpy(patch.picture)
            area_px[row] = patch.area_um2 / pixel_um**2
    return DrawnCells(images=images, classes=tuple(classes), area_px=area_px)


def _check(
    classes: Sequence[str],
    seed: int,
    indices: Sequence[int],
    size_px: int,
    pixel_um: float,
) -> None:
    for name in dict.fromkeys(classes):
        one_of("class", name, SMEAR_CLASSES)
    if len(indices) != len(classes):
        raise InputError(
            f"indices must be as many as classes, got {len(indices)} for {len(classes)}"
        )
    for option, value, least in [
        ("seed", seed, 0),
        ("an index", min(indices, default=0), 0),
        ("size_px", size_px, 16),
    ]:
        if value < least:
            raise InputError(f"{option} must be at least {least}, got {value}")
    if not 12 <= size_px * pixel_um <= 120:
        raise InputError(
            "the field of view, size_px times pixel_um, must be 12 to 120 µm, "
            f"got {size_px} x {pixel_um:g} = {size_px * pixel_um:g}"
        )
