"""A folder with a subfolder for each class as a source."""

import functools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from slam_ags_example.config import InputError
from slam_ags_example.data.decode import UnreadableImageError, decode_square, image_fault
from slam_ags_example.data.source import PatchSource

__all__ = ["folder_source"]

_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_BLOCK = re.compile(r"\d{4,}-\d{4,}")  # a large class of the TCIA tree is split: PMO/0001-1000/


def folder_source(data: str) -> PatchSource:
    """List the images below a folder, at any depth.

    The class of an image is the folder it lies in directly below the root. The root is ``data``
    or, where all images lie in one folder of it that has folders itself, the first folder below
    that has images in more than one. A reference is the path from the root, with ``/``, so that
    it is the same for ``data`` and for a folder above it.

    Raises:
        InputError: no images, none in a subfolder, only the blocks of one class, or a folder that
            cannot be listed.
    """
    root = Path(os.path.abspath(data))
    files = list(_files(root))
    paths = [path for path in files if _is_image(path)]
    if not paths:
        raise InputError(
            f"--data {data} holds no images ({', '.join(_SUFFIXES)}): "
            "name a folder with a subfolder for each class"
        )
    above, references = _below_root(paths)
    classes = tuple(reference.partition("/")[0] for reference in references)
    if _are_blocks(set(classes)):
        raise InputError(
            f"--data {data} holds images but no subfolder for each class: name the folder above"
        )
    root = root / above
    return PatchSource(
        name=data,
        references=references,
        classes=classes,
        channels=3,
        sizes_px=range(1, 4097),
        reader=functools.partial(_read_files, root=root),
        stamp=functools.partial(_stamp, root=root),
        helpers="threads",  # Pillow decodes and resizes without the interpreter's lock
        fault=lambda reference: image_fault(root / reference),
        ignored=len(files) - len(references),
    )


def _is_image(path: str) -> bool:
    """By suffix; names with a dot in front are copies that operating systems leave behind."""
    return path.lower().endswith(_SUFFIXES) and not path.rpartition("/")[2].startswith(".")


def _files(root: Path) -> Iterator[str]:
    """Paths from ``root`` of all files, hidden folders left out; each folder is entered once.

    So a link into a folder above ends, and no image gets two references, where one could be in a
    training bag and the other in a test bag. Folders go before links to them.
    """
    entered: set[tuple[int, int]] = set()
    for folder, inner, names in os.walk(root, followlinks=True, onerror=_cannot_list):
        where = os.stat(folder)
        if (where.st_dev, where.st_ino) in entered:
            inner.clear()
            continue
        entered.add((where.st_dev, where.st_ino))
        inner[:] = sorted(
            (name for name in inner if not name.startswith(".")),
            key=lambda name: (os.path.islink(os.path.join(folder, name)), name),
        )
        start = Path(folder).relative_to(root)
        yield from ((start / name).as_posix() for name in names)


def _cannot_list(error: OSError) -> NoReturn:
    raise InputError(
        f"{error.filename} cannot be listed ({error.strerror}): make it readable, or move it away"
    ) from error


def _below_root(paths: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """The folder above the class folders, and the sorted paths from there on."""
    above, inside = "", [path for path in paths if "/" in path]
    while len(folders := _first_folders(inside)) == 1:
        deeper = [path.partition("/")[2] for path in inside]
        deeper = [path for path in deeper if "/" in path]
        if not deeper or _are_blocks(_first_folders(deeper)):
            break
        above, inside = f"{above}{folders.pop()}/", deeper
    return above, tuple(sorted(inside))


def _first_folders(paths: Sequence[str]) -> set[str]:
    return {path.partition("/")[0] for path in paths}


def _are_blocks(names: Iterable[str]) -> bool:
    return all(_BLOCK.fullmatch(name) for name in names)


def _read_files(references: Sequence[str], image_px: int, *, root: Path) -> Tensor:
    images = torch.empty((len(references), image_px, image_px, 3), dtype=torch.uint8)
    pixels = images.numpy()
    for row, reference in enumerate(references):
        pixels[row] = _read_file(root / reference, image_px)
    return images.permute(0, 3, 1, 2).contiguous()


def _read_file(path: Path, image_px: int) -> npt.NDArray[np.uint8]:
    try:
        return decode_square(path, image_px)
    except UnreadableImageError as error:
        raise _cannot_read(path, str(error)) from error


def _stamp(references: Sequence[str], *, root: Path) -> list[str]:
    """The folder, and size and time of change of each file."""
    stamp, path = [f"folder {root}, Pillow {version('pillow')}"], root
    try:
        for reference in references:
            path = root / reference
            file = os.stat(path)
            stamp.append(f"{file.st_size} {file.st_mtime_ns}")
    except OSError as error:
        raise _cannot_read(path, error.strerror or str(error)) from error
    return stamp


def _cannot_read(path: Path, reason: str) -> InputError:
    return InputError(
        f"{path} cannot be read ({reason}): put the file right, or make the bags again without it"
    )
