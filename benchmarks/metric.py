"""Does the STEP serve each task? Surgery in the Euclidean metric and in the optimizer's own."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.rows import Rows
from gradsurgery import AdaptiveGradientSurgery

__all__ = ["run"]

_OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.05}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.003}),
    "Adam, no momentum": (torch.optim.Adam, {"lr": 0.003, "betas": (0.0, 0.999)}),
    "Adam": (torch.optim.Adam, {"lr": 0.003}),
}
_WARM_UP = 20


def run(
    rows: Rows,
    *,
    methods: Sequence[str],
    steps: int,
    seeds: int,
    device: torch.device,
) -> None:
    """The share of (step, task) pairs in which g_t·Δθ > 0, and the losses in the end."""
    for (name, (kind, options)), method in itertools.product(_OPTIMIZERS.items(), methods):
        for metric in ("euclidean", "optimizer"):
            found = [
                _train(kind, options, method, metric, steps, seed, device) for seed in range(seeds)
            ]
            raised = [share for share, _ in found]
            rows.add(
                benchmark="metric",
                optimizer=name,
                method=method,
                metric=metric,
                raised=round(statistics.mean(raised), 4),
                raised_least=round(min(raised), 4),
                raised_most=round(max(raised), 4),
                loss=round(statistics.mean(loss for _, loss in found), 4),
                steps=steps,
                seeds=seeds,
            )


def _train(
    kind: type[torch.optim.Optimizer],
    options: dict[str, Any],
    method: str,
    metric: str,
    steps: int,
    seed: int,
    device: torch.device,
) -> tuple[float, float]:
    """A small network on three functions of one input, two of which disagree about its sign."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4), nn.Tanh()).to(device)
        heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(3)).to(device)
        inputs = torch.randn(steps, 64, 8).to(device)
    parameters = [*trunk.parameters(), *heads.parameters()]
    base = kind(parameters, **options)
    optimizer = AdaptiveGradientSurgery(base, method, metric=metric, scope="all", seed=seed)
    raised = 0
    losses: list[Tensor] = []
    for step, x in enumerate(inputs):
        z = trunk(x)
        y = x[:, :1]
        targets = (y, 3 * y.abs() - 1, -2 * y + x[:, 1:2])
        losses = [
            (head(z) - target).square().mean() for head, target in zip(heads, targets, strict=True)
        ]
        each = [
            torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            for loss in losses
        ]
        before = [p.detach().clone() for p in parameters]
        optimizer.zero_grad()
        optimizer.backward(losses)
        optimizer.step()
        if step < _WARM_UP:
            continue
        for own in each:
            change = sum(
                float((g * (p.detach() - old)).sum())
                for g, p, old in zip(own, parameters, before, strict=True)
                if g is not None
            )
            raised += change > 0
    pairs = 3 * (steps - _WARM_UP)
    return raised / pairs, float(torch.stack(losses).detach().sum())
