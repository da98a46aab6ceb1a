"""Models in wrappers of torch.distributed: which cannot be operated on, and what to do then."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from gradsurgery._warn import warn_user

__all__ = ["look_for_wrappers", "warn_alone"]


def look_for_wrappers(parameters: Sequence[Tensor], *, grouped: bool) -> None:
    """Refuse wrapped models with which the surgery would be silently wrong.

    Searches the live objects of the process, since neither parameters nor graph tell: about
    0.1 s, for the first call of many processes only.

    Raises:
        ValueError: parameters in DistributedDataParallel without a process group, or in
            FullyShardedDataParallel.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.nn.parallel import DistributedDataParallel

    own = {id(p) for p in parameters}
    for candidate in gc.get_objects():
        # type(), as some objects are proxies that lie about their class, or import on a look.
        kind = type(candidate)
        if not issubclass(kind, DistributedDataParallel | FullyShardedDataParallel):
            continue
        if own.isdisjoint(map(id, candidate.parameters())):
            continue
        if issubclass(kind, FullyShardedDataParallel):
            raise ValueError(
                "parameters are in FullyShardedDataParallel, which hides the shards of a gradient; "
                "use torch.distributed.fsdp.fully_shard"
            )
        if not grouped:
            raise ValueError(
                "parameters are in DistributedDataParallel, which averages the first task's "
                "gradient alone; pass process_group=torch.distributed.group.WORLD (the module "
                "stays as it is)"
            )


def warn_alone() -> None:
    """Warn that several processes do not share their gradients."""
    warn_user(
        f"torch.distributed runs {dist.get_world_size()} processes, and without process_group "
        "surgery operates on each process's own gradients: p.grad differs between ranks. For "
        "surgery on the global gradients pass process_group=torch.distributed.group.WORLD"
    )
