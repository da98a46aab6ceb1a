"""Surgery at a shared representation: T passes through the heads, one through the trunk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradsurgery._graph import GraphSurvey, survey
from gradsurgery.kernels import combine, gram, resolution

__all__ = ["FeatureGradients", "add_to_grad", "check_features"]


def check_features(
    features: object, losses: Sequence[Tensor | None]
) -> tuple[list[Tensor], GraphSurvey]:
    """The features, and the part of the graph between them and the losses.

    Raises:
        TypeError: not a tensor or a sequence of tensors.
        ValueError: a tensor without gradient; one that depends on another one; none that a loss
            depends on.
    """
    given: Any = [features] if isinstance(features, Tensor) else features
    if isinstance(given, Mapping):
        given = list(given.values())
    if not isinstance(given, Iterable) or isinstance(given, str):
        raise TypeError(
            f"features must be a tensor or a sequence of tensors; got {type(features).__name__}"
        )
    tensors = list(given)
    for index, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"features[{index}] must be a tensor; got {type(tensor).__name__}")
        if not tensor.requires_grad:
            raise ValueError(
                f"features[{index}] does not require grad: no gradient goes through it (was it "
                "detached, or computed from frozen parameters only?)"
            )
    if len({id(tensor) for tensor in tensors}) < len(tensors):
        raise ValueError("features has a tensor twice")
    nested = survey(tensors, stops=tensors).stopped
    if nested:
        index = min(nested)
        raise ValueError(
            f"features[{index}] leads to another one of features: its gradient would count twice"
        )
    seen = survey(losses, stops=tensors)
    if not seen.complete:
        raise ValueError("features needs a graph whose depth stays below 10,000 nodes")
    if not seen.stopped and any(loss is not None for loss in losses):
        raise ValueError(
            "no loss depends on features: pass the very tensor that the heads were called with"
        )
    return tensors, seen


class FeatureGradients:
    """The gradients of T losses at the features, and those of leaves beside them.

    Args:
        features: tensors of the graph.
        seen: the graph between losses and features.
        by_weights: ids of leaves that get Σ_t w_t g_t even if one task alone reaches them.
        plain: ids of leaves that get Σ_t g_t whatever reaches them.
        add: takes a leaf's gradient; it may come several times for one leaf.
    """

    def __init__(
        self,
        features: Sequence[Tensor],
        seen: GraphSurvey,
        *,
        by_weights: set[int],
        plain: set[int],
        add: Callable[[Tensor, Tensor], None],
    ) -> None:
        self._features = [(i, z) for i, z in enumerate(features) if i in seen.stopped]
        self._masks = [seen.stopped[i] for i, _ in self._features]
        self._seen = seen
        self._by_weights, self._plain, self._add = by_weights, plain, add
        self._rows: list[Tensor] = []
        self._beside: dict[int, list[tuple[int, Tensor]]] = {}

    def fill(self, losses: Sequence[Tensor | None], *, retain: bool) -> None:
        """One pass per task, down to the features; a head's gradient is added at once."""
        tensors = [z for _, z in self._features]
        # Zero where a task does not come by.
        self._rows = [z.new_zeros((len(losses), z.numel())) for z in tensors]
        for task, loss in enumerate(losses):
            if loss is None:
                continue
            leaves = [leaf for leaf, mask in self._seen.leaves.values() if mask >> task & 1]
            found = torch.autograd.grad(
                loss,
                [*tensors, *leaves],
                retain_graph=retain or self._seen.retain[task],
                allow_unused=True,
            )
            for row, gradient in zip(self._rows, found, strict=False):
                if gradient is not None:
                    row[task].copy_(gradient.reshape(-1))
            for leaf, gradient in zip(leaves, found[len(tensors) :], strict=True):
                if gradient is None:
                    continue
                if self._waits(leaf):
                    self._beside.setdefault(id(leaf), []).append((task, gradient))
                else:
                    self._add(leaf, gradient)

    def gram(self, count: int, device: torch.device) -> tuple[Tensor, float]:
        """M over the features that two or more tasks depend on, and its relative accuracy."""
        total = torch.zeros(count, count, dtype=torch.float64, device=device)
        accuracy = torch.finfo(torch.float64).eps
        for rows, mask in zip(self._rows, self._masks, strict=True):
            if mask.bit_count() < 2:
                continue
            total += gram(rows).to(device, non_blocking=True)
            accuracy = max(accuracy, resolution(rows))
        return total, accuracy

    def weigh(self, weights: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The features and their weighted gradients, to go on with; leaves beside get theirs."""
        combined = []
        for (_, z), rows, mask in zip(self._features, self._rows, self._masks, strict=True):
            if mask.bit_count() < 2:
                # One task's own: nothing to weigh, as for a head.
                combined.append(rows[mask.bit_length() - 1].view(z.shape))
                continue
            factors = weights.to(rows.device, non_blocking=True)
            combined.append(combine(rows, factors, out=rows[0]).view(z.shape))
        for key, terms in self._beside.items():
            leaf = self._seen.leaves[key][0]
            for task, gradient in terms:
                factor = weights[task].to(gradient.device, gradient.dtype, non_blocking=True)
                self._add(leaf, gradient * factor)
        return [z for _, z in self._features], combined

    def _waits(self, leaf: Tensor) -> bool:
        if id(leaf) in self._plain:
            return False
        shared = self._seen.tasks_of(leaf).bit_count() > 1
        return shared or id(leaf) in self._by_weights


def add_to_grad(leaf: Tensor, gradient: Tensor) -> None:
    """As autograd does at a leaf, its hooks included."""
    leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
    hooks: Any = leaf._post_accumulate_grad_hooks
    for hook in list(hooks.values()) if hooks else ():
        hook(leaf)
