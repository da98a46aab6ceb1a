"""How the cost grows: with T, with D, with the number of parameters, with the batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

import gradsurgery
from benchmarks.measure import Case, alternate, lazily
from benchmarks.models import GRAPHS, build
from benchmarks.overhead import ELEMENTS, chain
from benchmarks.projection import floor_of, surgery_of, task_gradients
from benchmarks.rows import Row, Rows
from benchmarks.step import STEPS, lazy_steps

__all__ = ["run"]


def run(
    rows: Rows,
    *,
    tasks: Sequence[int],
    width: int,
    widths: Sequence[int],
    counts: Sequence[int],
    models: Sequence[str],
    batches: Sequence[int],
    pixels: int,
    rounds: int,
    device: torch.device,
) -> None:
    """Rows of "scaling/T", "scaling/D", "scaling/parameters", "scaling/batch", floors among them.

    Args:
        rows: where they go.
        tasks: T of the first sweep.
        width: D of the first sweep.
        widths: D of the second, at T = 4.
        counts: numbers of parameters of the third, at T = 2.
        models: what trains in the fourth, at T = 2.
        batches: samples per batch of the fourth.
        pixels: of an image, resnet18.
        rounds: at most so many for each point.
        device: where.
    """
    for count in tasks:
        _aggregation(rows, "scaling/T", count, width, rounds, device)
    for d in widths:
        _aggregation(rows, "scaling/D", 4, d, rounds, device)
    for parameters in counts:
        _parameters(rows, 2, parameters, rounds, device)
    for model in models:
        for graph in GRAPHS:
            for batch in batches:
                _batch(rows, model, graph, batch, pixels, rounds, device)


def _aggregation(
    rows: Rows, benchmark: str, count: int, width: int, rounds: int, device: torch.device
) -> None:
    fields: Row = {"benchmark": benchmark, "T": count, "D": width}
    with rows.failures(**fields, case="gradients"):
        gradients = task_gradients(count, width, torch.float32, device)
        cases: dict[str, Case] = {
            "floor": floor_of(gradients),
            "gram + combine": surgery_of(gradients)["gram + combine"],
            "aggregate": lambda: gradsurgery.aggregate(gradients, "ags"),
        }
        measured = alternate(cases, rounds, device)
        for case in cases:
            rows.add(**fields, **measured.row(case, over_floor="floor"))


def _parameters(rows: Rows, tasks: int, count: int, rounds: int, device: torch.device) -> None:
    fields: Row = {"benchmark": "scaling/parameters", "T": tasks, "parameters": count}
    with rows.failures(**fields, case="chain"):
        floor = floor_of(task_gradients(tasks, count * ELEMENTS, torch.float32, device))
        cases = {"floor": floor, **chain(count, tasks, device)}
        measured = alternate(cases, rounds, device)
        for case in cases:
            row = measured.row(case, over_T_backwards="T backwards")
            added_ms = measured.added_ms(case, "T backwards") if case == "surgery" else None
            rows.add(**fields, **row, added_ms=added_ms)


def _batch(
    rows: Rows, model: str, graph: str, batch: int, pixels: int, rounds: int, device: torch.device
) -> None:
    problem = partial(build, model, graph, 2, batch=batch, pixels=pixels, device=device)

    def floor() -> Case:
        return floor_of(task_gradients(2, problem().width, torch.float32, device))

    cases = {"floor": lazily(floor), **lazy_steps(STEPS, problem)}
    measured = alternate(cases, rounds, device)
    for case in cases:
        row = measured.row(case, over_sum="sum", over_T_backwards="T backwards")
        for base in ("sum", "T_backwards"):
            ratio = row.get(f"over_{base}")
            if ratio is not None and case == "surgery":
                row[f"percent_over_{base}"] = round(100 * (ratio - 1), 1)
        rows.add(
            benchmark="scaling/batch",
            model=model,
            graph=graph,
            T=2,
            batch=batch,
            pixels=pixels if model == "resnet18" else None,
            **row,
        )
