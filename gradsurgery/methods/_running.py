"""Running state of methods: tensors that go from step to step, and into checkpoints as text."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradsurgery.methods._base import Method

__all__ = ["Adam", "RunningMethod"]


class RunningMethod(Method):
    """A method whose next weights depend on earlier steps.

    A subclass names its state in `_fields`, starts every call of `_solve` with `_begin`, and writes
    new values with `_move`: in place, as a captured CUDA graph reads and writes the same memory at
    every replay, and without asking the device for anything.
    """

    _fields: ClassVar[dict[str, int]] = {}
    """Name -> how many dimensions of size T it ends with."""

    def __init__(self) -> None:
        self._state: dict[str, Tensor] = {}

    def check(self, shape: torch.Size) -> None:
        """Raise ValueError where the state is of other tasks."""
        for name, dims in self._fields.items():
            held = self._state.get(name)
            if held is None or not dims:
                continue
            known = held.shape[: held.dim() - dims + 1]
            if known != shape:
                raise ValueError(
                    f"{type(self).__name__} keeps running state for every task: it has seen tasks "
                    f"of shape {list(known)} and now gets {list(shape)}; use a new "
                    f"{type(self).__name__}() where the number of tasks changes"
                )

    def _begin(self, gram: Tensor, **start: float) -> dict[str, Tensor]:
        """The state as it is, on the device of M; at the first call of the given values.

        Args:
            gram: [..., T, T].
            start: name -> what every element of a new one is; the others start at 0.
        """
        batch, count = gram.shape[:-2], gram.shape[-1]
        for name, dims in self._fields.items():
            held = self._state.get(name)
            if held is None:
                shape = (*batch, *[count] * dims)
                held = gram.new_full(shape, start.get(name, 0.0), dtype=torch.float64)
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
