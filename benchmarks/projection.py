"""gram + combine beside the memory floor: the time to read G twice and to write g once."""

from __future__ import annotations

import torch

from benchmarks.measure import Rows, alternate, summary
from gradsurgery import kernels

__all__ = ["run"]


def run(rows: Rows, *, rounds: int, width: int, tasks: list[int], dtype: torch.dtype) -> None:
    """One row per T and case."""
    for count in tasks:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        gradients = torch.randn(count, width, device=device).to(dtype)
        combined = torch.empty(width, device=device, dtype=dtype)
        # Small enough that writing into row 0 over and over does not overflow.
        weights = torch.full((count,), 1 / count, dtype=torch.float64, device=device)

        def floor(g: torch.Tensor = gradients, out: torch.Tensor = combined) -> None:
            g.sum()
            g.sum()
            out.fill_(1.0)

        def surgery(g: torch.Tensor = gradients, w: torch.Tensor = weights) -> None:
            kernels.gram(g)
            kernels.combine(g, w, out=g[0])

        times = alternate({"floor": floor, "gram + combine": surgery}, rounds)
        base = summary(times["floor"])["median_ms"]
        for name, values in times.items():
            found = summary(values)
            rows.add(
                benchmark="projection",
                case=name,
                T=count,
                D=width,
                dtype=str(dtype),
                **found,
                ratio=round(found["median_ms"] / base, 3),
            )
