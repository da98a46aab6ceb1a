"""Synthetic marrow smears: labelled cells on a background of red cells and other marrow."""

from slam_ags_example.smears.generator import (
    PIXEL_UM,
    SIZE_PX,
    SMEAR_CLASSES,
    DrawnCells,
    draw_cells,
)

__all__ = ["PIXEL_UM", "SIZE_PX", "SMEAR_CLASSES", "DrawnCells", "draw_cells"]
