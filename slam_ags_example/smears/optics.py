"""From amounts of stain to the picture that a camera takes: colour, light, blur, noise, JPEG."""

import numpy as np
import numpy.typing as npt

from slam_ags_example.smears.paint import Field
from slam_ags_example.smears.texture import Array, pixel_noise, resampling_matrix, smooth_noise

__all__ = ["photograph"]

# Optical density of one unit of eosin, azure and purple in red, green and blue.
_DENSITY = np.array(
    [
        [0.08, 0.40, 0.28],
        [0.40, 0.31, 0.09],
        [0.92, 1.60, 0.37],
    ],
    dtype=np.float32,
)
_LIGHT = np.array([0.80, 0.815, 0.87], dtype=np.float32)
_BLURS_UM = np.linspace(0.06, 0.26, 8)


def photograph(field: Field, size_px: int) -> npt.NDArray[np.uint8]:
    """A picture [3, size_px, size_px] of a field, every setting of the camera drawn anew."""
    random, n = field.random, field.n
    density = _DENSITY * random.lognormal(0, 0.07, (3, 3)).astype(np.float32)
    density *= random.lognormal(0, (0.2, 0.2, 0.13))[:, None].astype(np.float32)
    optical = density.T @ field.stain.reshape(3, -1)
    picture = np.exp(-optical).reshape(3, n, n)
    exposure = random.normal(0, (0.03, 0.025, 0.02)) + random.normal(0, 0.035)
    light = 255 * _LIGHT * (1 + exposure).astype(np.float32)
    picture *= light[:, None, None] * _illumination(random, n)
    # Colour noise is drawn before resampling: cameras and JPEG leave it coarser than light noise.
    picture += np.float32(random.uniform(1.0, 3.5)) * pixel_noise(random, (3, n, n))
    weights = resampling_matrix(size_px, n, float(random.choice(_BLURS_UM)) / field.step_um)
    picture = picture.reshape(3 * n, n) @ weights.T
    picture = weights @ picture.reshape(3, n, size_px)
    grain = np.float32(random.uniform(0.5, 2.5)) * pixel_noise(random, (size_px, size_px))
    grain += 0.5  # so that cutting off the fraction rounds
    picture += grain
    levels: npt.NDArray[np.uint8] = np.clip(picture, 0, 255, out=picture).astype(np.uint8)
    return levels


def _illumination(random: np.random.Generator, n: int) -> Array:
    """Light over the field: a slope and a slow unevenness, mean near 1."""
    slope_x, slope_y = random.normal(0, 0.035, 2)
    place = np.linspace(-1, 1, n)
    uneven = 1 + slope_x * place[None, :] + slope_y * place[:, None]
    light: Array = uneven.astype(np.float32) + np.float32(0.012) * smooth_noise(random, n, 3)
    return light
