"""Running state of methods: tensors that go from step to step, and into checkpoints as text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradsurgery.methods._base import Method

__all__ = ["Adam", "RunningMethod", "extended", "narrowed", "put_back", "softmax_of", "there_of"]


class RunningMethod(Method):
    """A method whose next weights depend on earlier steps.

    A subclass names its state in `_fields`, starts every call of `solve` with `_begin`, and writes
    new values with `_move`: in place, as a captured CUDA graph reads and writes the same memory at
    every replay, and without asking the device for anything.
    """

    _fields: ClassVar[dict[str, int]] = {}
    """Name -> how many dimensions of size T it ends with."""

    _start: ClassVar[dict[str, float]] = {}
    """Name -> what every element of it is before the task's first step; others are 0."""

    def __init__(self) -> None:
        self._state: dict[str, Tensor] = {}

    def check(self, shape: torch.Size, *, grow: bool = False) -> None:
        """Raise ValueError where the state is of other tasks."""
        for name, dims in self._fields.items():
            held = self._state.get(name)
            if held is None or not dims:
                continue
            known = held.shape[: held.dim() - dims + 1]
            if known != shape and not (grow and known[:-1] == shape[:-1] and known < shape):
                raise ValueError(
                    f"{type(self).__name__} keeps running state for every task: it has seen tasks "
                    f"of shape {list(known)} and now gets {list(shape)}; use a new "
                    f"{type(self).__name__}() where the number of tasks changes"
                )

    def starts(self) -> dict[str, float]:
        """Name -> what every element of it is before the task's first step; others are 0."""
        return self._start

    @contextmanager
    def only(self, present: Sequence[int], total: int) -> Iterator[None]:
        """Within, the state is that of some tasks; it is put back among the others' in the end."""
        held = dict(self._state)
        whole = {
            name: extended(state, self._fields[name], total, self.starts().get(name, 0.0))
            for name, state in held.items()
        }
        self._state = {
            name: narrowed(state, self._fields[name], present) for name, state in whole.items()
        }
        try:
            yield
            for name, part in self._state.items():
                dims = self._fields[name]
                if name not in whole:
                    shape = part.shape[: part.dim() - dims] + (total,) * dims
                    whole[name] = part.new_full(shape, self.starts().get(name, 0.0))
                put_back(whole[name], part, dims, present)
            self._state = whole
        except BaseException:
            self._state = held
            raise

    def _begin(self, gram: Tensor) -> dict[str, Tensor]:
        """The state as it is, on the device of M; at the first call new.

        Args:
            gram: [..., T, T].
        """
        batch, count = gram.shape[:-2], gram.shape[-1]
        for name, dims in self._fields.items():
            held = self._state.get(name)
            if held is None:
                shape = (*batch, *[count] * dims)
                start = self.starts().get(name, 0.0)
                held = gram.new_full(shape, start, dtype=torch.float64)
            self._state[name] = held.to(gram.device, non_blocking=True)
        return self._state

    def _move(self, valid: Tensor, **values: Tensor) -> None:
        """Take new values where `valid` [...]; a step that is not finite moves nothing."""
        for name, value in values.items():
            held = self._state[name]
            mask = valid.reshape(valid.shape + (1,) * (held.dim() - valid.dim()))
            held.copy_(torch.where(mask, value, held))

    def state_dict(self) -> dict[str, Any]:
        # Text, and always there: distributed checkpoints load only entries, down to the elements
        # of a list, that they find in the optimizer they load into, which knows no T before a step.
        return {
            name: json.dumps(self._state[name].tolist()) if name in self._state else ""
            for name in self._fields
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = {}
        for name in self._fields:
            given = state.get(name)
            # GradVac's in version 1 of the state was a list, or None.
            values = json.loads(given) if isinstance(given, str) and given else given or None
            if values is not None:
                self._state[name] = torch.tensor(values, dtype=torch.float64)

    def snapshot(self) -> dict[str, Any]:
        return super().snapshot() | {
            "_state": {name: value.clone() for name, value in self._state.items()}
        }

    def restore(self, taken: dict[str, Any]) -> None:
        before = taken["_state"]
        super().restore({name: value for name, value in taken.items() if name != "_state"})
        for name, value in before.items():
            held = self._state.get(name)
            if held is not None and held.shape == value.shape:
                held.copy_(value)
            else:
                self._state[name] = value
        for name in self._state.keys() - before.keys():
            del self._state[name]


def there_of(losses: Tensor) -> tuple[Tensor, Tensor]:
    """Which tasks have a value, [..., T], and whether the weights can be known, [..., 1].

    A loss that is NaN, as a mean over no samples is, says nothing about the other tasks, which are
    weighed without it. If its gradient is NaN as well, the combined one is, whatever its weight. An
    infinite loss is an overflow: no weight is finite. With either no running state moves, as the
    step may turn out to be skipped.
    """
    there = ~losses.isnan()
    valid = there.any(-1, keepdim=True) & ~losses.isinf().any(-1, keepdim=True)
    return there, valid


def softmax_of(logits: Tensor, there: Tensor, valid: Tensor) -> Tensor:
    """Softmax over the tasks that are there, 0 for the others; NaN where it cannot be known."""
    weights = torch.where(there, logits, -torch.inf).softmax(-1)
    return torch.where(valid, weights, torch.nan)


def extended(state: Tensor, dims: int, total: int, start: float) -> Tensor:
    """The state with room for new tasks, which begin at `start`; a tensor of its own."""
    if not dims or state.shape[-1] == total:
        return state.clone()
    shape = state.shape[: state.dim() - dims] + (total,) * dims
    grown = state.new_full(shape, start)
    part = grown
    for dim in range(state.dim() - dims, state.dim()):
        part = part.narrow(dim, 0, state.shape[dim])
    part.copy_(state)
    return grown


def narrowed(state: Tensor, dims: int, present: Sequence[int]) -> Tensor:
    """The part that belongs to some tasks, copied."""
    index = torch.tensor(present, device="cpu").to(state.device, non_blocking=True)
    for dim in range(state.dim() - dims, state.dim()):
        state = state.index_select(dim, index)
    return state


def put_back(state: Tensor, part: Tensor, dims: int, present: Sequence[int]) -> None:
    """Undo `narrowed`, in place."""
    index = torch.tensor(present, device="cpu").to(state.device, non_blocking=True)
    if dims == 0:
        state.copy_(part)
    elif dims == 1:
        state[..., index] = part.to(state.device, non_blocking=True)
    else:
        state[..., index[:, None], index] = part.to(state.device, non_blocking=True)


class Adam:
    """One step of Adam on a method's own parameters [..., T], as a pure function of its state.

    Source: Kingma and Ba, arXiv 1412.6980, algorithm 1; weight decay is added to the gradient.
    """

    fields: ClassVar[dict[str, int]] = {"mean": 1, "square": 1, "steps": 1}

    @staticmethod
    def step(
        state: dict[str, Tensor], value: Tensor, gradient: Tensor, lr: float, decay: float = 0.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The new value, and the new `mean`, `square` and `steps`."""
        gradient = gradient + decay * value
        steps = state["steps"] + 1
        mean = 0.9 * state["mean"] + 0.1 * gradient
        square = 0.999 * state["square"] + 0.001 * gradient.square()
        size = (square / (1 - 0.999**steps)).sqrt() + 1e-8
        moved = value - lr * mean / (1 - 0.9**steps) / size
        return moved, {"mean": mean, "square": square, "steps": steps}
