"""Decoded images on disk: one .npy file for each set of images, never pickled."""

import hashlib
import os
import shutil
import uuid
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from slam_ags_example.config import InputError
from slam_ags_example.data.source import PatchSource

__all__ = ["cache_key", "load", "prepare", "store"]

_FORMAT = "slam-ags images, version 1"


def cache_key(source: PatchSource, references: Sequence[str], image_px: int) -> str:
    """A name for everything that decides the pixels, 32 hexadecimal digits.

    Raises:
        InputError: a file is no longer there.
    """
    digest = hashlib.sha256()
    for text in (_FORMAT, str(image_px), *references, *source.stamp(references)):
        digest.update(text.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()[:32]


def load(cache: Path, key: str, shape: tuple[int, ...]) -> Tensor | None:
    """What :func:`store` kept under this key, mapped into memory; None where it is not whole.

    The checksum in the file's name is compared with the content, so every byte is read once.
    """
    for path in sorted(cache.glob(f"{key}-*.npy")):
        try:
            # Copy on write: torch wants memory that may be written, the file stays as it is.
            pixels = np.lib.format.open_memmap(path, mode="c")
        except Exception:  # whatever a damaged header makes numpy raise
            continue
        whole = pixels.dtype == np.uint8 and pixels.shape == shape and pixels.flags.c_contiguous
        if whole and path.name == _file_name(key, torch.from_numpy(pixels)):
            return torch.from_numpy(pixels)
    return None


def prepare(cache: Path, n_bytes: int) -> None:
    """Make the folder, before hours are spent on what it could not take.

    Raises:
        InputError: it cannot be written, or has less than ``n_bytes`` left.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(cache).free
    except OSError as error:
        raise _cannot_write(cache, error.strerror or str(error)) from error
    if not os.access(cache, os.W_OK | os.X_OK):
        raise _cannot_write(cache, "no permission")
    if free_bytes < n_bytes:
        raise _cannot_write(
            cache, f"needs {n_bytes / 2**20:.0f} MiB, {free_bytes / 2**20:.0f} MiB are free"
        )


def store(cache: Path, key: str, pixels: Tensor) -> None:
    """Keep ``pixels``: written beside its place and renamed, so it is there whole or not at all.

    Processes that store the same images at once write files of their own; the last rename stays.

    Raises:
        InputError: the folder cannot take it.
    """
    beside = cache / f"{key}.{uuid.uuid4().hex}.partial"
    try:
        with beside.open("xb") as file:
            np.lib.format.write_array(file, pixels.numpy(), allow_pickle=False)
        os.replace(beside, cache / _file_name(key, pixels))
    except OSError as error:
        raise _cannot_write(cache, error.strerror or str(error)) from error
    finally:
        beside.unlink(missing_ok=True)


def _file_name(key: str, pixels: Tensor) -> str:
    return f"{key}-{zlib.crc32(pixels.reshape(-1).numpy().data):08x}.npy"


def _cannot_write(cache: Path, reason: str) -> InputError:
    return InputError(f"--cache {cache} cannot be written ({reason}): name another folder")
