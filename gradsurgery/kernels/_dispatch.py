"""What users call: checks, complex numbers, choice of backend. The work is done next door."""

from __future__ import annotations

import torch
from torch import Tensor

from gradsurgery.kernels import blocked, native, reference
from gradsurgery.kernels._backend import BACKENDS, choose, on_triton, with_fallback

__all__ = ["combine", "gram", "real_rows", "relative_error"]


# Each is one op to the dispatcher and to torch.compile.
@torch.library.custom_op("gradsurgery::gram", mutates_args=())
def _gram(rows: Tensor, backend: str) -> Tensor:
    chosen = choose(rows, backend)
    if chosen == "reference":
        return reference.gram(rows)
    if chosen == "native" and (backend == "native" or rows.shape[1] > blocked.SMALL):
        return native.gram(rows)
    if chosen != "triton":
        return blocked.gram(rows)
    from gradsurgery.kernels import triton_rows

    if backend == "triton":
        return triton_rows.gram(rows)
    return with_fallback(lambda: triton_rows.gram(rows), lambda: blocked.gram(rows))


@_gram.register_fake
def _(rows: Tensor, backend: str) -> Tensor:
    return rows.new_empty((rows.shape[0], rows.shape[0]), dtype=torch.float64)


@torch.library.custom_op("gradsurgery::combine_into", mutates_args=("out",))
def _combine_into(rows: Tensor, weights: Tensor, out: Tensor, backend: str) -> None:
    chosen = choose(rows, backend)
    if chosen == "reference":
        out.copy_(reference.combine(rows, weights))
    elif chosen == "native":
        native.combine_into(rows, weights, out)
    elif chosen != "triton":
        blocked.combine_into(rows, weights, out)
    else:
        from gradsurgery.kernels import triton_rows

        if backend == "triton":
            triton_rows.combine_into(rows, weights, out)
        else:
            with_fallback(
                lambda: triton_rows.combine_into(rows, weights, out),
                lambda: blocked.combine_into(rows, weights, out),
            )


@_combine_into.register_fake
def _(rows: Tensor, weights: Tensor, out: Tensor, backend: str) -> None:
    return None


@torch.no_grad()
def gram(gradients: Tensor, *, backend: str = "auto") -> Tensor:
    """Gram matrix of the task gradients, M = G Gᵀ.

    Args:
        gradients: [T, D], one row per task; float16, bfloat16, float32, float64 or complex
            (a complex gradient counts as the vector of its real and imaginary parts). Rows may
            have any strides.
        backend: "auto": Triton on CUDA, compiled C on the CPU, and where these are not there, or
            do not take the rows, plain torch ops in blocks: "triton", "native", "torch". What is
            asked for by name and cannot run raises. "reference": the definition, in float64.

    Returns:
        [T, T], float64, on the device of `gradients`. It does not require grad.

    Raises:
        TypeError: `gradients` is no floating-point or complex tensor.
        ValueError: `gradients` is not [T, D] with T >= 1; `backend` is unknown or does not take
            these rows.
        RuntimeError: `backend` was asked for by name and cannot run here.

    Example:
        >>> import torch
        >>> gram(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        tensor([[25.,  8.],
                [ 8.,  4.]], dtype=torch.float64)
    """
    _check_backend(backend)
    rows = real_rows(gradients)
    with _full_precision(rows):
        product: Tensor = _gram(rows, backend)
    return product


@torch.no_grad()
def combine(
    gradients: Tensor, weights: Tensor, out: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """Combined gradient, g = Gᵀ w.

    Args:
        gradients: [T, D] as in `gram`.
        weights: [T], real, on the same device.
        out: [D], dtype and device of `gradients`; may be `gradients[0]`, which is then
            overwritten in place. None: a new tensor.
        backend: as in `gram`.

    Returns:
        [D], the dtype of `gradients`: `out` where it was given.

    Raises:
        TypeError: wrong dtype of `gradients` or `out`.
        ValueError, RuntimeError: shapes or devices that do not fit; `backend` as in `gram`.

    Example:
        >>> import torch
        >>> combine(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([2.0, 0.5]))
        tensor([2., 1.])
    """
    _check_backend(backend)
    rows = real_rows(gradients)
    if not isinstance(weights, Tensor) or not (out is None or isinstance(out, Tensor)):
        raise TypeError(
            f"weights must be a tensor [T], out a tensor [D] or None; "
            f"got {type(weights).__name__} and {type(out).__name__}"
        )
    if weights.shape != gradients.shape[:1] or weights.is_complex():
        raise ValueError(
            f"weights must be real and [T] = [{gradients.shape[0]}], one weight per row of "
            f"gradients; got {weights.dtype} {list(weights.shape)}"
        )
    if weights.device != gradients.device:
        raise ValueError(
            f"weights are on {weights.device}, gradients on {gradients.device}; move one of them"
        )
    if out is None:
        out = torch.empty(gradients.shape[1], dtype=gradients.dtype, device=gradients.device)
    elif out.dtype != gradients.dtype:
        raise TypeError(f"out must have the dtype {gradients.dtype}; got {out.dtype}")
    elif out.shape != gradients.shape[1:] or out.device != gradients.device:
        raise ValueError(
            f"out must be [D] = [{gradients.shape[1]}] on {gradients.device}; "
            f"got {list(out.shape)} on {out.device}"
        )
    # A complex `out` with gaps has no view as one real vector; an `out` that overlaps the rows
    # other than as row 0 would be overwritten while it is still to be read.
    shared = out.untyped_storage()._cdata == gradients.untyped_storage()._cdata
    first = gradients[0]
    row_zero = (out.storage_offset(), out.stride()) == (first.storage_offset(), first.stride())
    direct = (row_zero or not shared) and (out.is_contiguous() or not out.is_complex())
    result = out if direct else torch.empty_like(out, memory_format=torch.contiguous_format)
    target = torch.view_as_real(result).flatten() if out.is_complex() else result
    with _full_precision(rows):
        _combine_into(rows, weights, target, backend)
    return out if direct else out.copy_(result)


def relative_error(gradients: Tensor) -> float:
    """How accurate `gram` of these rows is, relative to the product of two rows' norms.

    float64 rounding where it sums in float64 (float64 rows; up to 65,536 columns, but for 16-bit
    rows of more than eight tasks on CUDA), else what float32 sums over short pieces leave. Methods
    use it to tell a sum that cancelled from noise. It does not look at values.
    """
    rows = real_rows(gradients)
    if on_triton(rows.device, rows.shape[0]):
        from gradsurgery.kernels import triton_rows

        return triton_rows.relative_error(rows)
    return blocked.relative_error(rows)


def _full_precision(rows: Tensor) -> torch.autocast:
    # Inside the caller's autocast region the products below would run in half precision.
    return torch.autocast(rows.device.type, enabled=False)


def _check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")


def real_rows(gradients: Tensor) -> Tensor:
    if not isinstance(gradients, Tensor):
        raise TypeError(f"gradients must be a tensor [T, D]; got {type(gradients).__name__}")
    if not (gradients.is_floating_point() or gradients.is_complex()):
        raise TypeError(f"gradients must be floating-point or complex; got {gradients.dtype}")
    if gradients.dim() != 2 or gradients.shape[0] == 0:
        raise ValueError(f"gradients must be [T, D] with T >= 1; got {list(gradients.shape)}")
    if gradients.layout != torch.strided:
        raise TypeError(f"gradients must be dense; got layout {gradients.layout}")
    if gradients.is_complex():
        return torch.view_as_real(gradients.resolve_conj()).flatten(1)
    return gradients.resolve_neg()
