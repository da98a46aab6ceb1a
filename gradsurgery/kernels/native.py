"""Both kernels in C for float32 rows on the CPU, where the package was built with a compiler.

`csrc/native.c` is the other side. It is compiled when the package is installed; without it, and
for whatever it does not take, the CPU runs `blocked`.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "available",
    "combine_into",
    "combine_spans",
    "function",
    "gram",
    "gram_spans",
    "takes",
]

_MOST_ROWS = 64
# The instruction set that the library may use: 0 what this processor has, 1 any, 2 up to AVX2.
_limit = 0


@functools.cache
def _library() -> ctypes.CDLL | None:
    found = importlib.util.find_spec("gradsurgery.kernels._native")
    if found is None or found.origin is None:
        return None
    try:
        library = ctypes.CDLL(found.origin)
    except OSError:
        return None
    pointer, long, integer = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    matrix: list[Any] = [pointer, long, long, long, integer, integer]
    library.gradsurgery_gram.argtypes = [*matrix, pointer]
    library.gradsurgery_gram.restype = integer
    library.gradsurgery_combine.argtypes = [*matrix, pointer, pointer]
    library.gradsurgery_combine.restype = None
    spans: list[Any] = [pointer, long, long, integer, integer, pointer, long]
    library.gradsurgery_gram_spans.argtypes = [*spans, pointer]
    library.gradsurgery_gram_spans.restype = integer
    library.gradsurgery_combine_spans.argtypes = [*spans, pointer, pointer]
    library.gradsurgery_combine_spans.restype = None
    return library


def available() -> bool:
    """Whether the library was built and can be loaded."""
    return _library() is not None


@functools.cache
def function(name: str) -> Any:
    """A step of the T×T work in the library, as `tasks` calls it; None where it is not there."""
    library = _library()
    found = None if library is None else getattr(library, name, None)
    if found is not None:
        pointer, long, integer = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
        found.argtypes = [pointer] * 3 + [long] + [pointer] * 2 + [long] * 2 + [integer]
        found.restype = integer
    return found


def takes(rows: Tensor) -> bool:
    """Whether these rows can be read: float32 on the CPU, T <= 64, each row without gaps."""
    plain = rows.device.type == "cpu" and rows.dtype == torch.float32
    return plain and rows.shape[0] <= _MOST_ROWS and (rows.stride(1) == 1 or rows.shape[1] < 2)


def gram(rows: Tensor) -> Tensor:
    """M = G Gᵀ: float32 [T, D] -> float64 [T, T]; float32 over 64 terms, float64 from there on."""
    out = torch.empty(rows.shape[0], rows.shape[0], dtype=torch.float64)
    if _loaded().gradsurgery_gram(*_matrix(rows), out.data_ptr()):
        raise MemoryError("no memory for the partial sums of the Gram matrix")
    return out


def combine_into(rows: Tensor, weights: Tensor, out: Tensor) -> None:
    """out = Gᵀ w, summed in float64: [T, D], [T] -> [D]; `out` may be a row of G."""
    factors = weights.to(torch.float64).contiguous()
    target = out if out.stride(0) == 1 or out.numel() < 2 else torch.empty_like(out).contiguous()
    _loaded().gradsurgery_combine(*_matrix(rows), factors.data_ptr(), target.data_ptr())
    if target is not out:
        out.copy_(target)


def gram_spans(rows: Tensor, bounds: Sequence[int]) -> Tensor:
    """M of each span of columns, [T, D] -> [spans, T, T]; `bounds` is start, stop, start, ..."""
    count, spans = rows.shape[0], len(bounds) // 2
    out = torch.empty(spans, count, count, dtype=torch.float64)
    if _loaded().gradsurgery_gram_spans(*_spans(rows, bounds), out.data_ptr()):
        raise MemoryError("no memory for the partial sums of the Gram matrices")
    return out


def combine_spans(rows: Tensor, weights: Tensor, bounds: Sequence[int], out: Tensor) -> None:
    """Over each span out = Gᵀ w with its weights, [spans, T]; `out` is a row of G, or like one."""
    factors = weights.to(torch.float64).contiguous()
    arguments = _spans(rows, bounds)
    _loaded().gradsurgery_combine_spans(*arguments, factors.data_ptr(), out.data_ptr())


def _loaded() -> ctypes.CDLL:
    library = _library()
    assert library is not None, "ask available() first"
    return library


def _matrix(rows: Tensor) -> tuple[int, ...]:
    return rows.data_ptr(), *rows.shape, rows.stride(0), torch.get_num_threads(), _limit


def _spans(rows: Tensor, bounds: Sequence[int]) -> tuple[Any, ...]:
    array = (ctypes.c_long * len(bounds))(*bounds)
    threads = torch.get_num_threads()
    count, stride = rows.shape[0], rows.stride(0)
    return rows.data_ptr(), count, stride, threads, _limit, array, len(bounds) // 2
