"""`gradsurgery.diagnose` on three models made for three answers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gradsurgery import diagnose

__all__ = ["report"]


def _pointless(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    out = model(x)
    return {"near 1": (out - 1).square().mean(), "near 1.1": (out - 1.1).square().mean()}


def _only_a_rescale(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    a, b = model.weight[0].sum(), model.weight[1].sum()  # type: ignore[index]
    noise = 1 + 0.01 * x.mean()
    return {"left": noise * (a + 0.3 * b), "right": noise * (-a + 0.3 * b)}


def _it_matters(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    a, b, c = (model.weight[row].sum() for row in range(3))  # type: ignore[index]
    first, second = (5.0, 0.2) if x.mean() > 0 else (0.2, 5.0)
    return {"left": first * (a + 0.5 * b), "right": second * (-a + 0.5 * c)}


_MODELS: dict[str, Callable[[nn.Module, Tensor], dict[str, Tensor]]] = {
    "two tasks that want nearly the same": _pointless,
    "conflicts between equal norms": _only_a_rescale,
    "conflicts, and each batch another task is the larger one": _it_matters,
}


def report() -> str:
    """What it says about each of them."""
    batches = list(torch.randn(12, 32, 4, generator=torch.Generator().manual_seed(0)))
    blocks = []
    for title, losses in _MODELS.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.Linear(4, 4)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        blocks.append(f"# {title}\n{diagnose(model, losses, batches, optimizer)}")
    return "\n\n".join(blocks)
