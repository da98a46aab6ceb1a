"""Lightning's Trainer and Fabric train as the bare loop does, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from bare_loop import BATCHES, SIZE, Net, assert_same, bare_loop, epochs, inputs, plugin
from bare_loop import one_thread as one_thread
from lightning.fabric.plugins import MixedPrecision as FabricMixedPrecision
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.utils.data import DataLoader

from gradsurgery import AdaptiveGradientSurgery

pytestmark = [
    # torch deprecates what Lightning's loop imports from torch.utils._pytree.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    # Its advice on worker processes, on machines with more cores.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]

PRECISIONS = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16}


def scaler() -> torch.amp.GradScaler:
    """One that grows on the way."""
    return torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=4)


def decay(optimizer: Any) -> Any:
    """A schedule that changes at every step."""
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


class Module(lightning.LightningModule):
    """Manual optimization: `backward(losses)` on what `self.optimizers()` returns."""

    def __init__(
        self, micro: int = 1, clip: float | None = None, fused: bool | None = None
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net, self.micro, self.clip, self.fused = Net(), micro, clip, fused

    def configure_optimizers(self) -> Any:
        """The plugin and a schedule over it."""
        optimizer = plugin(self.net, fused=self.fused)
        return {"optimizer": optimizer, "lr_scheduler": decay(optimizer)}

    def training_step(self, x: Tensor, index: int) -> None:
        """One batch."""
        optimizer: Any = self.optimizers()
        assert isinstance(optimizer, AdaptiveGradientSurgery)
        losses = {name: loss / self.micro for name, loss in self.net.losses(x).items()}
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            losses = {name: scaler.scale(loss) for name, loss in losses.items()}
        last = (index + 1) % self.micro == 0
        optimizer.backward(losses, accumulate=not last)
        if last:
            optimizer.step()
            self.lr_schedulers().step()
            optimizer.zero_grad()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Gradients are unscaled here, whatever the precision."""
        if self.clip is not None:
            self.clip_gradients(optimizer, self.clip, "norm")


def fit(module: Any, count: int, checkpoint: Path | None = None, **options: Any) -> Any:
    """Train up to so many epochs, from a checkpoint or from the start."""
    trainer = lightning.Trainer(
        max_epochs=count,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, DataLoader(inputs(), batch_size=SIZE), ckpt_path=checkpoint)
    return trainer


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("micro", "clip"), [(1, None), (3, 0.5)])
def test_trainer(precision: Any, micro: int, clip: float | None) -> None:
    """Precision, micro-batches, clipping and a schedule together."""
    module = Module(micro, clip)
    trainer = fit(module, 2, precision=precision)
    assert trainer.global_step == 2 * BATCHES // micro
    twin, optimizer = bare_loop(
        epochs(2),
        micro=micro,
        clip=clip,
        precision=PRECISIONS[precision],
        scheduler=decay,
    )
    assert_same(module.net.state_dict(), twin.state_dict())
    assert_same(trainer.optimizers[0].state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("fused", [None, True])
def test_trainer_with_a_scaler(fused: bool | None) -> None:
    """manual_backward is by-passed, so losses are scaled by hand; the step unscales and updates."""
    ours, clip = scaler(), None if fused else 0.5
    module = Module(2, clip, fused)
    fit(module, 3, plugins=[MixedPrecision("16-mixed", "cpu", ours)])
    assert ours.get_scale() == 2.0**14
    twin = Net()
    bare_loop(
        epochs(3),
        model=twin,
        optimizer=plugin(twin, fused=fused),
        micro=2,
        clip=clip,
        precision=torch.float16,
        scaler=scaler(),
        scheduler=decay,
    )
    assert_same(module.net.state_dict(), twin.state_dict())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_resume(precision: Any, tmp_path: Path) -> None:
    """One epoch, a checkpoint, another process's objects, two more: as if never interrupted."""
    whole = Module(clip=0.5)
    uninterrupted = fit(whole, 3, precision=precision)
    path = tmp_path / "first.ckpt"
    fit(Module(clip=0.5), 1, precision=precision).save_checkpoint(path)
    resumed = Module(clip=0.5)
    with torch.no_grad():
        resumed.net.trunk.weight.zero_()
    trainer = fit(resumed, 3, path, precision=precision)
    assert_same(resumed.net.state_dict(), whole.net.state_dict())
    assert_same(trainer.optimizers[0].state_dict(), uninterrupted.optimizers[0].state_dict())
    torch.load(path, weights_only=True)


class Plain(lightning.LightningModule):
    """Automatic optimization on the sum, no plugin."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def configure_optimizers(self) -> Any:
        """As the plugin's base."""
        return torch.optim.AdamW(self.net.parameters(), lr=0.01)

    def training_step(self, x: Tensor, index: int) -> Tensor:
        """The sum."""
        return torch.stack(list(self.net.losses(x).values())).sum()


class Operated(Module):
    """The same parameters and no schedule, with the plugin."""

    def configure_optimizers(self) -> Any:
        """No schedule, as in `Plain`."""
        return plugin(self.net)

    def training_step(self, x: Tensor, index: int) -> None:
        """One batch."""
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        optimizer.backward(self.net.losses(x))
        optimizer.step()


def test_a_plain_checkpoint_goes_on_with_surgery(tmp_path: Path) -> None:
    """One epoch of plain automatic optimization, resumed as manual optimization with the plugin."""
    module = Plain()
    trainer = fit(module, 1)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    optimizer = plugin(module.net)
    optimizer.load_state_dict(trainer.optimizers[0].state_dict())
    optimizer.zero_grad()
    resumed = Operated()
    fit(resumed, 2, tmp_path / "plain.ckpt")
    bare_loop(epochs(1), model=module.net, optimizer=optimizer)
    assert_same(resumed.net.state_dict(), module.net.state_dict())


# ------------------------------------------------------------------ Fabric


def fabric_pair(fabric: lightning.Fabric) -> tuple[Any, Any]:
    """Model and plugin, set up."""
    net = Net()
    return fabric.setup(net, plugin(net))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_fabric(precision: Any, tmp_path: Path) -> None:
    """Losses from a method of the model under fabric.autocast(); saved and loaded in the middle."""
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision=precision)

    def run(model: Any, optimizer: Any, batches: list[Tensor]) -> None:
        for x in batches:
            with fabric.autocast():
                losses = model.losses(x)
            optimizer.zero_grad()
            optimizer.backward(losses)
            fabric.clip_gradients(model, optimizer, max_norm=0.5)
            optimizer.step()

    model, optimizer = fabric_pair(fabric)
    run(model, optimizer, epochs(1))
    fabric.save(tmp_path / "half.ckpt", {"model": model, "optimizer": optimizer})
    model, optimizer = fabric_pair(fabric)
    fabric.load(tmp_path / "half.ckpt", {"model": model, "optimizer": optimizer})
    run(model, optimizer, epochs(1))
    twin, plain = bare_loop(epochs(2), clip=0.5, precision=PRECISIONS[precision])
    assert_same(model.module.state_dict(), twin.state_dict())
    assert_same(optimizer.state_dict(), plain.state_dict())


def test_fabric_refuses_what_went_through_its_module_under_mixed_precision() -> None:
    """Its hook on the outputs asks for fabric.backward: a clear error, and p.grad untouched."""
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    model, optimizer = fabric_pair(fabric)
    with pytest.raises(RuntimeError, match=r"fabric\.backward"):
        optimizer.backward(Net.losses_of(model(epochs(1)[0])))
    assert all(p.grad is None for p in model.parameters())


def test_fabric_with_a_scaler() -> None:
    """Losses are scaled by the precision plugin's own scaler; clipping unscales."""
    half = FabricMixedPrecision("16-mixed", "cpu", scaler())
    fabric = lightning.Fabric(accelerator="cpu", devices=1, plugins=[half])
    model, optimizer = fabric_pair(fabric)
    for x in epochs(2):
        with fabric.autocast():
            losses = list(model.losses(x).values())
        optimizer.zero_grad()
        optimizer.backward(half.scaler.scale(losses))
        fabric.clip_gradients(model, optimizer, max_norm=0.5)
        optimizer.step()
    twin, _ = bare_loop(epochs(2), clip=0.5, precision=torch.float16, scaler=scaler())
    assert half.scaler.get_scale() == 2.0**15
    assert_same(model.module.state_dict(), twin.state_dict())
