"""One patch: the labelled cell in the middle, its neighbours, red cells and plasma around it."""

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from slam_ags_example.smears.morphology import BYSTANDERS, CLASSES, Kind
from slam_ags_example.smears.optics import photograph
from slam_ags_example.smears.paint import (
    AZURE,
    EOSIN,
    Cell,
    Field,
    draw_kind,
    paint_cell,
    paint_red_cell,
)
from slam_ags_example.smears.texture import smooth_noise

__all__ = ["Patch", "draw_patch"]

_STEP_UM = 0.3  # about what a 40x oil objective resolves; finer sampling would draw blur
_TRIES = 10


@dataclass(frozen=True)
class Patch:
    """A drawn patch [3, size, size] and the area of its labelled cell in square µm."""

    picture: npt.NDArray[np.uint8]
    area_um2: float


def draw_patch(name: str, random: np.random.Generator, size_px: int, pixel_um: float) -> Patch:
    """Draw one patch of a class."""
    side_um = size_px * pixel_um
    field = Field(random, max(16, round(side_um / _STEP_UM)), side_um)
    spread = random.lognormal(0, 0.09)  # cells lie flatter and wider where the smear is thin
    middle = side_um / 2
    kind = draw_kind(random, CLASSES[name])
    cell = _draw_cell(
        random, kind, middle + random.normal(0, 0.5), middle + random.normal(0, 0.5), spread
    )
    cells = [cell, *_place_neighbours(random, cell, side_um, spread)]
    _paint_plasma(field)
    _paint_red_cells(field, cells, spread)
    for neighbour in reversed(cells[1:]):
        paint_cell(field, neighbour)
    area_um2 = paint_cell(field, cell)
    return Patch(photograph(field, size_px), area_um2)


def _draw_cell(random: np.random.Generator, kind: Kind, x: float, y: float, spread: float) -> Cell:
    low, high = kind.diameter_um
    diameter = spread * (low + (high - low) * random.beta(*kind.skew))
    ratio = random.uniform(*kind.nc_ratio)
    return Cell(kind, x, y, diameter / 2, diameter / 2 * math.sqrt(ratio / (ratio + 1)))


def _place_neighbours(
    random: np.random.Generator, cell: Cell, side_um: float, spread: float
) -> list[Cell]:
    """Other nucleated cells where there is room, many of them cut by the border."""
    placed: list[Cell] = [cell]
    crowd = random.gamma(3.0, 1 / 3.0)
    wanted = random.poisson(6.0 * crowd * (side_um / 30) ** 2)
    for _ in range(wanted):
        one = _draw_cell(random, draw_kind(random, BYSTANDERS), 0, 0, spread)
        for x, y in random.uniform(-5, side_um + 5, (_TRIES, 2)).tolist():
            if all(
                math.hypot(x - other.x, y - other.y) > 0.93 * (one.radius + other.radius)
                for other in placed
            ):
                placed.append(replace(one, x=x, y=y))
                break
    return placed[1:]


def _paint_plasma(field: Field) -> None:
    """Dried plasma: a faint uneven wash of both stains."""
    random = field.random
    wash = 1 + 0.25 * smooth_noise(random, field.n, 4) + 0.06 * field.fine
    field.stain[EOSIN] += np.float32(random.uniform(0.02, 0.14)) * wash
    field.stain[AZURE] += np.float32(random.uniform(0.03, 0.2)) * wash


def _paint_red_cells(field: Field, cells: list[Cell], spread: float) -> None:
    """Red cells, pushed aside by nucleated ones, touching and partly overlapping each other."""
    random, side = field.random, field.side_um
    wanted = random.poisson(random.uniform(3, 16) * (side / 30) ** 2)
    # Places and how near to them none may come; 0 stands for another red cell.
    taken = [(cell.x, cell.y, cell.radius + 2.7 * spread) for cell in cells]
    for _ in range(wanted):
        radius = spread * random.uniform(3.5, 4.0)
        apart = 1.35 * radius if random.random() < 0.25 else 1.9 * radius
        for x, y in random.uniform(-3, side + 3, (_TRIES, 2)).tolist():
            for u, v, reach in taken:
                if (x - u) ** 2 + (y - v) ** 2 < (reach or apart) ** 2:
                    break
            else:
                taken.append((x, y, 0.0))
                paint_red_cell(field, x, y, radius)
                break
