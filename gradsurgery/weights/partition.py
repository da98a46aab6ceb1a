"""Which part of the model each parameter belongs to (`granularity=`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from gradsurgery.gradients.layout import name_of
from gradsurgery.options import REST, Options

__all__ = ["Partition", "Parts"]


class Parts:
    """The parts of a model; without names it is one whole.

    Args:
        names: of the parts.
        index: id(parameter) -> the number of its part; the last where it is not in there.
    """

    def __init__(self, names: Sequence[str] = (), index: Mapping[int, int] | None = None) -> None:
        self.names = tuple(names)
        self._index = index or {}

    def __len__(self) -> int:
        return max(len(self.names), 1)

    def of(self, parameters: Iterable[Tensor]) -> list[int]:
        """The number of each parameter's part."""
        rest = len(self) - 1
        return [self._index.get(id(p), rest) for p in parameters]


class Partition:
    """Finds the parts, as the optimizer's groups and the named modules are at each call."""

    def __init__(self, options: Options, optimizer: Optimizer) -> None:
        self._asked, self._optimizer = options.granularity, optimizer
        self._key: tuple[object, ...] = ()
        self._parts = Parts()

    @property
    def whole(self) -> bool:
        """Whether there is one Gram matrix for all parameters."""
        return self._asked == "model"

    def parts(self, trainable: Sequence[Tensor], held: Sequence[Tensor] = ()) -> Parts:
        """The parts of these parameters.

        Args:
            trainable: the optimizer's parameters that require grad.
            held: parameters that have rows. One that was frozen after the first micro-batch is
                among them, and belongs to the part that it was in.
        """
        if self.whole:
            return self._parts
        groups = self._optimizer.param_groups
        named = self._named()
        wanted = {id(p) for p in (*trainable, *held)}
        parameters = [p for group in groups for p in group["params"] if id(p) in wanted]
        key = (
            *map(id, parameters),
            *(len(group["params"]) for group in groups),
            *((name, *map(id, own)) for name, own in named.items()),
        )
        if key != self._key:
            self._parts, self._key = self._read(named, parameters), key
        return self._parts

    def _named(self) -> dict[str, list[Tensor]]:
        """The named parts' parameters, as their modules hold them now."""
        if not isinstance(self._asked, Mapping):
            return {}
        return {
            name: list(given.parameters()) if isinstance(given, Module) else given
            for name, given in self._asked.items()
        }

    def _read(self, named: Mapping[str, list[Tensor]], parameters: Sequence[Tensor]) -> Parts:
        groups = self._optimizer.param_groups
        if named:
            names = list(named)
            index = {id(p): part for part, own in enumerate(named.values()) for p in own}
            if not {id(p) for p in parameters} <= index.keys():
                names.append(REST)
        elif self._asked == "group":
            names = [str(group.get("name", f"group {n}")) for n, group in enumerate(groups)]
            index = {id(p): n for n, group in enumerate(groups) for p in group["params"]}
        else:
            names = [name_of(p, self._optimizer) for p in parameters]
            index = {id(p): number for number, p in enumerate(parameters)}
        return Parts(names, index)
