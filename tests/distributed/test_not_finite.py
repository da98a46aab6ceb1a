"""Steps that are not finite, mixed at random into training: no later step may remember them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launch import Processes
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from gradsurgery import AdaptiveGradientSurgery, methods

SOURCES = ("local", "process_group", "fully_shard")
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"granularity": "parameter"},
    {"metric": "optimizer"},
    {"every": 2},
    {"scope": "all"},
)
WAYS = ("plain", "micro-batches", "features")
# "random" draws other weights after another number of steps.
METHODS = tuple(name for name in methods.available() if name != "random")
# The length of their result does not follow that of the gradients, so the loss scale stays in it.
OWN_LENGTH = {"nash_mtl", "fairgrad"}


class Network(nn.Module):
    """Sizes that fill no 64 bytes: between the parameters' gradients there is padding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.trunk = nn.Sequential(nn.Linear(5, 7), nn.Tanh())
        self.heads = nn.ModuleList([nn.Linear(7, 1), nn.Linear(7, 1)])

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        z = self.trunk(x)
        first, second = (head(z) for head in self.heads)
        beside = 3 * z.sum(1, keepdim=True) + 5
        return z, [(first - 1).square().mean(), (second + beside).exp2().mean()]


def case(number: int, source: str) -> dict[str, Any]:
    """What to try: drawn from the number alone, so that all ranks try the same."""
    drawn = random.Random(f"{number} {source}")
    options = drawn.choice(OPTIONS)
    ways = WAYS if options.keys() <= {"every", "scope"} and source != "fully_shard" else WAYS[:2]
    method = drawn.choice(METHODS)
    bad = sorted(drawn.sample(range(1, 8), drawn.choice((1, 1, 2, 3))))
    return {
        "method": method,
        "options": options,
        "way": drawn.choice(ways),
        # What reads the losses' values reads the scaled ones, and a bad step changes the scale.
        "scaler": drawn.random() < 0.3 and not methods.resolve(method).reads_losses,
        "bad": {step: drawn.choice((float("inf"), float("nan"))) for step in bad},
        "task": drawn.choice((0, 1)),
    }


def run(source: str, tried: dict[str, Any], *, with_bad_steps: bool) -> list[Tensor]:
    """The gradients of every step that is not meant to be bad."""
    model = Network()
    if source == "fully_shard":
        fully_shard(model)
    optimizer = AdaptiveGradientSurgery(
        torch.optim.AdamW(model.parameters(), lr=1e-2),
        tried["method"],
        process_group=dist.group.WORLD if source == "process_group" else None,
        **tried["options"],
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=tried["scaler"])
    found = []
    for step in range(8):
        is_bad = step in tried["bad"]
        if is_bad and not with_bad_steps:
            continue
        generator = torch.Generator().manual_seed(step)
        z, losses = model(torch.randn(16, 5, generator=generator))
        if is_bad:
            losses[tried["task"]] = losses[tried["task"]] * tried["bad"][step]
        losses = scaler.scale(losses) if tried["scaler"] else losses
        optimizer.zero_grad()
        if tried["way"] == "micro-batches":
            half = [loss / 2 for loss in losses]
            optimizer.backward(half, accumulate=True, retain_graph=True)
            optimizer.backward(half)
        elif tried["way"] == "features":
            optimizer.backward(losses, features=z)
        else:
            optimizer.backward(losses)
        scaler.unscale_(optimizer)
        grads = [p.grad for p in model.parameters()]
        whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]
        flat = torch.cat([g.flatten() for g in whole])
        if is_bad:
            assert not flat.isfinite().all(), (tried, step, "a step that is not finite became so")
        else:
            found.append(flat.clone())
        if tried["scaler"]:
            scaler.step(optimizer)
            scaler.update()
        elif not is_bad:
            optimizer.step()
    if tried["scaler"] and with_bad_steps:
        assert scaler.get_scale() == 2.0 ** (8 - len(tried["bad"])), (tried, scaler.get_scale())
    return found


def try_many(source: str, numbers: range) -> int:
    """Compare each case with a run that never saw the bad steps."""
    for number in numbers:
        tried = case(number, source)
        found = run(source, tried, with_bad_steps=True)
        wanted = run(source, tried, with_bad_steps=False)
        for step, (one, other) in enumerate(zip(found, wanted, strict=True)):
            assert one.isfinite().all(), (number, tried, step)
            if "every" in tried["options"]:
                # A bad step counts as one of the steps between two solves.
                continue
            if tried["scaler"] and tried["method"] in OWN_LENGTH:
                continue
            # float32; another loss scale rounds otherwise.
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-6), (number, tried, step)
    return len(numbers)


@pytest.fixture(scope="module")
def one() -> Iterator[Processes]:
    processes = Processes(1)
    yield processes
    processes.close()


@pytest.mark.parametrize("source", SOURCES)
def test_one_process(source: str, one: Processes) -> None:
    assert one(try_many, source, range(24)) == [24]


@pytest.mark.parametrize("source", SOURCES[1:])
def test_two_processes(source: str, two: Processes) -> None:
    assert two(try_many, source, range(1000, 1008)) == [8, 8]


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_many_in_one_process(source: str, one: Processes) -> None:
    assert one(try_many, source, range(2000, 2200)) == [200]


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES[1:])
def test_many_in_two_processes(source: str, two: Processes) -> None:
    assert two(try_many, source, range(4000, 4040)) == [40, 40]
