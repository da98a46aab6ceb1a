"""What the host pays: many small parameters, where the arithmetic costs next to nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.measure import Case, alternate
from benchmarks.rows import Row, Rows
from gradsurgery import AdaptiveGradientSurgery

__all__ = ["ELEMENTS", "chain", "run"]

ELEMENTS = 8
"""In each parameter."""


def chain(count: int, tasks: int, device: torch.device) -> dict[str, Case]:
    """Backward passes of `tasks` losses over a chain of `count` parameters, with and without."""
    parameters = [nn.Parameter(torch.full((ELEMENTS,), 0.5, device=device)) for _ in range(count)]
    base = torch.optim.SGD(parameters, lr=1e-4)
    plugin = AdaptiveGradientSurgery(base)

    def losses() -> list[Tensor]:
        hidden = torch.ones(ELEMENTS, device=device)
        for p in parameters:
            hidden = torch.tanh(hidden * p)
        return [(hidden * (t + 1) - t).square().sum() for t in range(tasks)]

    def plain() -> None:
        base.zero_grad()
        for t, loss in enumerate(losses()):
            loss.backward(retain_graph=t < tasks - 1)  # type: ignore[no-untyped-call]

    def surgery() -> None:
        plugin.zero_grad()
        plugin.backward(losses())

    return {"T backwards": plain, "surgery": surgery}


def run(
    rows: Rows,
    *,
    counts: Sequence[int],
    tasks: Sequence[int],
    rounds: int,
    device: torch.device,
) -> None:
    """One row per T, number of parameters and kind."""
    for tasks_count in tasks:
        for count in counts:
            fields: Row = {"benchmark": "overhead", "T": tasks_count, "parameters": count}
            with rows.failures(**fields, case="chain"):
                cases = chain(count, tasks_count, device)
                measured = alternate(cases, rounds, device)
                for case in cases:
                    rows.add(
                        **fields,
                        **measured.row(case, over_T_backwards="T backwards"),
                        added_ms=measured.added_ms(case, "T backwards"),
                    )
