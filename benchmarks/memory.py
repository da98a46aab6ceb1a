"""Peak memory of training with surgery beside plain training, each in a process of its own."""

from __future__ import annotations

import itertools
import json
import resource
from collections.abc import Sequence

import torch

from benchmarks.measure import in_child
from benchmarks.models import GRAPHS, build
from benchmarks.rows import Row, Rows
from benchmarks.step import STEPS

__all__ = ["child", "run"]


def child(kind: str, model: str, graph: str, device: str, numbers: Sequence[int]) -> None:
    """Train a few steps (numbers: T, batch, pixels, steps) and print the peak as JSON."""
    tasks, batch, pixels, steps = numbers
    where = torch.device(device)
    problem = build(model, graph, tasks, batch=batch, pixels=pixels, device=where)
    step = STEPS[kind](problem)
    for _ in range(steps):
        step()
    if where.type == "cuda":
        peak = torch.cuda.max_memory_allocated(where) / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    row_mib = problem.width * problem.parameters[0].element_size() / 2**20
    print(json.dumps({"peak_mib": peak, "row_mib": row_mib}))


def run(
    rows: Rows,
    *,
    models: Sequence[str],
    tasks: Sequence[int],
    batch: int,
    pixels: int,
    steps: int,
    device: torch.device,
) -> None:
    """One row per model, T, graph and kind of training."""
    for model, count, graph in itertools.product(models, tasks, GRAPHS):
        plain_mib: float | None = None
        for kind in ("sum", "surgery"):
            fields: Row = {
                "benchmark": "memory",
                "model": model,
                "graph": graph,
                "T": count,
                "batch": batch,
                "pixels": pixels if model == "resnet18" else None,
                "case": kind,
            }
            with rows.failures(**fields):
                numbers = map(str, (count, batch, pixels, steps))
                found = in_child("memory-child", kind, model, graph, str(device), *numbers)
                if kind == "sum":
                    plain_mib = found["peak_mib"]
                rows.add(**fields, runs=1, **_compared(found, plain_mib, count))


def _compared(found: Row, plain_mib: float | None, count: int) -> Row:
    """The peak, over plain training where that was measured, and what surgery may add to it."""
    peak_mib, row_mib = found["peak_mib"], found["row_mib"]
    return {
        "peak_mib": round(peak_mib, 1),
        "over_plain_mib": None if plain_mib is None else round(peak_mib - plain_mib, 1),
        "row_mib": round(row_mib, 1),
        "allowed_mib": round(1.2 * (count - 1) * row_mib + 64, 1),
    }
