"""Measures for `diagnose`: Gram matrices, times and steps, all of it on copies."""

from __future__ import annotations

import copy
import random
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradsurgery.backward.graph import survey
from gradsurgery.backward.losses import Losses, read_losses
from gradsurgery.optimizer import AdaptiveGradientSurgery
from gradsurgery.report import History
from gradsurgery.weights.solver import TaskNames

__all__ = ["TRIED", "LossesOf", "Probe"]

# Batches whose steps are timed and tried with the optimizer: enough for a median.
TRIED = 5

LossesOf = Callable[[nn.Module, Any], Losses]


class Probe:
    """What one call of `diagnose` has seen so far, and how it looks."""

    def __init__(
        self,
        model: nn.Module,
        losses_fn: LossesOf,
        optimizer: torch.optim.Optimizer | None,
        seed: int,
    ) -> None:
        wrapped = isinstance(optimizer, AdaptiveGradientSurgery)
        self.base = optimizer._base if wrapped else optimizer  # type: ignore[union-attr]
        self.original, self.losses_fn, self.seed = model, losses_fn, seed
        # Together, so that the copied optimizer holds the copied parameters.
        self.model, base = copy.deepcopy((model, self.base))
        held = self.model.parameters() if base is None else _parameters(base)
        self.held = [p for p in held if p.requires_grad]
        self.plugin = AdaptiveGradientSurgery(torch.optim.SGD(self.held, lr=0.0), "sum")
        self.names: tuple[str, ...] = ()
        self.grams: list[Tensor] = []
        self.times_ms: dict[str, list[float]] = {"sum": [], "surgery": []}
        self.effects: dict[str, list[Tensor]] = {"sum": [], "ags": []}

    def look(self, number: int, batch: Any) -> None:
        """Measure M at one batch; at the first ones also time and steps."""
        passes = ["sum", "surgery"] if number % 2 else ["surgery", "sum"]
        if number == 0:
            # For nothing: memory and compilers warm up.
            for kind in passes:
                self._pass(kind, number, batch)
        for kind in passes if number < TRIED else ["surgery"]:
            took_ms = self._pass(kind, number, batch)
            self.times_ms[kind].append(took_ms)
        assert self.plugin.last is not None
        gram = self.plugin.last.gram.cpu()
        if not gram.isfinite().all():
            raise ValueError(f"the gradients of batch {number} are not finite")
        self.grams.append(gram)
        if number < TRIED and self.base is not None and gram.any():
            for method, effects in self.effects.items():
                effects.append(self._step(method, number, batch))

    def _pass(self, kind: str, number: int, batch: Any) -> float:
        """Forward and backward, in ms."""
        begin_s = _now_s(self.model)
        with self._losses(self.model, number, batch) as losses:
            if kind == "sum":
                torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
            else:
                with warnings.catch_warnings():
                    # Where nothing is shared `diagnose` says so itself.
                    warnings.simplefilter("ignore")
                    self.plugin.backward(losses)
            return (_now_s(self.model) - begin_s) * 1e3

    def _step(self, method: str, number: int, batch: Any) -> Tensor:
        """g_t·Δθ of one step from here by the optimizer itself, [T]."""
        model, base = copy.deepcopy((self.original, self.base))
        assert base is not None
        plugin = AdaptiveGradientSurgery(base, method, seed=self.seed)
        with History(plugin, step_effect=True) as history:
            with self._losses(model, number, batch) as losses:
                plugin.backward(losses)
                plugin.step()
            return history.read()["effect"][0]

    @contextmanager
    def _losses(self, model: nn.Module, number: int, batch: Any) -> Iterator[dict[str, Tensor]]:
        """Losses of a batch, with the same randomness at every pass over it.

        What their backward adds to p.grad is taken back at the end: of the copy, which is to begin
        without, and of whatever `losses_fn` brings along.
        """
        torch.manual_seed(self.seed + number)
        random.seed(self.seed + number)
        devices = {p.device for p in self.held}
        given = read_losses(self.losses_fn(model, batch), devices, TaskNames())
        names = given.names
        losses = [loss for loss in given.losses if loss is not None]
        if len(names) < 2:
            raise ValueError("losses_fn must return at least two losses: one has no conflicts")
        if self.names not in ((), names):
            raise ValueError(
                f"losses_fn gave the tasks {', '.join(self.names)} before and now "
                f"{', '.join(names)}; they must be the same for every batch"
            )
        self.names = names
        leaves = [leaf for leaf, _ in survey(losses).leaves.values()]
        if not {id(leaf) for leaf in leaves}.isdisjoint(map(id, self.original.parameters())):
            raise ValueError("losses_fn must use the model that it is given, not one from outside")
        earlier = [leaf.grad for leaf in leaves]
        try:
            for leaf in leaves:
                leaf.grad = None
            yield dict(zip(names, losses, strict=True))
        finally:
            for leaf, grad in zip(leaves, earlier, strict=True):
                leaf.grad = grad


def _parameters(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _now_s(model: nn.Module) -> float:
    """The time, when the device has done what it was given."""
    for device in {p.device for p in model.parameters() if p.device.type != "cpu"}:
        torch.accelerator.synchronize(device)
    return time.perf_counter()
