"""What `every=k` and `features=` save: training steps on one shared trunk beside the plain step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from benchmarks.measure import Case, alternate
from benchmarks.models import Problem, build
from benchmarks.rows import Rows
from benchmarks.step import STEPS, lazy_steps, optimizer_of
from gradsurgery import AdaptiveGradientSurgery

__all__ = ["run"]


def _every(problem: Problem, every: int) -> Case:
    plugin = AdaptiveGradientSurgery(optimizer_of(problem), every=every)

    def step() -> None:
        plugin.zero_grad()
        plugin.backward(problem.losses())
        plugin.step()

    return step


def _features(problem: Problem) -> Case:
    plugin = AdaptiveGradientSurgery(optimizer_of(problem))

    def step() -> None:
        plugin.zero_grad()
        features, losses = problem.forward()
        plugin.backward(losses, features=features)
        plugin.step()

    return step


def _forward(problem: Problem) -> Case:
    return lambda: problem.losses()


def run(
    rows: Rows,
    *,
    models: Sequence[str],
    tasks: Sequence[int],
    every: Sequence[int],
    batch: int,
    pixels: int,
    rounds: int,
    device: torch.device,
) -> None:
    """One row per T and kind of step; times are per step, over as many as the largest `every`."""
    steps = max(every)
    kinds: dict[str, Callable[[Problem], Case]] = {
        "sum": STEPS["sum"],
        "forward": _forward,
        **{f"every={k}": partial(_every, every=k) for k in every},
        "features": _features,
    }
    for model in models:
        for count in tasks:
            problem = partial(
                build, model, "shared", count, batch=batch, pixels=pixels, device=device
            )
            single = lazy_steps(kinds, problem)
            cases = {kind: partial(_repeat, case, steps) for kind, case in single.items()}
            measured = alternate(cases, rounds, device, limit_s=240.0)
            forward = measured.ratio("forward", "sum") or 0.0
            for kind in cases:
                row = measured.row(kind, over_sum="sum")
                for field in ("median_ms", "p20_ms", "p80_ms"):
                    if field in row:
                        row[field] = round(row[field] / steps, 3)
                rows.add(
                    benchmark="less_work",
                    model=model,
                    T=count,
                    batch=batch,
                    pixels=pixels if model == "resnet18" else None,
                    steps=steps,
                    **row,
                    allowed=_allowed(kind, count, 1 - forward),
                )


def _allowed(kind: str, count: int, backward: float) -> float | None:
    """What over_sum should be at most; `backward` is the share of a step beyond its forward."""
    if kind.startswith("every="):
        every = int(kind.removeprefix("every="))
        return round(1.15 + (count - 1) / every * backward, 3)
    return 1.10 if kind == "features" else None


def _repeat(case: Case, steps: int) -> None:
    for _ in range(steps):
        case()
