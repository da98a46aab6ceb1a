"""gram and combine beside the memory floor: the time to read G twice and to write g once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.measure import Case, Measured, alternate, lazily, require_memory
from benchmarks.rows import Row, Rows
from gradsurgery import kernels

__all__ = ["floor_of", "run", "surgery_of", "task_gradients"]


def task_gradients(count: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """G, [T, D]: noise and a common part of alternating sign, so that half of the pairs conflict.

    Cosines are 0.2 and -0.2.
    """
    require_memory(count * width * dtype.itemsize, device)
    generator = torch.Generator(device).manual_seed(0)
    common = torch.randn(width, generator=generator, device=device, dtype=dtype)
    rows = torch.empty(count, width, device=device, dtype=dtype)
    for t, row in enumerate(rows):
        row.normal_(generator=generator).add_(common, alpha=0.5 * (-1) ** t)
    return rows


def floor_of(gradients: Tensor) -> Case:
    """Reads G twice and writes g once, and computes nothing that is needed."""
    out = torch.empty_like(gradients[0])

    def floor() -> None:
        gradients.sum()
        gradients.sum()
        out.fill_(1.0)

    return floor


def surgery_of(gradients: Tensor, backend: str = "auto") -> dict[str, Case]:
    """The two kernels, alone and together, in place in row 0 as the plugin runs them."""
    # 1 / T: writing into row 0 over and over does not overflow.
    weights = torch.full(
        gradients.shape[:1], 1 / len(gradients), dtype=torch.float64, device=gradients.device
    )

    def gram() -> None:
        kernels.gram(gradients, backend=backend)

    def combine() -> None:
        kernels.combine(gradients, weights, out=gradients[0], backend=backend)

    def both() -> None:
        gram()
        combine()

    return {"gram": gram, "combine": combine, "gram + combine": both}


def run(
    rows: Rows,
    *,
    tasks: Sequence[int],
    width: int,
    dtype: torch.dtype,
    backend: str,
    rounds: int,
    device: torch.device,
) -> None:
    """One row per T and case; on CUDA also a copy of as many bytes as the floor moves."""
    for count in tasks:
        fields: Row = {
            "benchmark": "projection",
            "T": count,
            "D": width,
            "dtype": str(dtype).removeprefix("torch."),
            "backend": backend,
        }
        with rows.failures(**fields, case="gradients"):
            gradients = task_gradients(count, width, dtype, device)
            cases = {"floor": floor_of(gradients), **surgery_of(gradients, backend)}
            if device.type == "cuda":
                cases["copy"] = lazily(partial(_copy_of, gradients))
            measured = alternate(cases, rounds, device)
            for case in cases:
                rows.add(**fields, **_row(measured, case, count, width * dtype.itemsize))


def _row(measured: Measured, case: str, count: int, size: int) -> Row:
    """With the bandwidth that was reached; `size` is the bytes of one row of G."""
    row = measured.row(case, over_floor="floor")
    if "median_ms" not in row:
        return row
    floor = 2 * count + 1
    moved = {"gram": count, "combine": count + 1}.get(case, floor)
    row["gb_per_s"] = round(moved * size / row["median_ms"] / 1e6, 1)
    copies = measured.ratio("copy", case)
    if copies is not None:
        row["of_copy_bandwidth"] = round(copies * moved / floor, 3)
    return row


def _copy_of(gradients: Tensor) -> Case:
    """Reads and writes, in all, the bytes that the floor moves."""
    count, width = gradients.shape
    half = (2 * count + 1) * width // 2
    require_memory(2 * half * gradients.element_size(), gradients.device)
    source = torch.ones(half, dtype=gradients.dtype, device=gradients.device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)
