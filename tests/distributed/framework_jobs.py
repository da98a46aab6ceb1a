"""One training in Lightning, Fabric, Accelerate and the Trainer of transformers, on this rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn
from torch.utils.data import DataLoader
from training import Network, full
from transformers import Trainer, TrainingArguments

from gradsurgery import AdaptiveGradientSurgery

BATCH, STEPS, MICRO = 8, 6, 2


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def plugin(model: nn.Module) -> AdaptiveGradientSurgery:
    """What every framework gets; only the group depends on the number of processes."""
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    group = dist.group.WORLD if dist.is_initialized() else None
    return AdaptiveGradientSurgery(base, "gradvac", process_group=group)


def samples() -> Tensor:
    source = torch.Generator().manual_seed(2)
    return torch.randn(BATCH * STEPS * MICRO, 7, generator=source)


def parts() -> list[Tensor]:
    """This rank's rows of every micro-batch."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return [batch.chunk(size())[rank] for batch in samples().split(BATCH)]


def bare() -> Tensor:
    """No framework, one process."""
    network = Network()
    optimizer = plugin(network)
    for number, x in enumerate(samples().split(BATCH), 1):
        last = number % MICRO == 0
        optimizer.backward([loss / MICRO for loss in network(x)], accumulate=not last)
        if last:
            nn.utils.clip_grad_norm_(network.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    return full(network.parameters())


# ------------------------------------------------------------------ Lightning


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = Network()

    def configure_optimizers(self) -> Any:
        return plugin(self.net)

    def training_step(self, x: Tensor, index: int) -> None:
        optimizer: Any = self.optimizers()
        last = (index + 1) % MICRO == 0
        optimizer.backward([loss / MICRO for loss in self.net(x)], accumulate=not last)
        if last:
            optimizer.step()
            optimizer.zero_grad()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.clip_gradients(optimizer, 0.5, "norm")


def lightning_trainer(path: Path, steps: int = STEPS, resumes: bool = False) -> Tensor:
    """So many steps and a checkpoint, or from a checkpoint after half of them to the end."""
    trainer = lightning.Trainer(
        max_epochs=2 if resumes else 1,
        accelerator="cpu",
        devices=size(),
        strategy="ddp" if size() > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    module = Module()
    data = parts()[STEPS // 2 * MICRO :] if resumes else parts()[: steps * MICRO]
    loader = DataLoader(data, batch_size=None)
    trainer.fit(module, loader, ckpt_path=path if resumes else None)
    if not resumes:
        trainer.save_checkpoint(path)
    return full(module.net.parameters())


def fabric(path: Path) -> Tensor:
    """Half of the steps, a checkpoint into new objects, the rest."""
    runner = lightning.Fabric(accelerator="cpu", devices=size(), strategy="ddp")
    runner.launch()
    for half in (0, 1):
        network = Network()
        model, optimizer = runner.setup(network, plugin(network))
        if half:
            runner.load(path, {"model": model, "optimizer": optimizer})
        first = half * STEPS // 2 * MICRO
        for number, x in enumerate(parts()[first : first + STEPS // 2 * MICRO], 1):
            last = number % MICRO == 0
            optimizer.backward([loss / MICRO for loss in model(x)], accumulate=not last)
            if last:
                runner.clip_gradients(model, optimizer, max_norm=0.5)
                optimizer.step()
                optimizer.zero_grad()
        runner.save(path, {"model": model, "optimizer": optimizer})
    return full(network.parameters())


# ------------------------------------------------------------------ Accelerate


def forget_accelerate() -> None:
    """Accelerate keeps its state for the life of the process."""
    for state in (PartialState, AcceleratorState, GradientState):
        state._shared_state.clear()


def accelerate(folder: Path) -> Tensor:
    """Half of the steps, save_state and load_state into new objects, the rest."""
    for half in (0, 1):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=MICRO)
        network = Network()
        model, optimizer = accelerator.prepare(network, plugin(network))
        if half:
            accelerator.load_state(str(folder))
        first = half * STEPS // 2 * MICRO
        for x in parts()[first : first + STEPS // 2 * MICRO]:
            with accelerator.accumulate(model):
                losses = [loss / MICRO for loss in model(x)]
                optimizer.optimizer.backward(losses, accumulate=not accelerator.sync_gradients)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
        accelerator.save_state(str(folder))
        forget_accelerate()
    return full(network.parameters())


# ------------------------------------------------------------------ transformers


class Wrapped(nn.Module):
    """As the Trainer calls it: columns of the data set by name."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Network()

    def forward(self, x: Tensor) -> list[Tensor]:
        losses: list[Tensor] = self.net(x)
        return losses


class SurgeryTrainer(Trainer):
    def create_optimizer(self, model: Any = None) -> Any:
        if not isinstance(self.optimizer, AdaptiveGradientSurgery):
            self.optimizer = plugin(self.model)
        return self.optimizer

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        model.train()
        losses = model(**self._prepare_inputs(inputs))
        losses = [loss / self.current_gradient_accumulation_steps for loss in losses]
        last = self.accelerator.sync_gradients
        self.optimizer.optimizer.backward(losses, accumulate=not last)
        return torch.stack(losses).sum().detach()

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def transformers(folder: Path, resumes: bool = False) -> Tensor:
    """All steps with a checkpoint after half of them, or from that checkpoint on."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        per_device_train_batch_size=BATCH // size(),
        gradient_accumulation_steps=MICRO,
        num_train_epochs=1,
        lr_scheduler_type="constant",
        max_grad_norm=0.5,
        save_strategy="steps",
        save_steps=STEPS // 2,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        ddp_backend="gloo",
    )
    model = Wrapped()
    data = [{"x": x} for x in samples()]
    SurgeryTrainer(model, arguments, train_dataset=data).train(
        resume_from_checkpoint=str(folder / f"checkpoint-{STEPS // 2}") if resumes else None
    )
    forget_accelerate()
    return full(model.net.parameters())
