"""One small training as a bare loop with the plugin: what every integration is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradsurgery import AdaptiveGradientSurgery

__all__ = [
    "BATCHES",
    "SIZE",
    "Net",
    "assert_same",
    "bare_loop",
    "epochs",
    "inputs",
    "one_thread",
    "plugin",
]

BATCHES, SIZE = 6, 4
"""Batches in an epoch, samples in a batch."""


class Net(nn.Module):
    """A trunk and three heads whose losses pull it in different directions."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            self.trunk = nn.Linear(8, 6)
            self.heads = nn.ModuleList(nn.Linear(6, 2) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        """[N, 8] -> one [N, 2] per head."""
        shared = torch.tanh(self.trunk(x))
        return [head(shared) for head in self.heads]

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        """Three tasks of very different lengths, some in conflict."""
        return self.losses_of(self(x))

    @staticmethod
    def losses_of(out: list[Tensor]) -> dict[str, Tensor]:
        """The same from the heads' outputs, in float32."""
        a, b, c = (one.float() for one in out)
        return {
            "near": (a - 1).square().mean(),
            "far": (a + 2).square().mean() * 0.3 + b.square().mean(),
            "odd": (b - c + 1).square().mean() * 3,
        }


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """In every test file that imports it: these models are too small for two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def inputs() -> Tensor:
    """One epoch's samples, [BATCHES * SIZE, 8]; always the same."""
    return torch.randn(BATCHES * SIZE, 8, generator=torch.Generator().manual_seed(3))


def epochs(count: int) -> list[Tensor]:
    """The batches of so many epochs, in order."""
    return list(inputs().split(SIZE)) * count


def plugin(model: nn.Module, method: str = "gradvac", **options: Any) -> AdaptiveGradientSurgery:
    """Around AdamW; GradVac, because its targets and its random order are state to carry along."""
    base = torch.optim.AdamW(model.parameters(), lr=0.01, **options)
    return AdaptiveGradientSurgery(base, method=method)


def bare_loop(
    batches: list[Any],
    *,
    model: Any = None,
    optimizer: Any = None,
    micro: int = 1,
    clip: float | None = None,
    precision: torch.dtype = torch.float32,
    scaler: Any = None,
    scheduler: Callable[[Any], Any] | None = None,
) -> tuple[Any, Any]:
    """Train without any framework; `micro` batches make one step."""
    model = Net() if model is None else model
    optimizer = plugin(model) if optimizer is None else optimizer
    rates = None if scheduler is None else scheduler(optimizer)
    mixed = precision != torch.float32
    scaler = torch.amp.GradScaler("cpu", enabled=False) if scaler is None else scaler
    for number, x in enumerate(batches, 1):
        last = number % micro == 0
        with torch.autocast("cpu", precision) if mixed else nullcontext():
            losses = {name: loss / micro for name, loss in model.losses(x).items()}
        scaled = {name: scaler.scale(loss) for name, loss in losses.items()}
        optimizer.backward(scaled, accumulate=not last)
        if not last:
            continue
        if clip is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        if rates is not None:
            rates.step()
        optimizer.zero_grad()
    return model, optimizer


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """Equal to the bit, however deep; the type of mappings and sequences does not matter."""
    if isinstance(expected, Tensor):
        assert isinstance(found, Tensor), where
        assert found.dtype == expected.dtype, where
        assert torch.equal(found, expected), f"{where}: {found} is not {expected}"
    elif isinstance(expected, Mapping):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}[{key!r}]")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{where}[{index}]")
    else:
        assert found == expected, f"{where}: {found!r} is not {expected!r}"
