"""One small training without any framework, and the parts of it that all frameworks are given."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, DistributedSampler
from training import Network, full

from gradsurgery import AdaptiveGradientSurgery

BATCH, STEPS, MICRO = 8, 6, 2
HALF = STEPS // 2
CLIP = 4.5
"""Less than the norm of the gradient in the first steps, more than in the last."""


def size() -> int:
    """The number of processes, also before a framework has made the group."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def like_torchrun() -> None:
    """What torchrun sets; Lightning removes a part of it when it is done."""
    rank, count = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=count, LOCAL_WORLD_SIZE=count)


def plugin(model: nn.Module) -> AdaptiveGradientSurgery:
    """What every framework gets, at a time when the group exists."""
    assert dist.is_initialized() == (size() > 1)
    # Adam would not see a factor on all gradients, nor would anything after clipping every step.
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    group = dist.group.WORLD if size() > 1 else None
    return AdaptiveGradientSurgery(base, "gradvac", process_group=group)


def linear(optimizer: Any) -> LambdaLR:
    """The Trainer's own schedule, for all of them."""
    return LambdaLR(optimizer, lambda step: (STEPS - step) / STEPS)


def samples(first: int = 0, stop: int = STEPS) -> Tensor:
    """Those of the steps from `first` on."""
    source = torch.Generator().manual_seed(2)
    whole = torch.randn(BATCH * STEPS * MICRO, 7, generator=source)
    return whole[first * BATCH * MICRO : stop * BATCH * MICRO]


def loader(first: int = 0, stop: int = STEPS) -> DataLoader[Tensor]:
    """A rank's share of every micro-batch."""
    data: Any = samples(first, stop)
    rank = int(os.environ.get("RANK", "0"))
    sampler = DistributedSampler(data, size(), rank, shuffle=False)
    return DataLoader(data, batch_size=BATCH // size(), sampler=sampler)


def labels() -> Tensor:
    """One of three kinds for each sample; -100 for none, more often on one rank than another."""
    kinds = torch.arange(len(samples()))
    return (kinds % 3).where((kinds % 8 < 3) | (kinds % 4 == 0) | (kinds % 5 == 0), -100)


def check_wrapped(model: Any) -> None:
    assert isinstance(model, DistributedDataParallel) == (size() > 1)


def bare(by_items: bool = False) -> Tensor:
    """No framework, one process."""
    network = Network()
    optimizer = plugin(network)
    rates = linear(optimizer)
    parts = zip(samples().split(BATCH), labels().split(BATCH), strict=True)
    counts = [int((step != -100).sum()) for step in labels().split(BATCH * MICRO)]
    for number, (x, kinds) in enumerate(parts):
        factor = 1 / MICRO
        if by_items:
            x = x[kinds != -100]
            factor = len(x) / counts[number // MICRO]
        last = number % MICRO == MICRO - 1
        optimizer.backward([loss * factor for loss in network(x)], accumulate=not last)
        if last:
            nn.utils.clip_grad_norm_(network.parameters(), CLIP)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
    return full(network.parameters())
