"""Checkpoints of many processes: resumed to the bit, and at another number of processes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from launch import Processes
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from training import Setting, batches, full, make

from gradsurgery import AdaptiveGradientSurgery

STEPS = 4


def advance(model: nn.Module, optimizer: AdaptiveGradientSurgery, first: int) -> None:
    for batch in batches(first + STEPS)[first:]:
        optimizer.zero_grad()
        optimizer.backward(model(batch))
        optimizer.step()


def both_halves(setting: Setting) -> Tensor:
    network, model, optimizer = make(setting)
    advance(model, optimizer, 0)
    advance(model, optimizer, STEPS)
    return full(network.parameters())


def first_half(setting: Setting, folder: str, whole: bool) -> None:
    _, model, optimizer = make(setting)
    advance(model, optimizer, 0)
    options = StateDictOptions(full_state_dict=whole, cpu_offload=whole)
    states = get_state_dict(model, optimizer, options=options)
    content = dict(zip(("model", "optimizer"), states, strict=True))
    if not whole:
        dcp.save(content, checkpoint_id=folder)
    elif dist.get_rank() == 0:
        torch.save(content, Path(folder) / "whole.pt")


def second_half(setting: Setting, folder: str, whole: bool) -> Tensor:
    """Starts from other weights and another seed; all of it comes from the checkpoint."""
    network, model, optimizer = make(setting, seed=7)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0)
    options = StateDictOptions(full_state_dict=whole, cpu_offload=whole)
    content: dict[str, Any]
    if whole:
        content = torch.load(Path(folder) / "whole.pt", weights_only=True)
    else:
        states = get_state_dict(model, optimizer, options=options)
        content = dict(zip(("model", "optimizer"), states, strict=True))
        dcp.load(content, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=content["model"],
        optim_state_dict=content["optimizer"],
        options=options,
    )
    advance(model, optimizer, STEPS)
    return full(network.parameters())


QUICK = [
    ((2, 2), "ddp", False),
    ((2, 4), "fully_shard blocks", False),
    ((4, 2), "fully_shard blocks", True),
]
EVERY = itertools.product([(2, 2), (2, 4), (4, 2)], ["ddp", "fully_shard blocks"], [False, True])


@pytest.mark.parametrize(
    ("sizes", "how", "whole"),
    [
        pytest.param(
            *each,
            id=f"{each[0][0]} to {each[0][1]}, {each[1]}, {'whole' if each[2] else 'sharded'}",
            marks=[] if each in QUICK else pytest.mark.slow,
        )
        for each in EVERY
    ],
)
def test_resumed(
    two: Processes,
    four: Processes,
    sizes: tuple[int, int],
    how: str,
    whole: bool,
    tmp_path: Path,
    record_distance: Callable[[float], None],
) -> None:
    # torch's own tools refuse a parameter without state in the optimizer, plain ones too.
    setting = Setting(how, "gradvac", freeze_unused=True)
    before, after = ({2: two, 4: four}[size] for size in sizes)
    before(first_half, setting, str(tmp_path), whole)
    results = after(second_half, setting, str(tmp_path), whole)
    for result in results[1:]:
        assert torch.equal(result, results[0])
    if sizes[0] == sizes[1]:
        assert torch.equal(results[0], after(both_halves, setting)[0])
    expected = both_halves(Setting("bare", "gradvac"))
    distance = float((results[0] - expected).norm() / expected.norm())
    record_distance(distance)
    # Sums over samples in another order, eight steps of it in float32.
    assert distance < 1e-6
