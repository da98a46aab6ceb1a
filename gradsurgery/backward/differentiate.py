"""Backward passes: of a weighted sum into p.grad, and of one task into views of a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradsurgery.backward.checks import sparse_error
from gradsurgery.distributed.wrappers import WRAPPED

__all__ = ["backward_weighted", "explained", "fill_views"]

# Elements from which on a gradient is copied as soon as it is there, and its memory goes back at
# once; smaller ones are copied together in the end, by a few operations.
_LARGE = 1 << 16


def backward_weighted(
    losses: Sequence[Tensor],
    factors: Sequence[Tensor],
    plain: Sequence[Tensor],
    weighted: Sequence[Tensor] | None,
    *,
    retain: bool,
) -> None:
    """Add the gradients to `grad`, as autograd does.

    Args:
        losses: 0-dim.
        factors: for each loss its weight, 0-dim, of its dtype and device.
        plain: leaves that get Σ_t ∂L_t. They cost a second pass, over the part of the graph that
            lies before them.
        weighted: leaves that get Σ_t w_t ∂L_t. None: all that there are.
        retain: whether the graph must outlive this.
    """
    some = weighted is None or len(weighted) > 0
    if plain:
        torch.autograd.backward(losses, retain_graph=retain or some, inputs=list(plain))
    if some:
        torch.autograd.backward(
            losses,
            list(factors),
            retain_graph=retain,
            inputs=None if weighted is None else list(weighted),
        )


@contextmanager
def explained() -> Iterator[None]:
    """Say what to do where torch refuses a second backward pass for reasons of its own."""
    try:
        yield
    except RuntimeError as error:
        if "ready only once" in str(error):
            raise ValueError(WRAPPED) from error
        if "donated buffers" not in str(error):
            raise
        raise RuntimeError(
            "a compiled model reuses its saved tensors, and several losses share its graph: "
            "set torch._functorch.config.donated_buffer = False before the model is compiled"
        ) from error


def fill_views(
    losses: Sequence[Tensor],
    factors: Sequence[Tensor] | None,
    targets: Mapping[int, tuple[Tensor, Tensor]],
    inputs: Sequence[Tensor],
    optimizer: Optimizer,
    *,
    keep: bool,
    add: bool,
) -> set[int]:
    """Differentiate the sum of some losses.

    Args:
        losses: 0-dim.
        factors: for each loss a factor of its gradient, 0-dim; None: 1.
        targets: key -> a parameter, and the view that its gradient is copied or added to.
        inputs: other leaves; theirs are added to their `grad`.
        optimizer: for the names in errors.
        keep: whether the graph must outlive this.
        add: whether views hold something that must stay.

    Returns:
        The keys of the parameters that got a gradient.

    Raises:
        ValueError: a gradient is sparse; views are then spoilt.
    """
    streamed: set[int] = set()
    handles = [
        p.register_hook(_divert(p, view, streamed, key, optimizer, add=add))  # type: ignore[no-untyped-call]
        for key, (p, view) in targets.items()
        if p.numel() >= _LARGE and not p._post_accumulate_grad_hooks
    ]
    parameters = [p for p, _ in targets.values()]
    try:
        gradients = torch.autograd.grad(
            losses, [*parameters, *inputs], factors, retain_graph=keep, allow_unused=True
        )
    finally:
        for handle in handles:
            handle.remove()
    views: list[Tensor] = []
    new: list[Tensor] = []
    reached = set(streamed)
    for (key, (p, view)), gradient in zip(targets.items(), gradients, strict=False):
        given = None if key in streamed else _after_hooks(p, gradient)
        if given is not None:
            if given.layout != torch.strided:
                raise sparse_error(p, optimizer)
            views.append(view)
            new.append(given)
            reached.add(key)
    if views:
        operation = torch._foreach_add_ if add else torch._foreach_copy_
        operation(views, new)
    for leaf, local in zip(inputs, gradients[len(parameters) :], strict=True):
        if local is not None:
            leaf.grad = local if leaf.grad is None else leaf.grad + local
    return reached


def _divert(
    parameter: Tensor,
    view: Tensor,
    streamed: set[int],
    key: int,
    optimizer: Optimizer,
    *,
    add: bool,
) -> Callable[[Tensor], Tensor]:
    """The last hook of a parameter: it takes the gradient and passes on next to nothing."""

    def take(gradient: Tensor) -> Tensor:
        if gradient.layout != torch.strided:
            raise sparse_error(parameter, optimizer)
        if add:
            view.add_(gradient)
        else:
            view.copy_(gradient)
        streamed.add(key)
        return gradient.new_zeros(()).expand(gradient.shape)

    return take


def _after_hooks(parameter: Tensor, gradient: Tensor | None) -> Tensor | None:
    """Run the post-accumulate-grad hooks, which `torch.autograd.grad` does not fire."""
    hooks: Any = parameter._post_accumulate_grad_hooks
    if gradient is None or not hooks:
        return gradient
    parameter.grad = gradient
    for hook in list(hooks.values()):
        hook(parameter)
    changed, parameter.grad = parameter.grad, None
    return changed
