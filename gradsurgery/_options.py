"""What the plugin was asked for beside the method, read and checked once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradsurgery._parameters import name_of

__all__ = ["Granularity", "Options", "Parts", "read_options"]

Granularity = str | Mapping[str, torch.nn.Module | Iterable[Tensor]]
"""What users give; a mapping is read into lists of parameters."""
_REST = "rest"


@dataclass(frozen=True)
class Options:
    """Checked arguments of `AdaptiveGradientSurgery`."""

    scope: str = "shared"
    granularity: str | Mapping[str, list[Tensor]] = "model"
    every: int = 1
    metric: str = "euclidean"

    @property
    def whole(self) -> bool:
        """Whether there is one Gram matrix for all parameters."""
        return isinstance(self.granularity, str) and self.granularity == "model"

    def describe(self) -> dict[str, Any]:
        """Plain values that say the same wherever the same was asked for."""
        asked = self.granularity
        return {
            "scope": self.scope,
            "granularity": asked if isinstance(asked, str) else list(asked),
            "every": self.every,
            "metric": self.metric,
        }


def read_options(scope: object, granularity: object, every: object, metric: object) -> Options:
    """Check them.

    Raises:
        TypeError, ValueError: a wrong argument, by name.
    """
    _one_of("scope", scope, ("shared", "all"))
    if isinstance(granularity, Mapping):
        level: str | Mapping[str, list[Tensor]] = _read_modules(granularity)
    else:
        _one_of("granularity", granularity, ("model", "group", "parameter"), "or a mapping")
        level = str(granularity)
    if isinstance(every, bool) or not isinstance(every, int):
        raise TypeError(f"every must be an int; got {every!r}")
    if every < 1:
        raise ValueError(f"every must be at least 1; got {every}")
    _one_of("metric", metric, ("euclidean", "optimizer"))
    options = Options(str(scope), level, every, str(metric))
    if every > 1 and not options.whole:
        raise ValueError(
            f"every={every} needs granularity='model': one backward pass of a weighted loss gives "
            "all parameters the same weights"
        )
    return options


def _one_of(argument: str, value: object, allowed: tuple[str, ...], more: str = "") -> None:
    if not isinstance(value, str) or value not in allowed:
        choices = " or ".join(map(repr, allowed))
        raise ValueError(f"{argument} must be {choices}{more and ' ' + more}; got {value!r}")


def _read_modules(granularity: Mapping[Any, Any]) -> dict[str, list[Tensor]]:
    """name -> parameters; a parameter in two of them is refused."""
    found: dict[str, list[Tensor]] = {}
    owner: dict[int, str] = {}
    for name, given in granularity.items():
        if not isinstance(name, str) or name == _REST:
            raise ValueError(f"granularity must have names other than {_REST!r}; got {name!r}")
        if not isinstance(given, torch.nn.Module | Iterable) or isinstance(given, Tensor | str):
            raise TypeError(
                f"granularity[{name!r}] must be a module or parameters; got {type(given).__name__}"
            )
        held = list(given.parameters() if isinstance(given, torch.nn.Module) else given)
        for p in held:
            if not isinstance(p, Tensor):
                raise TypeError(f"granularity[{name!r}] holds a {type(p).__name__}, no parameter")
            if owner.setdefault(id(p), name) != name:
                raise ValueError(
                    f"granularity has a parameter of shape {list(p.shape)} in {owner[id(p)]!r} and "
                    f"in {name!r}; each belongs to one part"
                )
        found[name] = held
    if not found:
        raise ValueError("granularity is an empty mapping; it needs at least one module")
    return found


class Parts:
    """Which part of the model each parameter belongs to; without names it is one whole.

    Args:
        names: of the parts.
        index: id(parameter) -> the number of its part; the last where it is not in there.
    """

    def __init__(
        self, names: Sequence[str] = (), index: Mapping[int, int] = MappingProxyType({})
    ) -> None:
        self.names = tuple(names)
        self._index = index

    @classmethod
    def read(cls, options: Options, optimizer: Optimizer, parameters: list[Tensor]) -> Parts:
        """The parts that were asked for."""
        asked = options.granularity
        held = {id(p) for p in parameters}
        index: dict[int, int]
        if isinstance(asked, Mapping):
            names = list(asked)
            index = {id(p): part for part, own in enumerate(asked.values()) for p in own}
            if not held <= index.keys():
                names.append(_REST)
        elif asked == "group":
            names = [
                str(group.get("name", f"group {number}"))
                for number, group in enumerate(optimizer.param_groups)
            ]
            index = {
                id(p): number
                for number, group in enumerate(optimizer.param_groups)
                for p in group["params"]
            }
        else:
            names = [name_of(p, optimizer) for p in parameters]
            index = {id(p): number for number, p in enumerate(parameters)}
        return cls(names, index)

    def of(self, parameter: Tensor) -> int:
        """The number of its part."""
        return self._index.get(id(parameter), max(len(self.names) - 1, 0))
