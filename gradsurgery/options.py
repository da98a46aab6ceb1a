"""What the plugin was asked for beside the method, read and checked once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["REST", "Granularity", "Options", "read_options"]

Granularity = str | Mapping[str, torch.nn.Module | Iterable[Tensor]]
"""What users give: a level, or a mapping from names to modules or parameters."""
REST = "rest"


@dataclass(frozen=True)
class Options:
    """Checked arguments of `AdaptiveGradientSurgery`."""

    scope: str = "shared"
    granularity: str | Mapping[str, torch.nn.Module | list[Tensor]] = "model"
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
        level: str | Mapping[str, torch.nn.Module | list[Tensor]] = _read_modules(granularity)
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


def _read_modules(
    granularity: Mapping[Any, Any],
) -> dict[str, torch.nn.Module | list[Tensor]]:
    """name -> a module, or parameters; a parameter in two of them is refused.

    Modules stay modules: their parameters may be replaced later.
    """
    found: dict[str, torch.nn.Module | list[Tensor]] = {}
    owner: dict[int, str] = {}
    for name, given in granularity.items():
        if not isinstance(name, str) or name == REST:
            raise ValueError(f"granularity must have names other than {REST!r}; got {name!r}")
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
        found[name] = given if isinstance(given, torch.nn.Module) else held
    if not found:
        raise ValueError("granularity is an empty mapping; it needs at least one module")
    return found
