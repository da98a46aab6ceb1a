"""Random views of patches, drawn for a whole batch at once on the batch's device."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["DigitViews"]


@dataclass(frozen=True)
class DigitViews:
    """Views of handwritten digits that leave the digit what it is.

    Each image gets its own rotation, scale, shear and shift in one bilinear resampling, then its
    own contrast and independent noise per pixel. No flips: a mirrored digit is another sign.

    Attributes:
        rotation_deg: the angle is uniform in ± this.
        scale: the relative size is uniform in 1 ± this.
        shear: the horizontal shear is uniform in ± this, pixels per pixel.
        shift_px: each shift is uniform in ± this.
        contrast: the factor on the ink is uniform in 1 ± this.
        noise_std: standard deviation of the noise, in units of full ink.
    """

    rotation_deg: float = 10.0
    scale: float = 0.1
    shear: float = 0.1
    shift_px: float = 0.25
    contrast: float = 0.2
    noise_std: float = 0.15

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """One view of each image.

        Args:
            images: [N, C, H, W] in [0, 1], with 0 the background.
            generator: on the device of ``images``.

        Returns:
            [N, C, H, W], in [0, 1].
        """
        n, _, height, width = images.shape

        def uniform(*shape: int) -> Tensor:
            draw = torch.rand(shape, generator=generator, device=images.device, dtype=images.dtype)
            return 2 * draw - 1

        angle_rad = math.radians(self.rotation_deg) * uniform(n)
        zoom = 1 / (1 + self.scale * uniform(n))
        shear = self.shear * uniform(n)
        cos, sin = zoom * angle_rad.cos(), zoom * angle_rad.sin()
        # affine_grid counts in half-widths: one pixel is 2/width.
        shift_x = self.shift_px * 2 / width * uniform(n)
        shift_y = self.shift_px * 2 / height * uniform(n)
        rows = [cos, shear * cos - sin, shift_x, sin, shear * sin + cos, shift_y]
        affine = torch.stack(rows, dim=1).view(n, 2, 3)
        grid = functional.affine_grid(affine, list(images.shape), align_corners=False)
        views = functional.grid_sample(images, grid, padding_mode="zeros", align_corners=False)
        views = views * (1 + self.contrast * uniform(n, 1, 1, 1))
        noise = torch.randn(
            images.shape, generator=generator, device=images.device, dtype=images.dtype
        )
        return (views + self.noise_std * noise).clamp(0, 1)
