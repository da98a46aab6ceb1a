"""Red cells and nucleated cells, painted as amounts of three stains on a micrometre grid."""

import math
from dataclasses import dataclass

import numpy as np

from slam_ags_example.smears.morphology import Kind, Range
from slam_ags_example.smears.texture import Array, smooth_noise

__all__ = ["AZURE", "EOSIN", "PURPLE", "Cell", "Field", "draw_kind", "paint_cell", "paint_red_cell"]

EOSIN, AZURE, PURPLE = range(3)


class Field:
    """A square field of view: amounts of stain, and the random textures that its cells share.

    Attributes:
        n: samples along a side.
        step_um: distance of two samples.
        side_um: length of a side.
        stain: [3, n, n], amounts of eosin, azure and purple.
    """

    def __init__(self, random: np.random.Generator, n: int, side_um: float) -> None:
        self.random = random
        self.n, self.side_um, self.step_um = n, side_um, side_um / n
        self.stain = np.zeros((3, n, n), np.float32)
        self.at_um = ((np.arange(n) + 0.5) * self.step_um).astype(np.float32)
        self.warp_x, self.warp_y = self._noise(5.5), self._noise(5.5)
        self.coarse = self._noise(random.uniform(0.7, 1.1))
        self.fine = self._noise(random.uniform(0.4, 0.6))

    def _noise(self, scale_um: float) -> Array:
        nodes = max(1, round(self.side_um / scale_um))
        return smooth_noise(self.random, self.n, nodes)

    def window(self, x: float, y: float, reach: float) -> tuple[slice, slice] | None:
        """Rows and columns within ``reach`` of a place, or None where that is outside."""
        slices = []
        for centre in (y, x):
            start = max(0, int((centre - reach) / self.step_um))
            stop = min(self.n, int((centre + reach) / self.step_um) + 2)
            if start >= stop:
                return None
            slices.append(slice(start, stop))
        return slices[0], slices[1]


@dataclass(frozen=True)
class Cell:
    """One nucleated cell of a field: its kind and its own values, lengths in micrometres."""

    kind: Kind
    x: float
    y: float
    radius: float
    nucleus_radius: float


def draw_kind(random: np.random.Generator, kinds: tuple[tuple[float, Kind], ...]) -> Kind:
    """One of several kinds, by their shares."""
    at = random.random() * sum(share for share, _ in kinds)
    for share, kind in kinds:
        at -= share
        if at < 0:
            return kind
    return kinds[-1][1]


def paint_red_cell(field: Field, x: float, y: float, radius: float) -> None:
    """Add a salmon disc with a pale centre; where two overlap, their stain adds up."""
    random = field.random
    window = field.window(x, y, 1.3 * radius)
    if window is None:
        return
    distance = _ellipse(field, window, x, y, radius, (0.87, 1.14), random.uniform(0.15, 0.6))
    inside = _inside(distance, 0.55)
    centre = np.maximum(distance + radius, 0) / (random.uniform(0.4, 0.65) * radius)
    pallor = random.uniform(0.3, 0.75) * np.exp(-(centre**2))
    amount = random.uniform(0.75, 1.15) * inside * (1 - pallor)
    field.stain[EOSIN][window] += amount
    # Young red cells keep some blue.
    field.stain[AZURE][window] += np.float32(random.uniform(0.0, 0.16)) * amount


def paint_cell(field: Field, cell: Cell) -> float:
    """Paint a nucleated cell over what is there, and return its visible area in square µm."""
    random, kind = field.random, cell.kind
    window = field.window(cell.x, cell.y, 1.25 * cell.radius + 0.8)
    if window is None:
        return 0.0
    coarse, fine = field.coarse[window], field.fine[window]
    body = _ellipse(
        field, window, cell.x, cell.y, cell.radius, (0.88, 1.13), random.uniform(*kind.ragged)
    )
    inside = _inside(body, 0.5)
    nucleus = _overlap(_nucleus(field, window, cell), body + 0.25)
    in_nucleus = _inside(nucleus, 0.45)

    blue = random.uniform(*kind.blue) * (1 + 0.1 * coarse + 0.06 * fine)
    blue *= 1 + 0.35 * np.exp(-((body / (0.12 * cell.radius)) ** 2))  # denser towards the edge
    outside_nucleus = inside * (1 - in_nucleus)
    pink = outside_nucleus * random.uniform(*kind.pink)
    if kind.halo[1]:
        halo = _halo(field, window, cell, nucleus)
        blue *= 1 - halo
        pink += 0.12 * halo * outside_nucleus

    stain = field.stain[:, window[0], window[1]]
    stain *= 1 - 0.96 * inside
    stain[AZURE] += blue * outside_nucleus
    stain[EOSIN] += pink
    if kind.granules[1]:
        granules = random.uniform(*kind.granules) * (0.5 + 0.35 * np.maximum(fine, 0))
        stain[PURPLE] += granules * outside_nucleus
    _paint_chromatin(field, window, cell, nucleus, in_nucleus)
    return float(inside.sum()) * field.step_um**2


def _halo(field: Field, window: tuple[slice, slice], cell: Cell, nucleus: Array) -> Array:
    """How far the blue fades beside the nucleus, more on one side than on the other."""
    random = field.random
    side = random.uniform(0, 2 * math.pi)
    cos, sin = math.cos(side) / cell.radius, math.sin(side) / cell.radius
    across = (field.at_um[window[1]] - np.float32(cell.x)) * np.float32(0.6 * cos)
    along = (field.at_um[window[0]] - np.float32(cell.y)) * np.float32(0.6 * sin)
    sided = np.minimum(np.maximum(0.55 + across[None, :] + along[:, None], 0), 1)
    near: Array = np.exp(-((np.maximum(nucleus, 0) / 0.55) ** 2)) * sided
    near *= np.float32(random.uniform(*cell.kind.halo))
    return near


def _paint_chromatin(
    field: Field, window: tuple[slice, slice], cell: Cell, nucleus: Array, in_nucleus: Array
) -> None:
    random, kind = field.random, cell.kind
    coarse, fine = field.coarse[window], field.fine[window]
    clumps = np.tanh(1.6 * (coarse + 0.25 * fine))
    amount = 1 + random.uniform(*kind.clumping) * clumps + random.uniform(*kind.grain) * fine
    amount += random.uniform(0.08, 0.25) * np.exp(-((nucleus / 0.5) ** 2))  # condensed at its edge
    amount *= random.uniform(*kind.chromatin)
    blue = np.zeros_like(amount)
    for _ in range(random.integers(kind.nucleoli[0], kind.nucleoli[1] + 1)):
        angle, out = random.uniform(0, 2 * math.pi), 0.72 * math.sqrt(random.random())
        x = cell.x + out * cell.nucleus_radius * math.cos(angle)
        y = cell.y + out * cell.nucleus_radius * math.sin(angle)
        radius = random.uniform(0.55, 1.3)
        around = field.window(x, y, radius + 1.2)
        if around is None:
            continue
        here = tuple(
            slice(part.start - whole.start, part.stop - whole.start)
            for part, whole in zip(around, window, strict=True)
        )
        distance = _ellipse(field, around, x, y, radius, (0.75, 1.3), 1.2)
        pale = _inside(distance, 0.6)
        amount[here] += 0.18 * np.exp(-((distance / 0.4) ** 2)) * (1 - pale)
        amount[here] *= 1 - random.uniform(0.35, 0.6) * pale
        blue[here] = np.maximum(blue[here], random.uniform(0.2, 0.5) * pale)
    field.stain[PURPLE][window] += np.maximum(amount, 0.15) * in_nucleus
    field.stain[AZURE][window] += blue * in_nucleus


def _nucleus(field: Field, window: tuple[slice, slice], cell: Cell) -> Array:
    """Distance to the edge of the nucleus, negative inside."""
    random, kind = field.random, cell.kind
    lobes = int(random.integers(kind.lobes[0], kind.lobes[1] + 1))
    play = max(cell.radius - cell.nucleus_radius - 0.3, 0) * math.sqrt(random.random())
    angle = random.uniform(0, 2 * math.pi)
    x, y = cell.x + play * math.cos(angle), cell.y + play * math.sin(angle)
    if lobes > 1:
        return _lobed(field, window, cell, lobes)
    distance = _ellipse(field, window, x, y, cell.nucleus_radius, (0.88, 1.14), 0.4)
    depth = random.uniform(*kind.indent) * cell.nucleus_radius
    if depth > 0.4:
        bite = 0.8 * cell.nucleus_radius
        out = cell.nucleus_radius - depth + bite
        angle = random.uniform(0, 2 * math.pi)
        x, y = x + out * math.cos(angle), y + out * math.sin(angle)
        dent = _ellipse(field, window, x, y, bite, (0.9, 1.1), 0.3)
        distance = _overlap(distance, -dent)
    return distance


def _lobed(field: Field, window: tuple[slice, slice], cell: Cell, lobes: int) -> Array:
    """Lobes on an arc, close enough to touch by a thread."""
    random = field.random
    radius = cell.nucleus_radius / math.sqrt(lobes) * 0.98
    arc, turn = random.uniform(0.45, 0.6) * cell.radius, random.uniform(0, 2 * math.pi)
    step = 2 * math.asin(min(1.0, 0.95 * radius / arc))
    distance: Array | None = None
    for lobe in range(lobes):
        angle = turn + lobe * step + random.uniform(-0.15, 0.15)
        x, y = cell.x + arc * math.cos(angle), cell.y + arc * math.sin(angle)
        size = radius * random.uniform(0.85, 1.15)
        one = _ellipse(field, window, x, y, size, (0.75, 1.3), 0.4)
        distance = one if distance is None else np.minimum(distance, one)
    assert distance is not None
    return distance


def _ellipse(
    field: Field,
    window: tuple[slice, slice],
    x: float,
    y: float,
    radius: float,
    aspect: Range,
    waviness_um: float,
) -> Array:
    """About the distance to the edge of a warped ellipse, negative inside."""
    random = field.random
    stretch, angle = math.sqrt(random.uniform(*aspect)), random.uniform(0, math.pi)
    cos, sin = math.cos(angle), math.sin(angle)
    warp = np.float32(waviness_um * min(1.0, radius / 6))
    dx = (field.at_um[window[1]] - np.float32(x))[None, :] + warp * field.warp_x[window]
    dy = (field.at_um[window[0]] - np.float32(y))[:, None] + warp * field.warp_y[window]
    across = np.float32(cos / stretch) * dx
    across += np.float32(sin / stretch) * dy
    dx *= np.float32(-sin * stretch)
    dy *= np.float32(cos * stretch)
    dx += dy
    across *= across
    dx *= dx
    across += dx
    distance: Array = np.sqrt(across, out=across)
    distance -= np.float32(radius)
    return distance


def _overlap(first: Array, second: Array) -> Array:
    """The distance to what two shapes share, its corners rounded."""
    gap = first - second
    both: Array = 0.5 * (first + second + np.sqrt(gap * gap + np.float32(0.25)))
    both -= np.float32(0.06)
    return both


def _inside(distance: Array, softness_um: float) -> Array:
    """1 inside, 0 outside, smooth over ``softness_um`` around the edge."""
    share: Array = distance * np.float32(-1 / softness_um)
    share += 0.5
    np.maximum(share, 0, out=share)
    return np.minimum(share, 1, out=share)
