"""What PCGrad, AGS and GradVac share: the walk over pairs of tasks in random order."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gradsurgery.kernels._backend import on_triton, with_fallback

__all__ = ["divide_or_zero", "draw_orders", "visits"]


def divide_or_zero(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, and 0 where the denominator is 0 (a zero gradient: nothing to do)."""
    zero = denominator == 0
    return torch.where(zero, 0.0, numerator / torch.where(zero, 1.0, denominator))


def draw_orders(
    shape: torch.Size,
    device: torch.device,
    *,
    shared: bool,
    generator: torch.Generator | None,
) -> Tensor:
    """In which order each task i meets the others.

    Args:
        shape: [..., T], one set of orders per leading index.
        device: where the orders are used.
        shared: one order for every i (the authors' AGS script) or a fresh one each (PCGrad).
        generator: where the randomness comes from. With T <= 2 the order cannot matter, and
            nothing is drawn.

    Returns:
        [..., T, T] int64: row i lists all tasks, in the order in which i meets them.
    """
    count = shape[-1]
    if count <= 2:
        return torch.arange(count, device=device).expand(*shape, count)
    host = generator is None or generator.device.type == "cpu"
    if host and on_triton(device, count):
        seed = torch.randint(2**31, (), generator=generator)
        drawn: Tensor = _orders_on_device(seed, list(shape), device, shared)
        return drawn
    return _shuffle(shape, device, shared, generator)


def _shuffle(
    shape: torch.Size, device: torch.device, shared: bool, generator: torch.Generator | None
) -> Tensor:
    rows, count = 1 if shared else shape[-1], shape[-1]
    source = generator.device if generator is not None else torch.device("cpu")
    noise = torch.rand(
        *shape[:-1], rows, count, generator=generator, dtype=torch.float64, device=source
    )
    # A few hundred bytes from the host: queued, not waited for.
    return noise.argsort(dim=-1).expand(*shape, count).to(device, non_blocking=True)


# The host draws one number; a copy of the orders themselves could not be captured in a CUDA graph.
@torch.library.custom_op("gradsurgery::draw_orders", mutates_args=())
def _orders_on_device(seed: Tensor, shape: list[int], device: torch.device, shared: bool) -> Tensor:
    from gradsurgery.kernels import triton_tasks

    size, start = torch.Size(shape), int(seed)
    return with_fallback(
        lambda: triton_tasks.draw_orders(size, device, shared=shared, seed=start),
        lambda: _shuffle(size, device, shared, torch.Generator().manual_seed(start)),
    )


@_orders_on_device.register_fake
def _(seed: Tensor, shape: list[int], device: torch.device, shared: bool) -> Tensor:
    return torch.empty(*shape, shape[-1], dtype=torch.int64, device=device)


def visits(gram: Tensor, orders: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Walk all rows i at once through their orders: T steps, whatever the batch.

    Rows do not depend on each other, because every projection is onto an ORIGINAL gradient.

    Yields:
        For each step: `partner` [..., T, 1], the j that row i meets; `column` [..., T, T], row i
        holding M[:, j]; `square` [..., T], M_jj; `other` [..., T], True where j is not i.
    """
    count = gram.shape[-1]
    itself = torch.arange(count, device=gram.device)
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    for step in range(count):
        partner = orders[..., step]
        # M is symmetric: row j serves as column j.
        column = gram.gather(-2, partner[..., None].expand_as(gram))
        yield partner[..., None], column, diagonal.gather(-1, partner), partner != itself
