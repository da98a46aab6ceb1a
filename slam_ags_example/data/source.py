"""What a source of patches is, whatever its images are made of."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from slam_ags_example.config import InputError

__all__ = ["PatchSource", "Reader"]

Reader = Callable[[Sequence[str], int], Tensor]


@dataclass(frozen=True, kw_only=True)
class PatchSource:
    """Images that can be had, by reference; nothing is decoded or drawn before :meth:`read`.

    Attributes:
        name: the ``--data`` that opened it.
        references: what a manifest calls each image, N different strings, sorted.
        classes: the class of each image, N names.
        channels: 3 (red, green and blue) or 1.
        sizes_px: the values that ``image_px`` may have.
        reader: references and image_px to uint8 [n, C, px, px], in the calling thread. It can be
            pickled without the source, so that other processes are sent little.
        stamp: what beside references and image_px decides the pixels of these references.
        helpers: what makes reading many images faster.
        fault: why an image cannot be read, None where it can; None for sources without files.
        ignored: files of the folder that are no images of a class.
    """

    name: str
    references: Sequence[str]
    classes: Sequence[str]
    channels: int
    sizes_px: range
    reader: Reader
    stamp: Callable[[Sequence[str]], Iterable[str]]
    helpers: Literal["none", "threads", "processes"] = "none"
    fault: Callable[[str], str | None] | None = None
    ignored: int = 0

    def check_size(self, image_px: int) -> None:
        """Refuse a side that images of this source cannot have.

        Raises:
            InputError: ``image_px`` is not in ``sizes_px``.
        """
        if image_px not in self.sizes_px:
            least, most = self.sizes_px[0], self.sizes_px[-1]
            allowed = f"{least}" if least == most else f"{least} to {most}"
            raise InputError(f"--image-px must be {allowed} for {self.name}, got {image_px}")

    def read(self, references: Sequence[str], image_px: int) -> Tensor:
        """The images of these references, in their order, in the calling thread.

        Args:
            references: n of ``self.references``.
            image_px: side of an image in pixels.

        Returns:
            [n, C, image_px, image_px], uint8.

        Raises:
            InputError: the size is not possible, or an image cannot be read; names the file.
        """
        self.check_size(image_px)
        return self.reader(references, image_px)
