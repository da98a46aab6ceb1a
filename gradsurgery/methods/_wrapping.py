"""Methods around a method: its state goes along under a prefix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from gradsurgery.methods._base import Method

__all__ = ["Wrapping"]

_INNER = "inner."


class Wrapping(Method):
    """A method that changes another one's weights.

    Attributes:
        method: the other one.
    """

    def __init__(self, method: str | Method) -> None:
        # Here, as the package imports the modules that wrap.
        from gradsurgery.methods import resolve

        self.method = resolve(method)

    def __repr__(self) -> str:
        hidden = ("reads_gram", "reads_losses", "known_beforehand")
        fields = {k: v for k, v in vars(self).items() if k not in hidden and k[0] != "_"}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in fields.items())})"

    def check(self, shape: torch.Size, *, grow: bool = False) -> None:
        self.method.check(shape, grow=grow)

    @contextmanager
    def only(self, present: Sequence[int], total: int) -> Iterator[None]:
        with self.method.only(present, total):
            yield

    def state_dict(self) -> dict[str, Any]:
        return {_INNER + name: value for name, value in self.method.state_dict().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        own = {k.removeprefix(_INNER): v for k, v in state.items() if k.startswith(_INNER)}
        self.method.load_state_dict(own)

    def snapshot(self) -> dict[str, Any]:
        return super().snapshot() | {"method": self.method.snapshot()}

    def restore(self, taken: dict[str, Any]) -> None:
        self.method.restore(taken["method"])
        super().restore({name: value for name, value in taken.items() if name != "method"})
