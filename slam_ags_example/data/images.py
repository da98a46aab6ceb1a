"""The images of a manifest: decoded once where memory allows it, otherwise read on demand."""

import functools
import math
import os
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from slam_ags_example.config import InputError
from slam_ags_example.data import cache as disk
from slam_ags_example.data.helper import Submit
from slam_ags_example.data.parallel import processes, spread, threads
from slam_ags_example.data.source import PatchSource, Reader

__all__ = ["ImageSet", "open_images"]

# A helper has started after 2.3 s (it imports torch); by then one core has drawn 1000 patches of
# 64 px.
_PROCESSES_PAY = 1500
_UNKNOWN_MEMORY_BYTES = 4 * 2**30
_CONTROL_GROUPS = [  # limit, use and its parts, of version 2 and of version 1
    ("memory.max", "memory.current", "memory.stat"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
    ),
]


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Images by row.

    Attributes:
        references: what a manifest calls each image, N strings.
        channels: C, 3 or 1.
        image_px: side of an image in pixels.
        reader: the source's, for images that are not held.
        pixels: [N, C, px, px], uint8; None where they are read on demand.
    """

    references: Sequence[str]
    channels: int
    image_px: int
    reader: Reader
    pixels: Tensor | None

    def __len__(self) -> int:
        """N."""
        return len(self.references)

    @property
    def cached(self) -> bool:
        """Whether all images are held, decoded."""
        return self.pixels is not None

    def rows(self, references: Sequence[str]) -> Tensor:
        """The row of each reference, [len(references)], int64.

        Raises:
            InputError: a reference is not in this set.
        """
        _require(references, self._row_of)
        return torch.tensor([self._row_of[name] for name in references], dtype=torch.int64)

    def read(self, rows: Tensor | Sequence[int]) -> Tensor:
        """The images of these rows, in their order: a copy, [len(rows), C, px, px], uint8.

        Raises:
            InputError: a file can no longer be read; names it.
        """
        rows = torch.as_tensor(rows, dtype=torch.int64)
        if self.pixels is not None:
            return self.pixels.index_select(0, rows)
        return self.reader([self.references[row] for row in rows.tolist()], self.image_px)

    @functools.cached_property
    def _row_of(self) -> dict[str, int]:
        return {reference: row for row, reference in enumerate(self.references)}


def open_images(
    source: PatchSource,
    references: Sequence[str],
    *,
    image_px: int,
    memory_bytes: int | None = None,
    cache: Path | None = None,
    sharers: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> ImageSet:
    """Open images, decoding all of them now where they fit into memory.

    Args:
        source: where they come from.
        references: N different references of the source.
        image_px: side of an image in pixels.
        memory_bytes: what decoded images may take, N·C·image_px² bytes; None allows half of what
            is available. Images that need more are read on demand, and not cached.
        cache: a folder that keeps decoded images for the next time, one file for each list of
            references and size; None keeps none. The file of an earlier time is mapped into memory.
        sharers: processes on this machine that open images; what is available is for all of them.
        on_progress: called with how many images are decoded and how many there are.

    Raises:
        InputError: a reference is not in the source, the size is not possible, an image cannot be
            read, or the cache cannot be written.
    """
    source.check_size(image_px)
    _require(references, frozenset(source.references))
    shape = (len(references), source.channels, image_px, image_px)
    n_bytes = len(references) * source.channels * image_px**2
    pixels, key = None, ""
    allowed = _available_bytes() / (2 * sharers) if memory_bytes is None else memory_bytes
    if n_bytes <= allowed:
        if cache is not None:
            key = disk.cache_key(source, references, image_px)
            pixels = disk.load(cache, key, shape)
        if pixels is None:
            if cache is not None:
                disk.prepare(cache, n_bytes)
            pixels = _read_all(source, references, shape, on_progress)
            if cache is not None:
                disk.store(cache, key, pixels)
    return ImageSet(
        references=tuple(references),
        channels=source.channels,
        image_px=image_px,
        reader=source.reader,
        pixels=pixels,
    )


def _require(references: Sequence[str], known: dict[str, int] | frozenset[str]) -> None:
    missing = [reference for reference in references if reference not in known]
    if missing:
        raise InputError(
            f"{len(missing)} images of the manifest are not in the data, first {missing[0]!r}: "
            "pass the --data that the manifest was made from"
        )


def _read_all(
    source: PatchSource,
    references: Sequence[str],
    shape: tuple[int, ...],
    on_progress: Callable[[int, int], None] | None,
) -> Tensor:
    pixels = torch.empty(shape, dtype=torch.uint8)
    work = functools.partial(_read_part, reader=source.reader, image_px=shape[-1])
    helpers: AbstractContextManager[Submit | None] = nullcontext()
    if source.helpers == "threads":
        helpers = threads()
    elif source.helpers == "processes" and len(references) >= _PROCESSES_PAY:
        helpers = processes()
    with helpers as submit:
        for place, images in spread(work, references, submit, on_progress):
            pixels[place] = images
    return pixels


def _read_part(references: Sequence[str], *, reader: Reader, image_px: int) -> Tensor:
    return reader(references, image_px)


def _available_bytes() -> float:
    """Memory that can be had without swapping: the machine's, or the container's where less."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        available = int(found[1]) * 1024 if found else _UNKNOWN_MEMORY_BYTES
    except OSError:  # not Linux
        try:
            available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
        except (AttributeError, ValueError, OSError):
            available = _UNKNOWN_MEMORY_BYTES
    return max(0, min(available, *(_free_in_group(*group) for group in _CONTROL_GROUPS)))


def _free_in_group(limit: str, used: str, stat: str) -> float:
    group = Path("/sys/fs/cgroup")
    try:
        cached = re.search(
            r"^(?:total_)?inactive_file (\d+)", (group / stat).read_text(), re.MULTILINE
        )
        reclaimable = int(cached[1]) if cached else 0
        return int((group / limit).read_text()) - int((group / used).read_text()) + reclaimable
    except (OSError, ValueError):  # no such control group, or "max": no limit
        return math.inf
