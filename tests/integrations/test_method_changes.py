"""Checkpoints that change the method on the way: the optimizer's own state goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bare_loop import Net, assert_same, bare_loop, epochs
from bare_loop import one_thread as one_thread
from torch import Tensor

from gradsurgery import AdaptiveGradientSurgery, methods


class Two(Net):
    """Two tasks: their order, a random stream of each plugin's own, then plays no role."""

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        """Two that conflict."""
        losses = super().losses(x)
        return {name: losses[name] for name in ("near", "far")}


def base(model: Two) -> torch.optim.Optimizer:
    """AdamW, whose moments and step count have to be carried along."""
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def train(model: Two, optimizer: Any) -> None:
    """One epoch, with surgery or on the plain sum."""
    if isinstance(optimizer, AdaptiveGradientSurgery):
        optimizer.zero_grad()
        bare_loop(epochs(1), model=model, optimizer=optimizer)
        return
    for x in epochs(1):
        optimizer.zero_grad()
        torch.stack(list(model.losses(x).values())).sum().backward()
        optimizer.step()


# Plain training, an order that is drawn, running state of each kind, and a state within a state.
SOME = [None, "ags", "cr_mogm", "famo", "gradvac", "sum"]


@pytest.mark.parametrize("between", SOME)
@pytest.mark.parametrize("outside", SOME)
def test_one_method_then_another_and_back(
    outside: str | None, between: str | None, tmp_path: Path
) -> None:
    """Three epochs through files and new objects: as one optimizer that never stopped.

    None is plain training without the plugin, whose checkpoints carry the plugin's entry through.
    A method with running state loses it to another method in between, and only then.
    """
    path = tmp_path / "checkpoint.pt"
    twin = Two()
    plain = base(twin)
    rule: methods.Method | None = None
    for number, method in enumerate((outside, between, outside)):
        model = Two()
        optimizer: Any = base(model)
        if method is not None:
            optimizer = AdaptiveGradientSurgery(optimizer, method=method)
        if number:
            weights, state = torch.load(path, weights_only=True)
            model.load_state_dict(weights)
            optimizer.load_state_dict(state)
        train(model, optimizer)
        torch.save((model.state_dict(), optimizer.state_dict()), path)
        rival: Any = plain
        if method is not None:
            if rule is None or rule.name != method:
                rule = methods.resolve(method)
            rival = AdaptiveGradientSurgery(plain, method=rule)
        train(twin, rival)
        assert_same(model.state_dict(), twin.state_dict())
        assert_same(optimizer.state_dict()["state"], plain.state_dict()["state"])
