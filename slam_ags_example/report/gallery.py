"""The galleries: the top-ranked cells of test bags as thumbnails, the truth beside each."""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from slam_ags_example.evaluate import DECISION_THRESHOLD
from slam_ags_example.report.folder import RankedCell, TestBag

__all__ = ["BagGallery", "Galleries", "draw_galleries"]

_CELLS_SHOWN = 24  # two rows on a wide screen; of a small bag half
_BAGS_SHOWN = 12  # of either label
_LARGEST_PX = 64  # a thumbnail's side
_SMALLEST_PX = 32  # an image of fewer pixels is a PNG: JPEG works on blocks of 8 to 16
_JPEG_QUALITY = 85


@dataclass(frozen=True)
class BagGallery:
    """The top-ranked cells of one bag, each with the data: URI of its thumbnail."""

    bag: TestBag
    cells: tuple[tuple[RankedCell, str], ...]

    @property
    def right(self) -> bool:
        """Whether the bag is called what it is."""
        return (self.bag.probability >= DECISION_THRESHOLD) == self.bag.positive

    @property
    def n_found(self) -> int:
        """Abnormal cells among those shown."""
        return sum(cell.abnormal for cell, _ in self.cells)

    @property
    def n_found_chance(self) -> float:
        """What a random ranking would show on average."""
        return self.bag.n_abnormal * len(self.cells) / len(self.bag.cells)


@dataclass(frozen=True)
class Galleries:
    """Galleries of either label.

    Attributes:
        positive: of positive bags.
        negative: of negative bags.
        n_left_out: test bags without a gallery.
        pixelated: the images are so small that their pixels are to be seen, not smoothed.
    """

    positive: tuple[BagGallery, ...]
    negative: tuple[BagGallery, ...]
    n_left_out: int
    pixelated: bool


def draw_galleries(
    bags: Sequence[TestBag], thumbnails: Callable[[Sequence[str]], Tensor]
) -> Galleries:
    """Draw the first bags of either label, in the order of test_bags.csv, which is no ranking.

    Args:
        bags: the test bags.
        thumbnails: from image references to uint8 [n, C, px, px], C = 1 or 3; called once.
    """
    shown = {
        label: [bag for bag in bags if bag.positive == label][:_BAGS_SHOWN]
        for label in (True, False)
    }
    both = shown[True] + shown[False]
    images = [cell.image for bag in both for cell in _top(bag)]
    pictures = thumbnails(images)
    uris = iter([_data_uri(picture) for picture in pictures])
    drawn = {
        label: tuple(
            BagGallery(bag, tuple((cell, next(uris)) for cell in _top(bag))) for bag in shown[label]
        )
        for label in (True, False)
    }
    return Galleries(
        drawn[True], drawn[False], len(bags) - len(both), pictures.shape[-1] < _SMALLEST_PX
    )


def _top(bag: TestBag) -> Sequence[RankedCell]:
    return bag.cells[: min(_CELLS_SHOWN, -(-len(bag.cells) // 2))]


def _data_uri(image: Tensor) -> str:
    """A data: URI of an image, uint8 [C, H, W], with one or three channels."""
    pixels = image.movedim(0, -1).squeeze(-1).contiguous().numpy()
    picture = Image.fromarray(pixels)
    picture.thumbnail((_LARGEST_PX, _LARGEST_PX), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if picture.mode == "L" or max(picture.size) < _SMALLEST_PX:
        kind = "png"
        picture.save(buffer, format="PNG", optimize=True)
    else:
        kind = "jpeg"
        picture.save(buffer, format="JPEG", quality=_JPEG_QUALITY, subsampling=0, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
