"""What the host pays: many small parameters, where the arithmetic costs next to nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.measure import Rows, alternate, summary
from gradsurgery import AdaptiveGradientSurgery

__all__ = ["run"]


def run(rows: Rows, *, rounds: int, counts: list[int], tasks: int) -> None:
    """Backward passes of `tasks` losses over chains of 8-element parameters, with and without."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for count in counts:
        parameters = [nn.Parameter(torch.full((8,), 0.5, device=device)) for _ in range(count)]
        base = torch.optim.SGD(parameters, lr=1e-4)
        plugin = AdaptiveGradientSurgery(base)

        def losses(parameters: list[nn.Parameter] = parameters) -> list[Tensor]:
            hidden = torch.ones(8, device=device)
            for p in parameters:
                hidden = torch.tanh(hidden * p)
            return [(hidden * (t + 1) - t).square().sum() for t in range(tasks)]

        def plain(base: torch.optim.Optimizer = base) -> None:
            base.zero_grad()
            values = losses()
            for t, loss in enumerate(values):
                loss.backward(retain_graph=t < tasks - 1)

        def surgery(plugin: AdaptiveGradientSurgery = plugin) -> None:
            plugin.zero_grad()
            plugin.backward(losses())

        times = alternate({"T backwards": plain, "surgery": surgery}, rounds)
        first = summary(times["T backwards"])["median_ms"]
        for name, values in times.items():
            found = summary(values)
            rows.add(
                benchmark="overhead",
                case=name,
                T=tasks,
                parameters=count,
                **found,
                added_ms=round(found["median_ms"] - first, 3),
            )
