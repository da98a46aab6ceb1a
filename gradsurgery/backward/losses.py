"""Reads the `losses` argument: names, checks, and errors that say what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["Losses", "loss_values", "read_losses"]

Losses = Sequence[Tensor | None] | Mapping[str, Tensor | None]


def read_losses(
    losses: Losses,
    devices: set[torch.device],
    *,
    order: Sequence[str] = (),
    absent: bool = False,
) -> tuple[tuple[str, ...], list[Tensor | None]]:
    """Names and losses, checked.

    Args:
        losses: a sequence of 0-dim tensors, or a mapping from names to them.
        devices: where the parameters under surgery live.
        order: the tasks of the last call. Where the same names come in another order, that of the
            last call is kept: running state, and the order that is drawn, belong to names.
        absent: whether None may stand for a task of which this process has no sample.

    Raises:
        TypeError: not a sequence or mapping of tensors.
        ValueError: no losses; a loss that is no real scalar, has no graph, or is on a device that
            holds none of the parameters; two losses under one name.
    """
    if isinstance(losses, Tensor) or not isinstance(losses, Sequence | Mapping):
        raise TypeError(
            "losses must be a sequence of 0-dim tensors or a mapping from names to them, not "
            f"{_describe(losses)}; write backward([loss_a, loss_b])"
        )
    if not losses:
        raise ValueError("losses is empty; backward needs at least one loss")
    if isinstance(losses, Mapping):
        names = tuple(str(name) for name in losses)
        tensors: list[Tensor | None] = list(losses.values())
    else:
        names = tuple(f"task_{index}" for index in range(len(losses)))
        tensors = list(losses)
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"losses has two tasks under one name: {', '.join(twice)}")
    for name, loss in zip(names, tensors, strict=True):
        if loss is not None or not absent:
            _check_loss(name, loss, devices)
    if names != tuple(order) and sorted(names) == sorted(order):
        by_name = dict(zip(names, tensors, strict=True))
        names, tensors = tuple(order), [by_name[name] for name in order]
    return names, tensors


def loss_values(losses: Sequence[Tensor]) -> Tensor:
    """The losses' values, [T] float64 on the first one's device, without waiting for it."""
    device = losses[0].device
    return torch.stack([loss.detach().to(device, torch.float64) for loss in losses])


def _check_loss(name: str, loss: object, devices: set[torch.device]) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(f"losses[{name!r}] must be a tensor; got {_describe(loss)}")
    if loss.dim() != 0:
        raise ValueError(
            f"losses[{name!r}] must be a scalar (0-dim); got shape {list(loss.shape)}: "
            "reduce it with .mean() or .sum()"
        )
    if not loss.is_floating_point():
        raise ValueError(f"losses[{name!r}] must be a real number; got dtype {loss.dtype}")
    if not loss.requires_grad:
        raise ValueError(
            f"losses[{name!r}] has no graph: it does not require grad, so no gradient can come "
            "from it (was it computed under no_grad, detached, or from frozen parameters only?)"
        )
    if devices and loss.device not in devices:
        held = ", ".join(sorted(map(str, devices)))
        raise ValueError(
            f"losses[{name!r}] is on {loss.device}, the parameters under surgery are on {held}"
        )


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return f"{type(value).__name__} {value!r}"
