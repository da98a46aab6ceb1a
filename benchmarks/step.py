"""A whole training step with surgery beside the steps that it replaces."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from benchmarks.measure import Case, alternate, lazily
from benchmarks.models import GRAPHS, Problem, build
from benchmarks.rows import Rows
from gradsurgery import AdaptiveGradientSurgery

__all__ = ["STEPS", "lazy_steps", "optimizer_of", "run"]


def optimizer_of(problem: Problem) -> torch.optim.Optimizer:
    """SGD with momentum: what a step costs beyond the gradients should be little."""
    return torch.optim.SGD(problem.parameters, lr=1e-4, momentum=0.9)


def _plain(problem: Problem) -> Case:
    base = optimizer_of(problem)

    def step() -> None:
        base.zero_grad()
        torch.stack(problem.losses()).sum().backward()  # type: ignore[no-untyped-call]
        base.step()

    return step


def _one_by_one(problem: Problem) -> Case:
    base = optimizer_of(problem)
    shared = len(problem.inputs) == 1

    def step() -> None:
        base.zero_grad()
        losses = problem.losses()
        for t, loss in enumerate(losses):
            loss.backward(retain_graph=shared and t < len(losses) - 1)  # type: ignore[no-untyped-call]
        base.step()

    return step


def _surgery(problem: Problem) -> Case:
    plugin = AdaptiveGradientSurgery(optimizer_of(problem))

    def step() -> None:
        plugin.zero_grad()
        plugin.backward(problem.losses())
        plugin.step()

    return step


STEPS: dict[str, Callable[[Problem], Case]] = {
    "sum": _plain,
    "T backwards": _one_by_one,
    "surgery": _surgery,
}


def lazy_steps(
    kinds: Mapping[str, Callable[[Problem], Case]], problem: Callable[[], Problem]
) -> dict[str, Case]:
    """One case for each kind of step, each with a problem of its own."""

    def make(kind: str) -> Case:
        return kinds[kind](problem())

    return {kind: lazily(partial(make, kind)) for kind in kinds}


def run(
    rows: Rows,
    *,
    models: Sequence[str],
    tasks: Sequence[int],
    batch: int,
    pixels: int,
    amp: bool,
    rounds: int,
    device: torch.device,
) -> None:
    """One row per model, graph, T and kind of step; each kind trains a model of its own."""
    for model, graph, count in itertools.product(models, GRAPHS, tasks):
        problem = partial(
            build, model, graph, count, batch=batch, pixels=pixels, device=device, amp=amp
        )
        cases = lazy_steps(STEPS, problem)
        measured = alternate(cases, rounds, device)
        for kind in cases:
            rows.add(
                benchmark="step",
                model=model,
                graph=graph,
                T=count,
                batch=batch,
                pixels=pixels if model == "resnet18" else None,
                amp=amp,
                **measured.row(kind, over_sum="sum", over_T_backwards="T backwards"),
            )
