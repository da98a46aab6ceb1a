"""Random views of patches: drawn on the CPU from a key, applied to a whole batch on its device."""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from slam_ags_example.config import generator

__all__ = ["MARROW_MEAN", "MARROW_STD", "DigitViews", "SmearViews", "Views"]

# Red, green, blue of Bone Marrow Cytomorphology (DOI 10.7937/TCIA.AXH3-T579), in [0, 1].
MARROW_MEAN = (0.6009, 0.5513, 0.7394)
MARROW_STD = (0.1982, 0.2448, 0.1076)
_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow and torchvision weigh the channels


class Views(Protocol):
    """What turns stored patches into what the encoder sees.

    Every draw comes from a generator on the CPU whose seed is the key, so a view depends on its key
    alone: not on the device, not on which views were drawn before. That is what lets an interrupted
    run go on to the same bits, and gives all methods the same views.

    Attributes:
        centre_is_a_view: whether ``centre`` may stand for one of the two views of a patch.
    """

    centre_is_a_view: ClassVar[bool]

    def random(
        self, images: Tensor, seed: int, key: str, *, first: int = 0, n: int | None = None
    ) -> Tensor:
        """One random view of each image: uint8 [N, C, H, W] to float32 [N, C, h, w].

        With ``n`` they are the views that these images get as rows ``first`` to ``first`` + N of
        ``n`` images with this key.
        """
        ...

    def centre(self, images: Tensor) -> Tensor:
        """The view without chance, of the same shape: for embedding, and for negative patches."""
        ...


@dataclass(frozen=True)
class SmearViews:
    """Views of stained cells, as SLAM-AGS draws them.

    A random crop of 224 parts of 250, a horizontal flip with probability 1/2, colour jitter with
    probability 0.8 and a turn by 90°, 180° or 270° with probability 0.8; then each channel is
    normalised. Each image has its own draw of everything, unlike the batch transforms of
    torchvision, which draw once for a batch and from the global stream; the colour operations are
    theirs, tested against them. Deviation: the jitter's four operations keep one order.

    Attributes:
        crop_share: side of the crop over side of the patch.
        jitter: brightness, contrast and saturation are scaled by factors uniform in 1 ± this, and
            the hue is shifted by a share of the circle uniform in ± this.
        p_jitter: probability of the jitter.
        p_flip: probability of the flip.
        p_turn: probability of the turn.
        mean: of each channel, for the normalisation.
        std: of each channel, for the normalisation.

    Source: arXiv 2511.14639 and its authors' script.
    """

    centre_is_a_view: ClassVar[bool] = True

    crop_share: float = 224 / 250
    jitter: float = 0.1
    p_jitter: float = 0.8
    p_flip: float = 0.5
    p_turn: float = 0.8
    mean: tuple[float, ...] = field(default=MARROW_MEAN)
    std: tuple[float, ...] = field(default=MARROW_STD)

    def crop_px(self, image_px: int) -> int:
        """Side of the crop of a patch of this side."""
        return max(1, round(self.crop_share * image_px))

    def random(
        self, images: Tensor, seed: int, key: str, *, first: int = 0, n: int | None = None
    ) -> Tensor:
        """One random view of each image; see :class:`Views`."""
        random, n = generator(seed, key), len(images) if n is None else n
        own = slice(first, first + len(images))
        crops = self._crop(images, random, n, own).float() / 255
        on = torch.rand(n, generator=random) < self.p_jitter
        draws = (2 * torch.rand(4, n, generator=random) - 1) * self.jitter * on
        brightness, contrast, saturation, hue = draws[:, own].to(images.device)
        views = _jitter(crops, 1 + brightness, 1 + contrast, 1 + saturation, hue)
        return self._normalise(views)

    def centre(self, images: Tensor) -> Tensor:
        """The crop in the middle; see :class:`Views`."""
        side = self.crop_px(images.shape[-1])
        top, left = ((size - side) // 2 for size in images.shape[-2:])
        crops = images[:, :, top : top + side, left : left + side]
        return self._normalise(crops.float() / 255)

    def _crop(self, images: Tensor, random: torch.Generator, n: int, own: slice) -> Tensor:
        """Crop, flip and turn by looking up each pixel of the result, [N, C, side, side]."""
        height, width = images.shape[-2:]
        side = self.crop_px(height)
        top = torch.randint(height - side + 1, (n, 1, 1), generator=random)[own]
        left = torch.randint(width - side + 1, (n, 1, 1), generator=random)[own]
        flip = torch.rand((n, 1, 1), generator=random)[own] < self.p_flip
        turned = torch.rand((n, 1, 1), generator=random)[own] < self.p_turn
        turns = torch.randint(1, 4, (n, 1, 1), generator=random)[own] * turned
        row, column = torch.arange(side).view(1, side, 1), torch.arange(side).view(1, 1, side)
        last = side - 1
        row, column = _turn(row, column, last, turns)
        column = torch.where(flip, last - column, column)
        place = ((top + row) * width + left + column).to(images.device)
        place = place.flatten(1).unsqueeze(1).expand(-1, images.shape[1], -1)
        return images.flatten(2).gather(2, place).view(*images.shape[:2], side, side)

    def _normalise(self, views: Tensor) -> Tensor:
        mean = torch.tensor(self.mean, device=views.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=views.device).view(-1, 1, 1)
        return (views - mean) / std


def _turn(row: Tensor, column: Tensor, last: int, turns: Tensor) -> tuple[Tensor, Tensor]:
    """Source row and column of each pixel after ``turns`` quarter turns counterclockwise."""
    rows = (row.expand(-1, -1, last + 1), column, last - row, last - column)
    columns = (column, last - row, last - column, row)
    return _choose(turns, rows), _choose(turns, columns)


def _choose(turns: Tensor, options: tuple[Tensor, ...]) -> Tensor:
    chosen = options[0]
    for number, option in enumerate(options):
        chosen = torch.where(turns == number, option, chosen)
    return chosen


def _jitter(
    images: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor, hue: Tensor
) -> Tensor:
    """Colour jitter of RGB images [N, 3, H, W] in [0, 1] by factors and shifts [N]."""

    def blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
        return torch.lerp(other, images, factor.view(-1, 1, 1, 1)).clamp(0, 1)

    images = (images * brightness.view(-1, 1, 1, 1)).clamp(0, 1)
    images = blend(images, _grey(images).mean(dim=(1, 2, 3), keepdim=True), contrast)
    images = blend(images, _grey(images), saturation)
    return _shift_hue(images, hue)


def _grey(images: Tensor) -> Tensor:
    weights = torch.tensor(_GREY, device=images.device, dtype=images.dtype)
    return torch.einsum("nchw,c->nhw", images, weights).unsqueeze(1)


def _shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by a share of the circle, [N]; HSV's saturation and value stay.

    From HSV, channel k of (red 5, green 3, blue 1) is v - c · clamp(min(q, 4 - q), 0, 1) with
    q = (k + 6 hue) mod 6 and c the chroma.
    """
    value, highest = images.max(dim=1)
    chroma = value - images.amin(dim=1)
    red, green, blue = images.unbind(1)
    safe = torch.where(chroma > 0, chroma, 1)
    sector = torch.stack([(green - blue) / safe, 2 + (blue - red) / safe, 4 + (red - green) / safe])
    hue6 = sector.gather(0, highest.unsqueeze(0))[0] + 6 * shift.view(-1, 1, 1)
    offsets = torch.tensor([5.0, 3.0, 1.0], device=images.device, dtype=images.dtype)
    q = (offsets.view(3, 1, 1) + hue6.unsqueeze(1)) % 6
    return value.unsqueeze(1) - chroma.unsqueeze(1) * torch.minimum(q, 4 - q).clamp(0, 1)


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

    centre_is_a_view: ClassVar[bool] = False

    rotation_deg: float = 10.0
    scale: float = 0.1
    shear: float = 0.1
    shift_px: float = 0.25
    contrast: float = 0.2
    noise_std: float = 0.15

    def random(
        self, images: Tensor, seed: int, key: str, *, first: int = 0, n: int | None = None
    ) -> Tensor:
        """One random view of each image, in [0, 1]; see :class:`Views`."""
        if not len(images):  # affine_grid takes none
            return self.centre(images)
        random, n = generator(seed, key), len(images) if n is None else n
        own, (height, width) = slice(first, first + len(images)), images.shape[-2:]
        draws = (2 * torch.rand((6, n), generator=random) - 1)[:, own].to(images.device)
        noise = torch.randn((n, *images.shape[1:]), generator=random)[own].to(images.device)
        angle, zoom, shear, shift_x, shift_y, contrast = draws
        zoom = 1 / (1 + self.scale * zoom)
        angle_rad, shear = math.radians(self.rotation_deg) * angle, self.shear * shear
        cos, sin = zoom * angle_rad.cos(), zoom * angle_rad.sin()
        # affine_grid counts in half-widths: one pixel is 2/width.
        shift_x, shift_y = self.shift_px * 2 / width * shift_x, self.shift_px * 2 / height * shift_y
        rows = [cos, shear * cos - sin, shift_x, sin, shear * sin + cos, shift_y]
        affine = torch.stack(rows, dim=1).view(-1, 2, 3)
        grid = functional.affine_grid(affine, list(images.shape), align_corners=False)
        views = functional.grid_sample(
            self.centre(images), grid, padding_mode="zeros", align_corners=False
        )
        views = views * (1 + self.contrast * contrast.view(-1, 1, 1, 1))
        noisy: Tensor = views + self.noise_std * noise
        return noisy.clamp(0, 1)

    def centre(self, images: Tensor) -> Tensor:
        """The digit as it is, in [0, 1]; see :class:`Views`."""
        return images.float() / 255
