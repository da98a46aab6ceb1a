"""The plugin and its definition side by side, on random models, batches and options."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from definition import Definition
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradsurgery import AdaptiveGradientSurgery, methods

pytestmark = [
    pytest.mark.filterwarnings("ignore:no parameter of this optimizer is reached by two"),
    pytest.mark.filterwarnings("ignore:the loss"),
]
# Float64 on both sides: M's sums and the products of weights are rounded in another order, and a
# method may amplify that. A wrong formula is off by a share of the gradient.
TOLERANCE = 1e-6


class Doubled(torch.autograd.Function):
    """A node written in Python: for all that the graph says it may hide something."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Twice x."""
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Twice its gradient."""
        return 2 * gradient


class Net(nn.Module):
    """A trunk of two layers, a head for each task, and what else was drawn."""

    def __init__(self, drawn: random.Random, tasks: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 5)
        self.heads = nn.ModuleList(nn.Linear(5, 1) for _ in range(tasks))
        self.foreign = nn.Linear(5, 5)
        self.between = nn.Linear(5, 1)
        self.tied, self.skip = drawn.random() < 0.3, drawn.random() < 0.3
        self.penalty = drawn.random() < 0.3
        self.node = drawn.choice([None, "function", "checkpoint", "reentrant"])
        self.double()

    def losses(self, x: Tensor, *, plain: bool) -> tuple[dict[str, Tensor], Tensor]:
        """Task -> loss, and the features; `plain`: without nodes that `autograd.grad` refuses."""
        first = self.foreign(self.first(x).tanh())
        z: Tensor = self._through(self.second, first, plain).tanh()
        found = {}
        for t, head in enumerate(self.heads):
            out = head(z) if t or not self.tied else head(z @ self.second.weight)
            if self.skip and t % 2:
                out = out + first.sum(1, keepdim=True) / 9
            if t < 2:
                out = out + self.between(z)
            found[f"task {t}"] = (out - (-2.0) ** t).square().mean() * 3.0**-t
            if self.penalty and t == 1:
                found["task 1"] = found["task 1"] + self.first.weight.square().sum() / 50
        return found, z

    def _through(self, layer: Callable[[Tensor], Tensor], x: Tensor, plain: bool) -> Tensor:
        if self.node == "function":
            return Doubled.apply(layer(x))  # type: ignore[no-any-return, no-untyped-call]
        if self.node == "checkpoint" or (self.node == "reentrant" and not plain):
            use_reentrant = self.node == "reentrant"
            return checkpoint(layer, x, use_reentrant=use_reentrant)  # type: ignore[no-any-return]
        return layer(x)


class Case:
    """Everything about one comparison, from one number."""

    def __init__(self, seed: int) -> None:
        drawn = self.drawn = random.Random(seed)
        torch.manual_seed(seed)
        self.tasks = drawn.choice([1, 2, 2, 3, 3, 4])
        self.net = Net(drawn, self.tasks)
        self.method = drawn.choice(methods.available())
        self.scope = drawn.choice(["shared", "shared", "all"])
        self.every = drawn.choice([1, 1, 2, 3])
        self.granularity = "model"
        self.metric = "euclidean"
        if self.every == 1:
            self.granularity = drawn.choice(["model", "model", "group", "parameter", "modules"])
            self.metric = drawn.choice(["euclidean", "euclidean", "optimizer"])
        plain = self.granularity == "model" and self.metric == "euclidean"
        # Behind features a reentrant checkpoint may hide a parameter that lies beside them too.
        self.features = plain and self.net.node != "reentrant" and drawn.random() < 0.3
        self.micro_batches = drawn.choice([1, 1, 2, 3]) if not self.features else 1
        self.missing = self.micro_batches == 1 and drawn.random() < 0.5
        chosen = not self.features and self.net.node != "reentrant" and drawn.random() < 0.2
        own = [p for name, p in self.net.named_parameters() if not name.startswith("foreign")]
        self.inputs = [p for p in own if drawn.random() < 0.8] if chosen else None
        groups = [list(self.net.first.parameters()), list(self.net.second.parameters())]
        groups.append([p for p in own if all(p is not q for part in groups for q in part)])
        self.own = own
        self.base = torch.optim.Adam([{"params": group} for group in groups], lr=1e-2)
        granularity: Any = self.granularity
        parts: Any = {"group": groups, "parameter": [[p] for p in own]}.get(granularity)
        if granularity == "modules":
            parts = [groups[1], [p for p in own if all(p is not q for q in groups[1])]]
            granularity = {"second": self.net.second}
        self.plugin = AdaptiveGradientSurgery(
            self.base,
            self.method,
            scope=self.scope,
            granularity=granularity,
            every=self.every,
            metric=self.metric,
        )
        rule = methods.resolve(self.method)
        self.definition = Definition(own, rule, parts, self.scope, self.every)

    def __repr__(self) -> str:
        """What was drawn."""
        hidden = ("drawn", "net", "own", "base", "plugin", "definition", "inputs")
        fields = {k: v for k, v in vars(self).items() if k not in hidden}
        net = {k: v for k, v in vars(self.net).items() if k[0] != "_" and k != "training"}
        return f"{fields} {net} inputs={self.inputs is not None}"

    def preconditioner(self) -> dict[Tensor, Tensor]:
        """Of each parameter lr / (sqrt(v) + eps), up to a factor; 1 before the first step."""
        found = {}
        for p in self.own if self.metric == "optimizer" else ():
            state = self.base.state.get(p)
            if state:
                v = state["exp_avg_sq"] / (1 - 0.999 ** float(state["step"]))
                found[p] = 1 / (v.sqrt() + 1e-8)
        return found

    def step(self) -> float:
        """One step of training by both; the largest error beside the gradient's length."""
        absent = ""
        if self.missing and self.tasks > 1 and self.drawn.random() < 0.7:
            absent = f"task {self.drawn.randrange(self.tasks)}"
        wanted: dict[Tensor, Tensor] = {}
        h = self.preconditioner()
        self.plugin.zero_grad()
        self.net.foreign.zero_grad()
        for number in range(self.micro_batches):
            x = torch.randn(6, 4, dtype=torch.float64)
            more = number + 1 < self.micro_batches
            (losses, z), (others, features) = (
                self.net.losses(x, plain=plain) for plain in (True, False)
            )
            names = list(losses)
            self.drawn.shuffle(names)
            if absent and self.drawn.random() < 0.5:
                names.remove(absent)
            there = {name: name != absent for name in names}
            leaves = self.inputs or list(self.net.parameters())
            here = {name: losses[name] if there[name] else None for name in names}
            points = [z] if self.features else []
            wanted = self.definition.backward(here, leaves, h, points, more)
            given = {name: others[name] if there[name] else None for name in names}
            self.plugin.backward(
                given,
                accumulate=more,
                features=features if self.features else None,
                inputs=self.inputs,
            )
        error, size = 0.0, 0.0
        for p in self.net.parameters():
            assert (p.grad is None) == (p not in wanted), (self, p.shape)
            if p.grad is not None:
                error += float((p.grad - wanted[p]).square().sum())
                size += float(wanted[p].square().sum())
        self.plugin.step()
        return (error / max(size, 1e-300)) ** 0.5


def compare(seeds: range) -> float:
    """The largest error of all cases."""
    worst = 0.0
    for seed in seeds:
        case = Case(seed)
        for step in range(4):
            error = case.step()
            worst = max(worst, error)
            assert error <= TOLERANCE, (seed, step, error, case)
    return worst


def test_in_lockstep() -> None:
    print(f"largest relative error of 400 models: {compare(range(400)):.1e}")


@pytest.mark.slow
def test_in_lockstep_for_long() -> None:
    print(f"largest relative error of 6,000 models: {compare(range(1000, 7000)):.1e}")
