"""Surgery at a shared representation: T passes through the heads, one through the trunk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradsurgery.backward.graph import GraphSurvey, survey
from gradsurgery.kernels import combine, gram, relative_error

__all__ = ["FeatureGradients", "SharedFeatures", "add_to_grad"]


class SharedFeatures:
    """The tensors through which tasks share a trunk, and what lies on either side of them.

    Args:
        features: what the user gave: a tensor, or several.
        losses: T of them; None: nothing of that task is here.

    Raises:
        TypeError: not a tensor or a sequence of tensors.
        ValueError: a tensor without gradient; one that depends on another one; none that a loss
            depends on.
    """

    def __init__(self, features: object, losses: Sequence[Tensor | None]) -> None:
        self.tensors = _read(features)
        behind = survey(self.tensors, stops=self.tensors)
        if behind.stopped:
            index = min(behind.stopped)
            raise ValueError(
                f"features[{index}] leads to another one of features: its gradient would count "
                "twice"
            )
        self.heads: GraphSurvey = survey(losses, stops=self.tensors)
        """The graph between losses and features."""
        if not (self.heads.complete and behind.complete):
            raise ValueError("features needs a graph whose depth stays below 10,000 nodes")
        if not self.heads.stopped and any(loss is not None for loss in losses):
            raise ValueError(
                "no loss depends on features: pass the very tensor that the heads were called with"
            )
        self.trunk = behind
        """The graph behind the features; its masks are of features, not of tasks."""
        self.both = self.heads.leaves.keys() & behind.leaves.keys()
        """ids of leaves that losses reach through the features and beside them as well."""

    def tasks_of(self, leaf: Tensor) -> int:
        """The tasks that reach a leaf, through features or beside them."""
        mask = self.heads.tasks_of(leaf)
        through = self.trunk.tasks_of(leaf)
        for index, tasks in self.heads.stopped.items():
            if through >> index & 1:
                mask |= tasks
        return mask


class FeatureGradients:
    """The gradients of T losses at the features, and those of leaves that they reach beside them.

    A leaf that two or more tasks reach, through the features or beside them, gets Σ_t w_t ∂L_t; one
    task's own leaf, its plain gradient. Of a leaf that is reached both ways (tied weights, a skip
    connection, a penalty on the trunk's weights) every task's pass takes the whole gradient,
    through the trunk, and the pass through the trunk leaves it out: no way would count twice.

    Args:
        features: the features.
        weighted: ids of leaves that get Σ_t w_t ∂L_t even if one task alone reaches them.
        plain: ids of leaves that get Σ_t ∂L_t whatever reaches them.
        add: takes a leaf's gradient; it may come several times for one leaf.
    """

    def __init__(
        self,
        features: SharedFeatures,
        *,
        weighted: set[int],
        plain: set[int],
        add: Callable[[Tensor, Tensor], None],
    ) -> None:
        self._shared = features
        heads = features.heads
        self._features = [(i, z) for i, z in enumerate(features.tensors) if i in heads.stopped]
        self._masks = [heads.stopped[i] for i, _ in self._features]
        self._weighted, self._plain, self._add = weighted, plain, add
        self._rows: list[Tensor] = []
        self._waiting: dict[int, list[tuple[int, Tensor]]] = {}

    def fill(self, losses: Sequence[Tensor | None], *, retain: bool) -> None:
        """One pass per task, down to the features; a task's own leaf gets its gradient at once."""
        heads = self._shared.heads
        tensors = [z for _, z in self._features]
        # Zero where a task does not come by.
        self._rows = [z.new_zeros((len(losses), z.numel())) for z in tensors]
        for task, loss in enumerate(losses):
            if loss is None:
                continue
            leaves = [
                leaf for leaf, _ in heads.leaves.values() if self._shared.tasks_of(leaf) >> task & 1
            ]
            found = torch.autograd.grad(
                loss,
                [*tensors, *leaves],
                retain_graph=retain or heads.retain[task] or bool(self._shared.both),
                allow_unused=True,
            )
            for row, gradient in zip(self._rows, found, strict=False):
                if gradient is not None:
                    row[task].copy_(gradient.reshape(-1))
            for leaf, gradient in zip(leaves, found[len(tensors) :], strict=True):
                if gradient is None:
                    continue
                if self._by_weights(leaf):
                    self._waiting.setdefault(id(leaf), []).append((task, gradient))
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
            accuracy = max(accuracy, relative_error(rows))
        return total, accuracy

    def add_beside(self, weights: Tensor) -> None:
        """Give shared leaves beside the features their weighted gradients."""
        for key, terms in self._waiting.items():
            leaf = self._shared.heads.leaves[key][0]
            for task, gradient in terms:
                factor = weights[task].to(gradient.device, gradient.dtype, non_blocking=True)
                self._add(leaf, gradient * factor)

    def passes(
        self, weights: Tensor
    ) -> list[tuple[list[Tensor], list[Tensor], list[Tensor] | None]]:
        """What is to be differentiated through the trunk: (tensors, gradients at them, leaves).

        One pass for all leaves (None) where every leaf behind the features is weighted; else one
        for the weighted ones, and one for those that get the plain sum.
        """
        both = self._shared.both
        behind = self._shared.trunk.leaves.items()
        leaves = [leaf for key, (leaf, _) in behind if key not in both]
        plain = [leaf for leaf in leaves if not self._by_weights(leaf)]
        tensors = [z for _, z in self._features]
        passes: list[tuple[list[Tensor], list[Tensor], list[Tensor] | None]] = []
        if plain:
            # Rows of all tasks add up; at a leaf of one task's own the other rows do not arrive.
            sums = [rows.sum(0).view(z.shape) for z, rows in zip(tensors, self._rows, strict=True)]
            passes.append((tensors, sums, plain))
        if len(plain) < len(leaves) or not behind:
            combined = []
            for z, rows in zip(tensors, self._rows, strict=True):
                factors = weights.to(rows.device, non_blocking=True)
                combined.append(combine(rows, factors, out=rows[0]).view(z.shape))
            weighted = [leaf for leaf in leaves if self._by_weights(leaf)]
            passes.append((tensors, combined, weighted if plain or both else None))
        return passes

    def _by_weights(self, leaf: Tensor) -> bool:
        if id(leaf) in self._plain:
            return False
        return self._shared.tasks_of(leaf).bit_count() > 1 or id(leaf) in self._weighted


def add_to_grad(leaf: Tensor, gradient: Tensor) -> None:
    """As autograd does at a leaf, its hooks included."""
    leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
    hooks: Any = leaf._post_accumulate_grad_hooks
    for hook in list(hooks.values()) if hooks else ():
        hook(leaf)


def _read(features: object) -> list[Tensor]:
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
    return tensors
