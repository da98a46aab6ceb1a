"""What `backward` must leave in p.grad, for every option, from `torch.autograd.grad` alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradsurgery.methods import Method


class Definition:
    """A plugin over its own parameters; `parts`: a list of them for each part, or None."""

    def __init__(self, own: Any, method: Method, parts: Any, scope: str, every: int) -> None:
        self.own, self.method, self.parts, self.scope, self.every = own, method, parts, scope, every
        self.generator = torch.Generator().manual_seed(0)
        self.known: list[str] = []  # every task ever seen, in the order of first sight
        self.kept: Any = ([], None, 0)  # tasks and weights of the last solve, and its age
        self.rows: dict[str, Any] = {}  # task -> leaf -> gradient, of this step
        self.weights: Tensor | None = None

    def backward(
        self, losses: Mapping[str, Tensor | None], leaves: Sequence[Tensor], h: Any,
        features: Sequence[Tensor], accumulate: bool,
    ) -> dict[Tensor, Tensor]:  # fmt: skip
        """The gradient of every leaf that a task reaches; `h` is the metric of each parameter."""
        given = {name: loss for name, loss in losses.items() if loss is not None}
        self.known += [name for name in losses if name not in self.known]
        for name, loss in given.items():
            row = self.rows.setdefault(name, {})
            wanted = [*leaves, *features]
            found = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
            for leaf, g in zip(wanted, found, strict=True):
                if g is not None:
                    row[leaf] = row.get(leaf, 0.0) + g
        names = [name for name in self.known if name in self.rows]
        reached = {p: [n for n in names if p in self.rows[n]] for p in (*leaves, *features)}
        least = 2 if self.scope == "shared" else 1
        operated = dict.fromkeys(p for p in self.own if len(reached.get(p, ())) >= least)
        if self.weights is None and (self.method.known_beforehand or not accumulate):
            values = torch.stack([given[name].detach() for name in names])
            measured = [z for z in features if len(reached[z]) > 1] if features else operated
            self.weights = self._weigh(names, values, measured, h)
        if accumulate:
            return {}
        weights, rows, self.weights, self.rows = self.weights, self.rows, None, {}
        grads = {}
        for leaf in leaves:
            by_weights = leaf in operated and len(names) > 1
            own = weights[self._part(leaf)] if by_weights and weights.dim() == 2 else weights
            w = dict(zip(names, own, strict=False)) if by_weights else dict.fromkeys(names, 1.0)
            terms = [w[name] * rows[name][leaf] for name in reached[leaf]]
            if terms:
                grads[leaf] = sum(terms[1:], terms[0])
        return grads

    def _weigh(self, names: list[str], values: Tensor, measured: Any, h: Any) -> Tensor:
        if len(names) == 1:
            return torch.ones(1, dtype=torch.float64)
        if self.kept[0] == names and self.kept[2] + 1 < self.every:
            self.kept = (*self.kept[:2], self.kept[2] + 1)
            return self.kept[1]
        whole = self.parts is None or self.method.known_beforehand
        gram = torch.zeros(1 if whole else len(self.parts), len(names), len(names)).double()
        for p in measured:
            g = torch.stack([self.rows[n].get(p, torch.zeros_like(p)).flatten() for n in names])
            scaled = g * h[p].flatten() if p in h else g
            gram[0 if whole else self._part(p)] += scaled @ g.T
        gram = gram[0] if whole else gram
        with self.method.only([self.known.index(n) for n in names], len(self.known)):
            w = self.method.weights(gram, losses=values, generator=self.generator)
        self.kept = names, w, 0
        return w

    def _part(self, p: Tensor) -> int:
        return next(i for i, part in enumerate(self.parts) if any(p is q for q in part))
