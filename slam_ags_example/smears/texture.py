"""Smooth random fields and separable resampling: the two tools that everything is drawn with."""

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt

__all__ = ["Array", "pixel_noise", "resampling_matrix", "smooth_noise"]

Array = npt.NDArray[np.float32]

# Mean over the position between two nodes of the sum of squared cubic B-spline weights, 151/315:
# what interpolation leaves of unit variance along one axis.
_SPLINE_VARIANCE = 151 / 315


def smooth_noise(random: np.random.Generator, n: int, nodes: int) -> Array:
    """A random field [n, n] with mean 0 and variance near 1, smooth over a distance n / nodes.

    White noise on a square of ``nodes`` nodes, interpolated by cubic B-splines.
    """
    weights = _spline_matrix(n, nodes)
    white = random.standard_normal((nodes + 3, nodes + 3), dtype=np.float32)
    field: Array = weights @ white @ weights.T
    return field


def pixel_noise(random: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Noise [..., n, n] with mean 0 and variance 1, independent from sample to sample.

    A window of a fixed sheet of noise at a random place: drawing as many numbers anew would take
    a fifth of the time of a patch.
    """
    size = max(1024, 2 * shape[-1])
    sheet = _noise_sheet(size)
    windows = np.empty(shape, np.float32)
    for index in np.ndindex(shape[:-2]):
        row, column = random.integers(0, size - shape[-1], 2)
        windows[index] = sheet[row : row + shape[-2], column : column + shape[-1]]
    return windows


@lru_cache(maxsize=2)
def _noise_sheet(size: int) -> Array:
    return np.random.Generator(np.random.SFC64(0)).standard_normal((size, size), dtype=np.float32)


@lru_cache(maxsize=256)
def _spline_matrix(n: int, nodes: int) -> Array:
    """Weights [n, nodes + 3] of the nodes at n places, scaled to keep the variance of noise."""
    place = (np.arange(n) + 0.5) * nodes / n
    first = np.floor(place).astype(np.int64)
    t = place - first
    weights = np.zeros((n, nodes + 3))
    pieces = [(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]
    for offset, piece in enumerate(pieces):
        weights[np.arange(n), first + offset] = piece / 6
    return (weights / math.sqrt(_SPLINE_VARIANCE)).astype(np.float32)


@lru_cache(maxsize=64)
def resampling_matrix(n_out: int, n_in: int, blur: float) -> Array:
    """Weights [n_out, n_in] that blur and resample one axis in a single product.

    Args:
        n_out: samples of the result, spread evenly over the same length.
        n_in: samples of the source.
        blur: standard deviation of the Gaussian, in samples of the source. Where the result is
            coarser, the area of one of its samples is averaged too.
    """
    ratio = n_in / n_out
    centre = (np.arange(n_out) + 0.5) * ratio
    edges = np.arange(n_in + 1)
    # A box of the result's width blurred by the Gaussian has nearly the Gaussian's shape again.
    sigma = math.hypot(blur, ratio / math.sqrt(12), 0.35)
    scaled = (edges[None, :] - centre[:, None]) / (sigma * math.sqrt(2))
    cumulative = np.vectorize(math.erf)(scaled)
    weights = np.diff(cumulative, axis=1)
    normed: Array = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return normed
