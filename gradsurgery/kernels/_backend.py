"""Which code runs where: Triton on CUDA, compiled C on the CPU, plain torch ops wherever else."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from gradsurgery._warn import warn_user
from gradsurgery.kernels import native

__all__ = ["BACKENDS", "choose", "on_triton", "with_fallback"]

BACKENDS = ("auto", "torch", "triton", "native", "reference")
_MOST_ROWS = 64
_Result = TypeVar("_Result")
# Why Triton is not used although the tensors are on CUDA; said once.
_refused: str | None = None


def choose(rows: Tensor, backend: str) -> str:
    """The backend for these rows: what was asked for, or for "auto" the fastest that is there.

    Raises:
        RuntimeError: a backend was asked for by name and cannot run here.
        ValueError: a backend was asked for by name and does not take these rows.
    """
    if backend == "auto":
        if on_triton(rows.device, rows.shape[0]):
            return "triton"
        return "native" if native.takes(rows) and native.available() else "torch"
    if backend == "triton":
        if not _runs_triton(rows.device):
            raise RuntimeError(f'backend="triton" needs tensors on CUDA; got {rows.device}')
        if _import_error() is not None:
            raise RuntimeError(f'backend="triton" needs the package triton: {_import_error()}')
        if rows.shape[0] > _MOST_ROWS:
            raise ValueError(f'backend="triton" takes up to 64 rows; got {rows.shape[0]}')
    if backend == "native":
        if not native.takes(rows):
            raise ValueError(
                'backend="native" takes up to 64 rows of float32 on the CPU without gaps; got '
                f"{rows.dtype} {list(rows.shape)} with strides {rows.stride()} on {rows.device}"
            )
        if not native.available():
            raise RuntimeError(
                'backend="native" was not built: install gradsurgery where a C compiler with '
                "OpenMP is at hand"
            )
    return backend


def on_triton(device: torch.device, count: int) -> bool:
    """Whether "auto" runs Triton kernels there for T tasks; says so once where it cannot."""
    if count > _MOST_ROWS or not _runs_triton(device) or _refused is not None:
        return False
    error = _import_error()
    if error is not None:
        _refuse(error)
        return False
    return True


def with_fallback(fast: Callable[[], _Result], plain: Callable[[], _Result]) -> _Result:
    """Run the Triton version; where it fails, warn once and use the other from now on.

    Triton may not work on a machine (no compiler, a driver too old). A fault of a kernel looks the
    same, so the warning is visible, and an error where warnings are errors, as in the tests.
    """
    if _refused is not None:
        return plain()
    try:
        return fast()
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise
        _refuse(f"{type(error).__name__}: {error}")
        return plain()


@functools.cache
def _import_error() -> str | None:
    """Why Triton's kernels cannot be imported, if they cannot: it may be broken, or not there."""
    try:
        importlib.import_module("gradsurgery.kernels.triton_tasks")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _refuse(reason: str) -> None:
    global _refused
    _refused = reason
    warn_user(
        f"surgery on CUDA runs on plain torch ops, which are slower, since Triton failed: {reason}",
        RuntimeWarning,
    )


@functools.cache
def _has_device() -> bool:
    # Without one, tensors on CUDA are fakes, which hold no numbers.
    return torch.cuda.is_available()


def _runs_triton(device: torch.device) -> bool:
    # Triton's interpreter runs kernels on CPU tensors, for tests.
    return (device.type == "cuda" and _has_device()) or os.environ.get("TRITON_INTERPRET") == "1"
