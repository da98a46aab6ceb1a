"""What the processes that share a DTensor's mesh must have in common."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gradsurgery.distributed.group import Group

__all__ = ["agree_over_mesh"]


def agree_over_mesh(
    known: dict[Any, Group], parameter: Tensor, failure: Exception | None, settings: object
) -> None:
    """`Group.compare` over every dimension of a DTensor's mesh; a failure here is one everywhere.

    Args:
        known: filled with the mesh's groups.
        parameter: a DTensor.
        failure: what went wrong on this rank; raised in the end.
        settings: name -> value.
    """
    mesh: Any = parameter.device_mesh  # type: ignore[attr-defined]
    for dim in range(mesh.ndim):
        group = mesh.get_group(dim)
        if group not in known:
            known[group] = Group(group)
        members = known[group]
        error = None if failure is None else f"{type(failure).__name__}: {failure}"
        try:
            members.compare(members.exchange((error, settings)))
        except (RuntimeError, ValueError) as found:
            if not members.in_step:
                raise
            failure = failure or found
    if failure is not None:
        raise failure
