"""Peak memory of training with surgery beside plain training, each in a process of its own."""

from __future__ import annotations

import json
import resource

import torch

from benchmarks.measure import Rows, in_child
from benchmarks.step import build, step_of

__all__ = ["child", "run"]


def child(kind: str, graph: str, tasks: int, batch: int, pixels: int, steps: int) -> None:
    """Train a few steps and print the peak as JSON."""
    step = step_of(kind, graph, tasks, batch, pixels)
    for _ in range(steps):
        step()
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(json.dumps({"peak_mib": peak}))


def run(rows: Rows, *, tasks: list[int], batch: int, pixels: int, steps: int) -> None:
    """One row per T, graph and kind of training."""
    for count in tasks:
        model, _ = build("shared", count, 1, 32)
        row_mib = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
        for graph in ("disjoint", "shared"):
            peaks = {}
            for kind in ("sum", "surgery"):
                numbers = map(str, (count, batch, pixels, steps))
                found = in_child("memory-child", kind, graph, *numbers)
                peaks[kind] = found["peak_mib"]
                rows.add(
                    benchmark="memory",
                    case=f"{graph}: {kind}",
                    T=count,
                    batch=batch,
                    pixels=pixels,
                    runs=1,
                    peak_mib=round(peaks[kind], 1),
                    over_plain_mib=round(peaks[kind] - peaks["sum"], 1),
                    row_mib=round(row_mib, 1),
                    allowed_mib=round(1.2 * (count - 1) * row_mib + 64, 1),
                )
