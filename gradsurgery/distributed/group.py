"""A process group: agreement between hosts, and the collectives on flat rows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Group", "fingerprint", "shard_groups", "sum_over"]

# Backends that average while they reduce. The others move all of an all-reduce for a reduce-scatter
# (gloo: counted, 2(R - 1)/R of a row), so for them a row is exchanged and averaged here.
_REDUCING = {"nccl", "xccl"}
# Newer names of the same two collectives; the old ones warn there.
# Builds of torch without torch.distributed have neither.
_reduce_scatter: Any = getattr(
    dist, "reduce_scatter_single", getattr(dist, "reduce_scatter_tensor", None)
)
_all_gather: Any = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))


class Group:
    """A process group and what is said and sent in it.

    Args:
        group: a group that this process belongs to.

    Raises:
        TypeError, ValueError: no process group, or one without this process.
    """

    def __init__(self, group: Any) -> None:
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                "process_group must be a torch.distributed process group, such as "
                f"torch.distributed.group.WORLD; got {group!r}"
            )
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("process_group does not contain this process")
        self._ranks = dist.get_process_group_ranks(group)
        self.in_step = True
        """False after a collective failed: what the ranks do no longer fits together."""
        self._group = group
        self._backends = dict(
            item.split(":") for item in dist.get_backend_config(group).split(",") if ":" in item
        )
        # Hosts talk to each other beside the devices, so that nothing waits for a device.
        self._hosts = group if "cpu" in self._backends else _host_group(group)

    def exchange(self, mine: object) -> list[Any]:
        """What each rank says, in their order; 8 bytes a rank where all say the same."""
        digest = bytearray.fromhex(fingerprint(repr(mine).encode()))
        own = torch.frombuffer(digest, dtype=torch.int64)
        every = torch.empty(self.size, dtype=torch.int64)
        self._call(_all_gather, every, own, group=self._hosts)
        if bool((every == own).all()):
            return [mine] * self.size
        said: list[Any] = [None] * self.size
        self._call(dist.all_gather_object, said, mine, group=self._hosts)
        return said

    def compare(self, said: Sequence[Any]) -> None:
        """Refuse what cannot go on: each rank says (its error or None, its settings).

        Raises:
            RuntimeError: another rank's error.
            ValueError: a setting that differs.
        """
        for rank, (error, _) in zip(self._ranks, said, strict=True):
            if error is not None:
                raise RuntimeError(f"rank {rank}: {error}")
        first = said[0][1]
        for rank, (_, settings) in zip(self._ranks, said, strict=True):
            for name, value in settings.items():
                if value != first[name]:
                    raise ValueError(
                        f"{name} must be the same on all ranks; rank {self._ranks[0]} has "
                        f"{first[name]}, rank {rank} has {value}"
                    )

    def average(self, row: Tensor, own: Tensor) -> Callable[[], None]:
        """Begin own = this rank's part of the mean of `row` over all ranks.

        Args:
            row: [width], a multiple of the number of ranks; must stay as it is until the end.
            own: [width / ranks], written.

        Returns:
            What waits for the end: on CUDA the stream, not the host.
        """
        if self._backends.get(row.device.type) in _REDUCING:
            work = self._call(
                _reduce_scatter,
                own,
                row,
                op=dist.ReduceOp.AVG,
                group=self._group,
                async_op=True,
            )
            return lambda: self._call(work.wait)
        parts = torch.empty_like(row)
        work = self._call(dist.all_to_all_single, parts, row, group=self._group, async_op=True)

        def finish() -> None:
            self._call(work.wait)
            torch.mean(parts.view(self.size, -1), 0, out=own)

        return finish

    def gather(self, own: Tensor, row: Tensor) -> Callable[[], None]:
        """Begin row = all ranks' parts; returns what waits for the end."""
        work = self._call(_all_gather, row, own, group=self._group, async_op=True)
        return lambda: self._call(work.wait)

    def sum(self, value: Tensor) -> None:
        """Add up `value` over all ranks, in place."""
        self._call(dist.all_reduce, value, group=self._group)

    def check_values(self, parameters: Sequence[Tensor], names: Sequence[str]) -> None:
        """Compare a checksum of every parameter: ranks must hold the same, in the same order.

        Waits for the device, so once for each set of parameters.

        Raises:
            ValueError: the first parameter that differs, on all ranks.
        """
        sums = torch.stack([_checksum(p) for p in parameters]).cpu()
        every = torch.empty(self.size * len(sums), dtype=sums.dtype)
        self._call(_all_gather, every, sums, group=self._hosts)
        by_rank = every.view(self.size, -1)
        for index, name in enumerate(names):
            other = (by_rank[:, index] != by_rank[0, index]).nonzero()
            if len(other):
                raise ValueError(
                    f"parameter {name} differs between rank {self._ranks[0]} and rank "
                    f"{self._ranks[int(other[0])]}: with "
                    "process_group every rank holds the same parameters in the same order "
                    "(DistributedDataParallel sends those of rank 0 to all; a bare module must be "
                    "built from one seed or broadcast)"
                )

    def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            self.in_step = False
            if not isinstance(error, RuntimeError):
                raise
            raise RuntimeError(
                f"rank {self._ranks[self.rank]} cannot reach the other ranks of its process group: "
                f"one has ended, or did not come within the group's timeout ({error})"
            ) from error


def _host_group(group: Any) -> Any:
    """A gloo group of the same processes, with the same timeout."""
    backends = [group._get_backend(device) for device in group._device_types]
    timeouts = [backend.options._timeout for backend in backends if hasattr(backend, "options")]
    ranks = dist.get_process_group_ranks(group)
    made: Any = dist.new_group(
        ranks,
        timeout=min(timeouts, default=None),
        backend="gloo",
        # Processes outside of the group do not come here. Where there are none, the usual way: the
        # local one hung with torch 2.11 after other groups had been made.
        use_local_synchronization=len(ranks) < dist.get_world_size(),
    )
    return made


def _checksum(parameter: Tensor) -> Tensor:
    """Sum of the bits, wrapping around, as a 0-dim int64 tensor."""
    values = parameter.detach()
    if values.is_complex():
        values = torch.view_as_real(values)
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return values.view(integers[values.element_size()]).sum(dtype=torch.int64)


def fingerprint(content: bytes) -> str:
    """64 bits in 16 hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def shard_groups(parameter: Tensor) -> tuple[Any, ...]:
    """The groups over which a DTensor's elements are spread; none for other tensors."""
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return ()
    placements: Iterable[Any] = parameter.placements  # type: ignore[attr-defined]
    spread = [dim for dim, placement in enumerate(placements) if not placement.is_replicate()]
    return tuple(mesh.get_group(dim) for dim in spread)


def sum_over(groups: tuple[Any, ...], value: Tensor) -> None:
    """Add up `value` over the groups, in place."""
    for group in groups:
        dist.all_reduce(value, group=group)
