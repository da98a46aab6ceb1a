"""From an image file to an upright square of red, green and blue."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

__all__ = ["UnreadableImageError", "decode_square", "image_fault"]


class UnreadableImageError(ValueError):
    """An image cannot be decoded; the message is the reason, one line."""


def decode_square(path: Path, image_px: int) -> npt.NDArray[np.uint8]:
    """Decode a file, bring its shorter side to ``image_px`` (bicubic), and cut out the centre.

    Returns:
        [image_px, image_px, 3], uint8. An image of that size already keeps its exact values.

    Raises:
        UnreadableImageError: it is not an image, is damaged, or has a depth of 32 bits.
    """
    side = (image_px, image_px)
    return np.asarray(ImageOps.fit(_decode(path), side, Image.Resampling.BICUBIC))


def image_fault(path: Path) -> str | None:
    """Decode a file in full: why that is not possible, or None.

    A file cut short is found. Bytes changed inside a JPG may decode to other pixels: not found.
    """
    try:
        _decode(path)
    except UnreadableImageError as error:
        return str(error)
    return None


def _decode(path: Path) -> Image.Image:
    try:
        with Image.open(path) as file:
            file.load()
            return _to_rgb(ImageOps.exif_transpose(file))
    except OSError as error:
        raise UnreadableImageError(error.strerror or _one_line(error)) from error
    # Pillow's readers raise nearly anything on damaged bytes: SyntaxError, EOFError, struct.error.
    except Exception as error:
        raise UnreadableImageError(_one_line(error)) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        # The high byte, as Pillow itself takes of 16-bit colour; convert() would clip instead.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise UnreadableImageError("32 bits a pixel: save it with 8 or 16")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")  # the bare glass of a slide
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
