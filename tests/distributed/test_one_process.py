"""Many processes do what one does on the joined batch, and all ranks hold the same bits."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from launch import Processes
from torch import Tensor
from training import DDP, Setting, train

METHODS = ("ags", "pcgrad", "gradvac", "sum")
SHARDED = ("fully_shard root", "fully_shard blocks")

DATA_PARALLEL = [
    *(Setting(how) for how in DDP),
    Setting("bare", micro_batches=3),
    *(Setting("bare", method, scope=scope) for method in METHODS for scope in ("shared", "all")),
    *(Setting("ddp", tasks=tasks, micro_batches=count) for tasks in (1, 2) for count in (1, 2)),
    Setting("ddp", dtype=torch.float64),
    Setting("ddp", dtype=torch.bfloat16),
    Setting("ddp", autocast=True),
    Setting("ddp find_unused", scaler=True, clip=True),
    Setting("ddp", checkpointed=True),
    Setting("bare", compiled=True),
]
FULLY_SHARD = [
    *(Setting(how) for how in SHARDED),
    Setting("fully_shard blocks", scope="all", micro_batches=3),
    *(Setting("fully_shard root", tasks=tasks) for tasks in (1, 2)),
    Setting("fully_shard root", dtype=torch.float64),
    Setting("fully_shard blocks mixed"),
    Setting("fully_shard blocks", scaler=True, clip=True),
    Setting("fully_shard blocks", checkpointed=True),
]
LESS_WORK = [
    # The first micro-batch's losses decide, wherever gradients come from.
    Setting("bare", "famo", micro_batches=3),
    Setting("fully_shard root", "famo", micro_batches=3),
    Setting("bare", every=3),
    Setting("ddp", every=4, micro_batches=2, scope="all"),
    Setting("fully_shard blocks", every=3),
    Setting("fully_shard root", every=3, scope="all"),
    Setting("bare", features=True),
    Setting("ddp find_unused", "gradvac", features=True, scope="all", scaler=True),
    Setting("ddp", "pcgrad", features=True, every=3),
    Setting("bare", "from_losses"),
    Setting("ddp find_unused", "from_losses", micro_batches=2, scope="all"),
    Setting("fully_shard root", "from_losses"),
    Setting("fully_shard blocks", "from_losses", scope="all"),
]
PARTS = [
    Setting("bare", granularity="parameter"),
    Setting("ddp", "gradvac", granularity="group", micro_batches=2),
    Setting("fully_shard blocks", granularity="parameter"),
    Setting("bare", metric="optimizer"),
    Setting("ddp", granularity="parameter", metric="optimizer"),
    Setting("fully_shard root", metric="optimizer", scope="all"),
]
ON_FOUR = [
    Setting("bare", granularity="parameter", metric="optimizer"),
    Setting("bare"),
    Setting("ddp find_unused", micro_batches=2),
    Setting("fully_shard blocks"),
    Setting("fully_shard hybrid"),
]
# Of the long part.
MORE_ON_TWO = [
    *(Setting(how, method) for how in ("ddp", "fully_shard root") for method in METHODS[1:]),
    *(Setting("fully_shard blocks", method, scope="all") for method in METHODS[1:]),
    *(Setting(how, micro_batches=3) for how in (*DDP, *SHARDED)),
]
MORE_ON_FOUR = [
    *(Setting(how, micro_batches=2) for how in DDP if "unused" not in how),
    Setting("fully_shard root"),
    Setting("fully_shard blocks hybrid", "gradvac", micro_batches=2),
]

# Sums over samples are formed in other orders, and that is all: ten steps of it in float32. With
# 16-bit numbers each rank rounds its own gradient, to 2^-9, before the mean.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2**-7}


@cache
def reference(setting: Setting) -> Tensor:
    return train(setting)


def check(processes: Processes, setting: Setting, record: Callable[[float], None]) -> None:
    results = processes(train, setting)
    for result in results[1:]:
        assert torch.equal(result, results[0])
    expected = reference(setting)
    distance = float((results[0] - expected).norm() / expected.norm())
    record(distance)
    rounded = setting.autocast or "mixed" in setting.how
    assert distance < TOLERANCE[torch.bfloat16 if rounded else setting.dtype]


@pytest.mark.parametrize("setting", DATA_PARALLEL, ids=str)
def test_data_parallel(
    two: Processes, setting: Setting, record_distance: Callable[[float], None]
) -> None:
    check(two, setting, record_distance)


@pytest.mark.parametrize("setting", FULLY_SHARD, ids=str)
def test_fully_shard(
    two: Processes, setting: Setting, record_distance: Callable[[float], None]
) -> None:
    check(two, setting, record_distance)


@pytest.mark.parametrize("setting", LESS_WORK + PARTS, ids=str)
def test_less_work_and_finer_surgery(
    two: Processes, setting: Setting, record_distance: Callable[[float], None]
) -> None:
    check(two, setting, record_distance)


@pytest.mark.parametrize("setting", ON_FOUR, ids=str)
def test_four_processes(
    four: Processes, setting: Setting, record_distance: Callable[[float], None]
) -> None:
    check(four, setting, record_distance)


@pytest.mark.slow
@pytest.mark.parametrize("setting", MORE_ON_TWO, ids=str)
def test_more_on_two(
    two: Processes, setting: Setting, record_distance: Callable[[float], None]
) -> None:
    check(two, setting, record_distance)


@pytest.mark.slow
@pytest.mark.parametrize("setting", MORE_ON_FOUR, ids=str)
def test_more_on_four(
    four: Processes, setting: Setting, record_distance: Callable[[float], None]
) -> None:
    check(four, setting, record_distance)
