"""Processes that share every batch: whose rows are whose, and what they exchange."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["add_up", "any_of", "count", "gather", "group", "own_rows", "rank"]


def rank() -> int:
    """This process's number, from 0; 0 outside of a process group."""
    return dist.get_rank() if _in_group() else 0


def count() -> int:
    """How many processes there are; 1 outside of a process group."""
    return dist.get_world_size() if _in_group() else 1


def group() -> Any:
    """The process group to average gradients over; None where this process is alone."""
    return dist.group.WORLD if count() > 1 else None


def own_rows(n: int) -> slice:
    """This process's part of ``n`` rows; the parts are consecutive, their sizes differ by 1."""
    least, rest = divmod(n, count())
    start = rank() * least + min(rank(), rest)
    return slice(start, start + least + (rank() < rest))


def gather(own: Tensor) -> Tensor:
    """The rows of all processes, in the order of their ranks.

    A loss L of all rows has the same value on every process. Its backward pass stops at this
    process's own rows, with their gradient times the number R of processes, so that with z_r the
    rows of rank r the mean over the processes is the gradient of L alone::

        1/R · Σ_r (∂z_r/∂θ)ᵀ (R · ∂L/∂z_r) = dL/dθ

    Args:
        own: [n, ...]; n may differ from process to process, and be 0.

    Returns:
        [Σ n, ...]; ``own`` itself where the process is alone.
    """
    return _Gather.apply(own) if count() > 1 else own


def add_up(own: Tensor) -> Tensor:
    """Sum of a tensor over all processes; the backward pass adds up the gradients alike."""
    total: Tensor = _Sum.apply(own)
    return total


def any_of(said: bool) -> bool:
    """Whether any process says so; the same answer on all, which have to ask at one time."""
    if count() == 1:
        return said
    flag = torch.tensor(int(said))
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        lengths = [torch.zeros((), dtype=torch.int64) for _ in range(count())]
        dist.all_gather(lengths, torch.tensor(len(own)))
        sizes = [int(length) for length in lengths]
        start = sum(sizes[: rank()])
        ctx.rows = slice(start, start + len(own))
        # Processes exchange equal shapes alone.
        padded = own.new_zeros(max(sizes), *own.shape[1:])
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0][ctx.rows] * count()


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        total = own.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized()
