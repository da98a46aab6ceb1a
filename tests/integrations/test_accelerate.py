"""Accelerate trains as the bare loop does, to the bit, and resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState, PartialState
from bare_loop import SIZE, Net, assert_same, bare_loop, epochs, inputs, plugin
from bare_loop import one_thread as one_thread
from torch.utils.data import DataLoader

PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(autouse=True)
def _own_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate keeps its precision for the life of the process."""
    for state in (PartialState, AcceleratorState, GradientState):
        monkeypatch.setattr(state, "_shared_state", {})


def decay(optimizer: Any) -> Any:
    """A schedule that changes at every step."""
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


class Run:
    """A model, the plugin, the data and a schedule, prepared."""

    def __init__(self, precision: str, micro: int) -> None:
        self.accelerator = Accelerator(
            cpu=True, mixed_precision=precision, gradient_accumulation_steps=micro
        )
        net = Net()
        optimizer = plugin(net)
        self.model, self.optimizer, self.loader, self.rates = self.accelerator.prepare(
            net, optimizer, DataLoader(inputs(), batch_size=SIZE), decay(optimizer)
        )
        assert self.optimizer.optimizer is optimizer

    def epoch(self) -> None:
        """One pass over the data."""
        accelerator, optimizer = self.accelerator, self.optimizer
        for x in self.loader:
            with accelerator.accumulate(self.model):
                micro = accelerator.gradient_accumulation_steps
                out = self.model(x)
                losses = {name: loss / micro for name, loss in Net.losses_of(out).items()}
                optimizer.optimizer.backward(losses, accumulate=not accelerator.sync_gradients)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
                optimizer.step()
                self.rates.step()
                optimizer.zero_grad()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("micro", [1, 3])
def test_prepared_training(precision: str, micro: int, tmp_path: Path) -> None:
    """Two epochs with save_state and load_state into new objects between them."""
    first = Run(precision, micro)
    first.epoch()
    first.accelerator.save_state(str(tmp_path))
    run = Run(precision, micro)
    with torch.no_grad():
        run.model.trunk.weight.zero_()
    run.accelerator.load_state(str(tmp_path))
    run.epoch()
    twin, optimizer = bare_loop(
        epochs(2), micro=micro, clip=0.5, precision=PRECISIONS[precision], scheduler=decay
    )
    assert_same(run.model.state_dict(), twin.state_dict())
    assert_same(run.optimizer.state_dict(), optimizer.state_dict())


def test_a_scaler_of_accelerate() -> None:
    """fp16 needs a GPU there, but its optimizer with a scaler does not: skipped steps are seen."""
    Accelerator(cpu=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    net = Net()
    optimizer = AcceleratedOptimizer(plugin(net), scaler=scaler)
    for index, x in enumerate(epochs(1)):
        bad = index == 2
        before = net.trunk.weight.detach().clone()
        with torch.autocast("cpu", torch.float16):
            losses = [loss * (float("inf") if bad else 1) for loss in net.losses(x).values()]
        optimizer.zero_grad()
        optimizer.optimizer.backward(scaler.scale(losses))
        optimizer.step()
        assert optimizer.step_was_skipped == bad
        assert torch.equal(before, net.trunk.weight) == bad
    assert scaler.get_scale() == 2.0**11
