"""The T×T work, M -> w: one op to the dispatcher and to torch.compile, whatever the method and T.

A step has up to three versions of one name: plain torch ops, which run everywhere, batched and
without waiting for the device (`@step`, here or beside the method); C for the CPU
(`csrc/*.c`, gradsurgery_step_NAME); Triton for CUDA (`STEPS` of `_TRITON_MODULES`). The last two
give NaN for a Gram matrix that is not finite, and leave running state as it is, themselves.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from gradsurgery.kernels import native
from gradsurgery.kernels._backend import on_triton, with_fallback

__all__ = ["guard", "run", "run_moving", "solve", "step"]

_Plain = TypeVar("_Plain", bound=Callable[..., Any])
_plain: dict[str, Callable[..., Any]] = {}
_MOST_TASKS = 64
_TRITON_MODULES = ("triton_tasks", "triton_barrier", "triton_spectral")


def step(name: str) -> Callable[[_Plain], _Plain]:
    """Register the plain version of a step: (gram, *tensors, *numbers) -> weights.

    Raises:
        ValueError: another step has this name.
    """

    def register(function: _Plain) -> _Plain:
        known = _plain.setdefault(name, function)
        if known.__qualname__ != function.__qualname__ or known.__module__ != function.__module__:
            raise ValueError(
                f"step {name!r} is {known.__module__}.{known.__qualname__} already; give "
                f"{function.__module__}.{function.__qualname__} another name"
            )
        _plain[name] = function
        return function

    return register


def run(name: str, gram: Tensor, *tensors: Tensor, numbers: Sequence[float] = ()) -> Tensor:
    """w = step NAME of M.

    Args:
        name: of a registered step.
        gram: [..., T, T] float64.
        tensors: what else it reads, each [..., anything], on the same device.
        numbers: hyperparameters.

    Returns:
        [..., T] float64; NaN where M has an entry that is not finite.
    """
    weights: Tensor = solve(name, gram, list(tensors), [float(number) for number in numbers])
    return weights


@torch.library.custom_op("gradsurgery::solve", mutates_args=())
def solve(name: str, gram: Tensor, tensors: list[Tensor], numbers: list[float]) -> Tensor:
    """See `run`."""
    fast = _triton(name, gram)
    if fast is None and _runs_native(name, gram):
        return _native(name, gram, tensors, numbers)

    def plainly() -> Tensor:
        return guard(gram, _plain[name](gram, *tensors, *numbers))

    if fast is None:
        return plainly()
    found: Tensor = with_fallback(lambda: fast(gram, *tensors, *numbers), plainly)
    return found


@solve.register_fake
def _(name: str, gram: Tensor, tensors: list[Tensor], numbers: list[float]) -> Tensor:
    return gram.new_empty(gram.shape[:-1])


def run_moving(
    name: str, gram: Tensor, moved: Tensor, *tensors: Tensor, numbers: Sequence[float] = ()
) -> Tensor:
    """The same for a step that also moves running state, in place: (gram, *tensors, moved, ...).

    Its plain version returns the weights and the new state. State of a Gram matrix that is not
    finite stays as it was.
    """
    weights: Tensor = _solve_moving(name, gram, list(tensors), moved, list(map(float, numbers)))
    return weights


@torch.library.custom_op("gradsurgery::solve_moving", mutates_args=("moved",))
def _solve_moving(
    name: str, gram: Tensor, tensors: list[Tensor], moved: Tensor, numbers: list[float]
) -> Tensor:
    fast = _triton(name, gram)
    if fast is None and _runs_native(name, gram) and moved.is_contiguous():
        return _native(name, gram, [*tensors, moved], numbers)

    def plainly() -> Tensor:
        weights, new = _plain[name](gram, *tensors, moved, *numbers)
        moved.copy_(torch.where(_finite(gram)[..., None, None], new, moved))
        return guard(gram, weights)

    if fast is None:
        return plainly()
    found: Tensor = with_fallback(lambda: fast(gram, *tensors, moved, *numbers), plainly)
    return found


@_solve_moving.register_fake
def _(
    name: str, gram: Tensor, tensors: list[Tensor], moved: Tensor, numbers: list[float]
) -> Tensor:
    return gram.new_empty(gram.shape[:-1])


def guard(gram: Tensor, weights: Tensor) -> Tensor:
    """w, and NaN where any entry of M is not finite: [..., T, T], [..., T] -> [..., T]."""
    return torch.where(_finite(gram)[..., None], weights, torch.nan)


def _finite(gram: Tensor) -> Tensor:
    return gram.isfinite().all(-1).all(-1)


def _triton(name: str, gram: Tensor) -> Callable[..., Any] | None:
    if not on_triton(gram.device, gram.shape[-1]):
        return None
    return _triton_steps().get(name)


@functools.cache
def _triton_steps() -> dict[str, Callable[..., Any]]:
    """Those that have a Triton version, whose modules need Triton."""
    found: dict[str, Callable[..., Any]] = {}
    for module in _TRITON_MODULES:
        found |= importlib.import_module(f"gradsurgery.kernels.{module}").STEPS
    return found


def _runs_native(name: str, gram: Tensor) -> bool:
    here = gram.device.type == "cpu" and gram.shape[-1] <= _MOST_TASKS
    return here and native.function(f"gradsurgery_step_{name}") is not None


def _native(name: str, gram: Tensor, tensors: Sequence[Tensor], numbers: Sequence[float]) -> Tensor:
    function = native.function(f"gradsurgery_step_{name}")
    assert function is not None
    gram = gram.contiguous()
    count = gram.shape[-1]
    weights = torch.empty(gram.shape[:-1], dtype=torch.float64)
    batch = weights.numel() // count
    arrays = [tensor.contiguous() for tensor in tensors]
    extra = (ctypes.c_void_p * len(arrays))(*(array.data_ptr() for array in arrays))
    strides = (ctypes.c_long * len(arrays))(
        *(array.numel() // max(batch, 1) * array.element_size() for array in arrays)
    )
    given = (ctypes.c_double * len(numbers))(*numbers)
    failed = function(
        gram.data_ptr(),
        extra,
        strides,
        len(arrays),
        given,
        weights.data_ptr(),
        batch,
        count,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"no memory for the step {name!r} of {batch} Gram matrices")
    return weights
