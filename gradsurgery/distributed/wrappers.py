"""Models in wrappers of torch.distributed: which cannot be operated on, and what to do then."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from gradsurgery._warn import warn_user

__all__ = ["WRAPPED", "Collectives", "is_running", "refuse_flat_parameters", "warn_alone"]

WRAPPED = (
    "a backward pass communicated with other processes: parameters are in DistributedDataParallel, "
    "which averages the first task's gradient alone (or in another wrapper that reduces "
    "gradients); pass process_group=torch.distributed.group.WORLD, with which the module stays as "
    "it is"
)


def is_running() -> bool:
    """Whether this process has a process group."""
    return dist.is_available() and dist.is_initialized()


class Collectives:
    """Notes how many collectives have run, to see whether a backward pass runs some.

    DistributedDataParallel leaves no mark on parameters or graph: its hooks are out of Python's
    sight. But it communicates while a gradient is computed, and every group counts what it does.
    """

    def __init__(self) -> None:
        self._before = _count()

    def refuse(self) -> None:
        """Raise ValueError where the backward pass since then has communicated."""
        if _count() != self._before:
            raise ValueError(WRAPPED)


def _count() -> list[int]:
    groups: list[Any] = list(dist.distributed_c10d._world.pg_map)
    return [group._get_sequence_number_for_group() for group in groups]


def refuse_flat_parameters(parameters: Sequence[Tensor]) -> None:
    """Raise ValueError for parameters of FullyShardedDataParallel (not of `fully_shard`)."""
    if any(
        getattr(p, "_fsdp_flattened", False) or hasattr(p, "_is_flat_param") for p in parameters
    ):
        raise ValueError(
            "parameters are in FullyShardedDataParallel, which hides the shards of a gradient; use "
            "torch.distributed.fsdp.fully_shard"
        )


def warn_alone() -> None:
    """Warn that several processes do not share their gradients."""
    warn_user(
        f"torch.distributed runs {dist.get_world_size()} processes, and without process_group "
        "surgery operates on each process's own gradients: p.grad differs between ranks. For "
        "surgery on the global gradients pass process_group=torch.distributed.group.WORLD"
    )
