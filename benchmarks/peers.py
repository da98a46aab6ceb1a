"""Ours beside the peers: aggregators on the same gradients, and whole training steps."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import torch

from benchmarks import published
from benchmarks.aggregators import OURS, aggregators, import_peer, package_of
from benchmarks.measure import Case, alternate
from benchmarks.models import Problem, build
from benchmarks.projection import task_gradients
from benchmarks.rows import Row, Rows
from benchmarks.step import STEPS, lazy_steps, optimizer_of

__all__ = ["PEER_STEPS", "run"]


def _torchjd(name: str, chunk: int | None) -> Callable[[Problem], Case]:
    """`mtl_backward` and `jac_to_grad`. Chunks of 1: one task after the other, without vmap."""

    def make(problem: Problem) -> Case:
        aggregator = getattr(import_peer("torchjd.aggregation"), name)()
        autojac = import_peer("torchjd.autojac")
        base = optimizer_of(problem)

        def step() -> None:
            base.zero_grad()
            features, losses = problem.forward()
            autojac.mtl_backward(losses, features, parallel_chunk_size=chunk)
            autojac.jac_to_grad(problem.trunk.parameters(), aggregator)
            base.step()

        return step

    return make


def _pytorch_optimizer(problem: Problem) -> Case:
    package = import_peer("pytorch_optimizer")
    optimizer = package.PCGrad(optimizer_of(problem), reduction="sum")

    def step() -> None:
        optimizer.zero_grad()
        optimizer.pc_backward(problem.losses())
        optimizer.step()

    return step


def _published(problem: Problem) -> Case:
    base = optimizer_of(problem)

    def step() -> None:
        published.backward(problem.losses(), problem.parameters)
        base.step()

    return step


PEER_STEPS: dict[str, Callable[[Problem], Case]] = {
    "sum": STEPS["sum"],
    OURS: STEPS["surgery"],
    "torchjd PCGrad": _torchjd("PCGrad", None),
    "torchjd PCGrad, chunks of 1": _torchjd("PCGrad", 1),
    "torchjd UPGrad": _torchjd("UPGrad", None),
    "pytorch_optimizer PCGrad": _pytorch_optimizer,
    "published AGS loop": _published,
}


def run(
    rows: Rows,
    *,
    tasks: Sequence[int],
    width: int,
    models: Sequence[str],
    step_tasks: Sequence[int],
    batch: int,
    pixels: int,
    rounds: int,
    device: torch.device,
) -> None:
    """Rows of benchmark "peers/aggregate" (T in `tasks`) and "peers/step" (T in `step_tasks`)."""
    for count in tasks:
        fields: Row = {"benchmark": "peers/aggregate", "T": count, "D": width}
        with rows.failures(**fields, case="gradients"):
            cases = aggregators(task_gradients(count, width, torch.float32, device))
            measured = alternate(cases, rounds, device)
            for case in cases:
                row = measured.row(case, over_ours=OURS, over_floor="floor")
                rows.add(peer=package_of(case), **fields, **row)
    for model, count in itertools.product(models, step_tasks):
        problem = partial(build, model, "shared", count, batch=batch, pixels=pixels, device=device)
        cases = lazy_steps(PEER_STEPS, problem)
        measured = alternate(cases, rounds, device)
        for case in cases:
            rows.add(
                peer=package_of(case),
                benchmark="peers/step",
                model=model,
                T=count,
                batch=batch,
                pixels=pixels if model == "resnet18" else None,
                **measured.row(case, over_ours=OURS, over_sum="sum"),
            )
