"""Refuses parameters that surgery cannot handle, by name and before anything is changed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gradsurgery.backward.graph import GraphSurvey
from gradsurgery.gradients.layout import name_of

__all__ = [
    "check_beside_shards",
    "check_inputs",
    "check_parameters",
    "check_replicated",
    "refuse_inner_backward",
    "refuse_sparse",
    "sparse_error",
]

_PLAIN = {Tensor, torch.nn.Parameter}


def check_parameters(optimizer: Optimizer, parameters: Sequence[Tensor], seen: GraphSurvey) -> None:
    """Check what a backward would meet.

    Raises:
        ValueError: a tensor subclass that wraps other tensors, unless it is a DTensor; a sparse
            gradient, gradients of another dtype than the parameter's, or DTensors
            that are neither sharded nor replicated.
    """
    sparse = {id(leaf) for leaf in seen.sparse}
    for p in parameters:
        if type(p) not in _PLAIN and _keeps_other_memory(p):
            raise ValueError(
                f"parameter {name_of(p, optimizer)} is a {type(p).__name__}, a tensor that keeps "
                "its numbers in tensors of its own: surgery writes gradients into flat memory, and "
                "of such tensors takes DTensors alone; leave this parameter to another optimizer"
            )
        if p.layout != torch.strided or id(p) in sparse:
            raise sparse_error(p, optimizer)
        if getattr(p, "grad_dtype", None) not in (None, p.dtype):
            raise ValueError(
                f"parameter {name_of(p, optimizer)} has dtype {p.dtype} and grad_dtype "
                f"{p.grad_dtype}; surgery needs gradients of the parameter's own dtype"
            )
        placements = getattr(p, "placements", ())
        if any(placement.is_partial() for placement in placements):
            raise ValueError(
                f"parameter {name_of(p, optimizer)} has the placements {placements}; surgery "
                "takes DTensors that are sharded or replicated"
            )


def check_beside_shards(optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
    """Raise ValueError for a plain parameter beside those of `fully_shard`."""
    for p in parameters:
        if not hasattr(p, "device_mesh"):
            raise ValueError(
                f"parameter {name_of(p, optimizer)} is no DTensor while others are: its gradient "
                "would stay this process's own; call fully_shard on the root module too"
            )


def check_inputs(inputs: object) -> None:
    """Check the leaves that are to get a gradient.

    Raises:
        TypeError, ValueError: no sequence of leaf tensors that require grad, or an empty one.
    """
    if isinstance(inputs, Tensor) or not isinstance(inputs, Sequence):
        raise TypeError(
            f"inputs must be a sequence of leaf tensors, or None; got {type(inputs).__name__}"
        )
    if not inputs:
        raise ValueError("inputs is empty; it needs at least one leaf, or None for all of them")
    for index, leaf in enumerate(inputs):
        if not isinstance(leaf, Tensor):
            raise TypeError(f"inputs[{index}] must be a tensor; got {type(leaf).__name__}")
        if not (leaf.is_leaf and leaf.requires_grad):
            raise ValueError(
                f"inputs[{index}] (shape {list(leaf.shape)}) must be a leaf that requires grad"
            )


def _keeps_other_memory(tensor: Tensor) -> bool:
    """Whether a tensor is a wrapper around others, with operations of its own, and no DTensor."""
    if hasattr(tensor, "device_mesh"):
        return False
    own = type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
    return own and not isinstance(tensor, FakeTensor)


def check_replicated(
    optimizer: Optimizer,
    parameters: Sequence[Tensor],
    seen: GraphSurvey,
) -> None:
    """Check what the mean over processes would meet.

    Raises:
        ValueError: a DTensor; a parameter of DistributedDataParallel's own mixed precision; a
            loss that reaches a parameter which this optimizer does not hold.
    """
    for p in parameters:
        if hasattr(p, "device_mesh"):
            raise ValueError(
                f"parameter {name_of(p, optimizer)} is a DTensor, which brings its own mesh: leave "
                "process_group out"
            )
        if hasattr(p, "_mp_param"):
            raise ValueError(
                "DistributedDataParallel's mixed_precision casts gradients in hooks that do not "
                "run here; use torch.autocast"
            )
    own = {id(p) for p in parameters}
    for key, (leaf, _) in seen.leaves.items():
        if key not in own and isinstance(leaf, torch.nn.Parameter):
            raise ValueError(
                f"losses reach a parameter of shape {list(leaf.shape)} that this optimizer does "
                "not hold: with process_group it would get no gradient; add it to this optimizer, "
                "say inputs= which leaves are to get one, or freeze it by requires_grad_(False) "
                "while these losses are computed"
            )


def refuse_inner_backward(parameters: Sequence[Tensor]) -> None:
    """Raise RuntimeError where a node ran a backward of its own, whose gradients went to p.grad."""
    if any(p.grad is not None for p in parameters):
        raise RuntimeError(
            "a node of the graph ran a backward of its own (reentrant checkpointing, reversible "
            "layers), which process_group does not see; use_reentrant=False does without"
        )


def refuse_sparse(parameter: Tensor, optimizer: Optimizer) -> RemovableHandle:
    """Watch a parameter whose gradient may turn out sparse, where the graph does not say.

    torch (2.15) adds a fully sparse gradient to a view with an offset at the wrong address, so it
    must not get that far.
    """

    def look(gradient: Tensor | None) -> None:
        if gradient is not None and gradient.layout != torch.strided:
            raise sparse_error(parameter, optimizer)

    handle: RemovableHandle = parameter.register_hook(look)  # type: ignore[no-untyped-call]
    return handle


def sparse_error(parameter: Tensor, optimizer: Optimizer) -> ValueError:
    return ValueError(
        f"parameter {name_of(parameter, optimizer)} gets a sparse gradient, which surgery does "
        "not support; make its layer with sparse=False"
    )
