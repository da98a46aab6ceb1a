"""The same training in Lightning, Fabric, Accelerate and the Trainer, on this rank."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState, GradientState, PartialState
from framework_data import (
    BATCH,
    CLIP,
    HALF,
    MICRO,
    STEPS,
    check_wrapped,
    labels,
    linear,
    loader,
    plugin,
    samples,
    size,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader
from training import Network, full
from transformers import Trainer, TrainingArguments

from gradsurgery import AdaptiveGradientSurgery

# ------------------------------------------------------------------ Lightning


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = Network()

    def configure_optimizers(self) -> Any:
        optimizer = plugin(self.net)
        return [optimizer], [linear(optimizer)]

    def training_step(self, x: Tensor, index: int) -> None:
        check_wrapped(self.trainer.model)
        optimizer: Any = self.optimizers()
        last = (index + 1) % MICRO == 0
        optimizer.backward([loss / MICRO for loss in self.net(x)], accumulate=not last)
        if last:
            optimizer.step()
            self.lr_schedulers().step()
            optimizer.zero_grad()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.clip_gradients(optimizer, CLIP, "norm")


def lightning_trainer(path: Path, stop: int = STEPS, resumes: bool = False) -> Tensor:
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
    )
    module = Module()
    data = loader(HALF if resumes else 0, stop)
    trainer.fit(module, data, ckpt_path=path if resumes else None)
    if not resumes:
        trainer.save_checkpoint(path)
    return full(module.net.parameters())


def fabric(path: Path) -> Tensor:
    """Half of the steps, a checkpoint into new objects, the rest."""
    runner = lightning.Fabric(accelerator="cpu", devices=size(), strategy="ddp")
    runner.launch()
    for first in (0, HALF):
        network = Network()
        model, optimizer = runner.setup(network, plugin(network))
        check_wrapped(model._forward_module)
        state = {"model": model, "optimizer": optimizer, "rates": linear(optimizer)}
        if first:
            runner.load(path, state)
        batches = runner.setup_dataloaders(loader(first, first + HALF))
        for number, x in enumerate(batches, 1):
            last = number % MICRO == 0
            optimizer.backward([loss / MICRO for loss in model(x)], accumulate=not last)
            if last:
                runner.clip_gradients(model, optimizer, max_norm=CLIP)
                optimizer.step()
                state["rates"].step()
                optimizer.zero_grad()
        runner.save(path, state)
    return full(network.parameters())


# ------------------------------------------------------------------ Accelerate


def fresh_accelerate() -> None:
    """It keeps its state for the life of the process."""
    for state in (PartialState, AcceleratorState, GradientState):
        state._shared_state.clear()


def accelerate(folder: Path) -> Tensor:
    """Half of the steps, save_state and load_state into new objects, the rest."""
    for first in (0, HALF):
        fresh_accelerate()
        accelerator = Accelerator(
            cpu=True,
            gradient_accumulation_steps=MICRO,
            dataloader_config=DataLoaderConfiguration(split_batches=True),
        )
        network = Network()
        optimizer: Any = plugin(network)
        data: Any = samples(first, first + HALF)
        model, optimizer, batches, rates = accelerator.prepare(
            network, optimizer, DataLoader(data, batch_size=BATCH), linear(optimizer)
        )
        check_wrapped(model)
        if first:
            accelerator.load_state(str(folder))
        for x in batches:
            with accelerator.accumulate(model):
                losses = [loss / MICRO for loss in model(x)]
                optimizer.optimizer.backward(losses, accumulate=not accelerator.sync_gradients)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                rates.step()
                optimizer.zero_grad()
        accelerator.save_state(str(folder))
    return full(network.parameters())


# ------------------------------------------------------------------ transformers


class Wrapped(nn.Module):
    """As the Trainer calls it: columns of the data set by name."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Network()

    def forward(self, x: Tensor, labels: Tensor | None = None, **_: Any) -> list[Tensor]:
        losses: list[Tensor] = self.net(x if labels is None else x[labels != -100])
        return losses


class SurgeryTrainer(Trainer):
    def create_optimizer(self, model: Any = None) -> Any:
        if not isinstance(self.optimizer, AdaptiveGradientSurgery):
            self.optimizer = plugin(self.model)
        return self.optimizer

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        check_wrapped(model)
        model.train()
        losses = model(**self._prepare_inputs(inputs))
        factor = 1 / self.current_gradient_accumulation_steps
        if num_items_in_batch is not None:
            count = (inputs["labels"] != -100).sum()
            factor = count * self.accelerator.num_processes / num_items_in_batch
        losses = [loss * factor for loss in losses]
        last = self.accelerator.sync_gradients
        self.optimizer.optimizer.backward(losses, accumulate=not last)
        return torch.stack(losses).sum().detach()

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def transformers(folder: Path, resumes: bool = False, by_items: bool = False) -> Tensor:
    """All steps with a checkpoint after half of them, or from that checkpoint on."""
    fresh_accelerate()
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        per_device_train_batch_size=BATCH // size(),
        gradient_accumulation_steps=MICRO,
        num_train_epochs=1,
        max_grad_norm=CLIP,
        save_strategy="steps",
        save_steps=HALF,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    model = Wrapped()
    data: Any = [{"x": x} for x in samples()]
    if by_items:
        data = [row | {"labels": kind} for row, kind in zip(data, labels(), strict=True)]
    SurgeryTrainer(model, arguments, train_dataset=data).train(
        resume_from_checkpoint=str(folder / f"checkpoint-{HALF}") if resumes else None
    )
    return full(model.net.parameters())


JOBS: dict[str, Any] = {
    "lightning": lightning_trainer,
    "fabric": fabric,
    "accelerate": accelerate,
    "transformers": transformers,
}

if __name__ == "__main__":
    # What this library says is an error; frameworks warn about themselves.
    warnings.filterwarnings("error", message=".*(surgery|this optimizer holds)")
    name, path = sys.argv[1:]
    result = JOBS[name](Path(path))
    torch.save(result, f"{path}.rank{dist.get_rank()}")
    dist.destroy_process_group()
