"""Reads the `losses` argument: names, checks, and errors that say what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradsurgery.weights.solver import TaskNames

__all__ = ["Given", "Losses", "loss_values", "read_losses"]

Losses = Sequence[Tensor | None] | Mapping[str, Tensor | None]


@dataclass(frozen=True)
class Given:
    """What `losses` says."""

    tasks: TaskNames
    """All tasks that have been seen, with those of this call."""
    names: tuple[str, ...]
    """The tasks of this call, in the order of `tasks`."""
    losses: list[Tensor | None]
    """None: of this task nothing is here."""


def read_losses(
    losses: Losses,
    devices: set[torch.device],
    known: TaskNames,
    *,
    waiting: Sequence[str] = (),
    keep_absent: bool = False,
) -> Given:
    """Names and losses, checked.

    A task whose loss is None, or that a mapping leaves out, is absent in this call: nothing of it
    is weighed, and what a method keeps of it rests. In a mapping the order of names says nothing.

    Args:
        losses: a sequence of 0-dim tensors, or a mapping from names to them.
        devices: where the parameters under surgery live.
        known: the tasks of earlier calls.
        waiting: the tasks of micro-batches that wait; one that a mapping leaves out counts as None.
        keep_absent: keep tasks that are None: another process may have a sample of them.

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
    named = isinstance(losses, Mapping)
    if isinstance(losses, Mapping):
        names = [str(name) for name in losses]
        tensors: list[Tensor | None] = list(losses.values())
    else:
        names = [f"task_{index}" for index in range(len(losses))]
        tensors = list(losses)
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"losses has two tasks under one name: {', '.join(twice)}")
    for name, loss in zip(names, tensors, strict=True):
        if loss is not None:
            _check_loss(name, loss, devices)
    if not keep_absent and all(loss is None for loss in tensors):
        raise ValueError("losses has None for every task; backward needs at least one loss")
    by_name = dict(zip(names, tensors, strict=True))
    tasks = known.with_tasks(names, named=named)
    order: Sequence[str] = tasks.names
    if waiting:
        fits = named and by_name.keys() <= set(waiting)
        order = waiting if fits else [name for name in order if name in by_name]
    elif keep_absent:
        order = [name for name in order if name in by_name]
    else:
        order = [name for name in order if by_name.get(name) is not None]
    return Given(tasks, tuple(order), [by_name.get(name) for name in order])


def loss_values(losses: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """The losses' values, [T] float64 on a device, without a wait; 0 where there is none."""
    zero = torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(
        [zero if loss is None else loss.detach().to(device, torch.float64) for loss in losses]
    )


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
