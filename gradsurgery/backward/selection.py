"""Which parameters get rows, and what one call knows of them while they fill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from gradsurgery.backward.tasks import Tasks
from gradsurgery.weights.partition import Parts

__all__ = ["Plan", "select"]


@dataclass
class Plan:
    """One call's parameters with rows, in the order of the rows."""

    targets: list[Tensor]
    reached: list[int]
    """For each of them the tasks whose gradient has arrived, bit t for task t."""
    leaves: list[Tensor]
    """Every tensor whose `grad` the call sets."""
    inputs: list[Tensor] = field(default_factory=list)
    """Leaves that are no parameters, and get the plain sum beside the rows."""
    beside: int = 0
    """How many targets, the last ones, have a row that needs no weights."""

    def operated(self, scope: str) -> list[bool]:
        """For each target with rows of all tasks whether it is under surgery."""
        least = 2 if scope == "shared" else 1
        with_rows = self.reached[: len(self.reached) - self.beside]
        return [mask.bit_count() >= least for mask in with_rows]

    def reach(self) -> dict[int, int]:
        """id(parameter) -> the tasks whose gradient has arrived."""
        return dict(zip(map(id, self.targets), self.reached, strict=True))


def select(
    parameters: Sequence[Tensor],
    tasks: Tasks,
    parts: Parts,
    *,
    scope: str,
    held: Sequence[Tensor],
    gather: bool,
    last_reach: Mapping[int, int],
) -> tuple[list[Tensor], list[int]]:
    """The parameters that need rows, and sort keys that put those with equal weights side by side.

    With scope="shared" a head needs no rows: autograd gives it its own task's gradient. It gets
    them where a micro-batch still to come, or a node that hides what it reaches, may bring in a
    second task.

    Args:
        parameters: all of them.
        tasks: of the call.
        parts: of the model.
        scope: "shared" or "all".
        held: the parameters whose rows hold micro-batches; they keep their rows.
        gather: whether the next call adds to this one's rows, or this one to the last one's.
        last_reach: id(parameter) -> the tasks that arrived in the last call.
    """
    everything = scope == "all"
    needed = 1 if gather or everything else 2
    captured = {id(p): p for p in held}
    for p in parameters:
        if tasks.reach[id(p)].bit_count() >= needed or tasks.opaque:
            captured[id(p)] = p
    # What an opaque node reached last time is the best guess at what it will reach now. A wrong
    # guess costs a few more calls of the kernels, never a wrong result.
    guesses = [tasks.reach.get(key, 0) | last_reach.get(key, tasks.opaque) for key in captured]
    chosen = list(captured.values())
    sort_keys = [
        part if everything or guess.bit_count() >= 2 else len(parts)
        for part, guess in zip(parts.of(chosen), guesses, strict=True)
    ]
    return chosen, sort_keys
