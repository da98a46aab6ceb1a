"""Refuses parameters that surgery cannot handle, by name and before anything is changed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gradsurgery._graph import GraphSurvey

__all__ = ["check_parameters", "refuse_sparse"]


def check_parameters(optimizer: Optimizer, parameters: Sequence[Tensor], seen: GraphSurvey) -> None:
    """Check what a backward would meet.

    Raises:
        ValueError: a sparse gradient, or gradients of another dtype than the parameter's.
        NotImplementedError: a DTensor.
    """
    sparse = {id(leaf) for leaf in seen.sparse}
    for p in parameters:
        if p.layout != torch.strided or id(p) in sparse:
            raise _sparse_error(p, optimizer)
        if getattr(p, "grad_dtype", None) not in (None, p.dtype):
            raise ValueError(
                f"parameter {_name_of(p, optimizer)} has dtype {p.dtype} and grad_dtype "
                f"{p.grad_dtype}; surgery needs gradients of the parameter's own dtype"
            )
        if hasattr(p, "device_mesh"):
            raise NotImplementedError(
                f"parameter {_name_of(p, optimizer)} is a DTensor; sharded parameters are not "
                "supported in this version"
            )


def refuse_sparse(parameter: Tensor, optimizer: Optimizer) -> RemovableHandle:
    """Watch a parameter whose gradient may turn out sparse, where the graph does not say.

    torch (2.15) adds a fully sparse gradient to a view with an offset at the wrong address, so it
    must not get that far.
    """

    def look(gradient: Tensor | None) -> None:
        if gradient is not None and gradient.layout != torch.strided:
            raise _sparse_error(parameter, optimizer)

    handle: RemovableHandle = parameter.register_hook(look)  # type: ignore[no-untyped-call]
    return handle


def _sparse_error(parameter: Tensor, optimizer: Optimizer) -> ValueError:
    return ValueError(
        f"parameter {_name_of(parameter, optimizer)} gets a sparse gradient, which surgery does "
        "not support; make its layer with sparse=False"
    )


def _name_of(parameter: Tensor, optimizer: Optimizer) -> str:
    for number, group in enumerate(optimizer.param_groups):
        for index, p in enumerate(group["params"]):
            if p is parameter:
                names = group.get("param_names")
                name = f"{names[index]!r}" if names else f"{index} of param_groups[{number}]"
                return f"{name} (shape {list(p.shape)})"
    return f"of shape {list(parameter.shape)}"
