"""The Trainer of transformers trains as the bare loop does, to the bit, and resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from bare_loop import assert_same, bare_loop
from bare_loop import one_thread as one_thread
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    BertPreTrainedModel,
    Trainer,
    TrainingArguments,
    get_linear_schedule_with_warmup,
)

from gradsurgery import AdaptiveGradientSurgery

SAMPLES, SIZE, EPOCHS = 24, 4, 2


@pytest.fixture(autouse=True)
def _own_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate keeps its precision for the life of the process."""
    for state in (PartialState, AcceleratorState, GradientState):
        monkeypatch.setattr(state, "_shared_state", {})


class Tasks(BertPreTrainedModel):
    """A tiny BERT with a class for each text and a class for each token; returns the losses."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.text = nn.Linear(config.hidden_size, 2)
        self.token = nn.Linear(config.hidden_size, 3)
        self.post_init()

    def forward(self, input_ids: Tensor, topic: Tensor, tags: Tensor) -> dict[str, Tensor]:
        """[N, L], [N], [N, L] -> two losses."""
        hidden = self.bert(input_ids).last_hidden_state
        cross_entropy = nn.functional.cross_entropy
        return {
            "topic": cross_entropy(self.text(hidden[:, 0]), topic),
            "tags": cross_entropy(self.token(hidden).flatten(0, 1), tags.flatten()),
        }

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """As the bare loop calls it."""
        return self(**batch)


class SurgeryTrainer(Trainer):
    """What the documentation shows."""

    def create_optimizer(self, model: Any = None) -> Any:
        """The optimizer of the arguments, weight decay groups included, in the plugin."""
        if not isinstance(self.optimizer, AdaptiveGradientSurgery):
            base = super().create_optimizer(model)
            self.optimizer = AdaptiveGradientSurgery(base, method="gradvac")
        return self.optimizer

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch."""
        model.train()
        with self.compute_loss_context_manager():
            losses = model(**self._prepare_inputs(inputs))
        parts = self.current_gradient_accumulation_steps
        losses = {name: loss / parts for name, loss in losses.items()}
        last = self.accelerator.sync_gradients
        self.optimizer.optimizer.backward(losses, accumulate=not last)
        return torch.stack(list(losses.values())).sum().detach()


def samples() -> list[dict[str, Tensor]]:
    """Texts of eight tokens, always the same."""
    generator = torch.Generator().manual_seed(0)

    def one() -> dict[str, Tensor]:
        ids = torch.randint(50, (8,), generator=generator)
        return {"input_ids": ids, "topic": ids[1] % 2, "tags": ids % 3}

    return [one() for _ in range(SAMPLES)]


def batches() -> list[dict[str, Tensor]]:
    """One epoch of them in order."""
    parts = [samples()[start : start + SIZE] for start in range(0, SAMPLES, SIZE)]
    return [{name: torch.stack([one[name] for one in part]) for name in part[0]} for part in parts]


def trainer(folder: Path, *, dropout: float = 0.0, **options: Any) -> SurgeryTrainer:
    """A trainer with a model of its own, always with the same weights."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        per_device_train_batch_size=SIZE,
        num_train_epochs=EPOCHS,
        learning_rate=0.01,
        weight_decay=0.1,
        max_grad_norm=0.5,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    torch.manual_seed(5)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return SurgeryTrainer(Tasks(config), arguments, train_dataset=samples())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("micro", [1, 3])
def test_trainer(bf16: bool, micro: int, tmp_path: Path) -> None:
    """Weight decay groups, clipping, a schedule, micro-batches and bfloat16 together."""
    options: dict[str, Any] = {
        "bf16": bf16,
        "gradient_accumulation_steps": micro,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
    }
    run, twin = (trainer(tmp_path, **options) for _ in range(2))
    run.train()
    optimizer = twin.create_optimizer()
    assert len(optimizer.param_groups) == 2
    steps = EPOCHS * SAMPLES // SIZE // micro
    assert run.state.global_step == steps
    twin.model.train()
    bare_loop(
        batches() * EPOCHS,
        model=twin.model,
        optimizer=optimizer,
        micro=micro,
        clip=0.5,
        precision=torch.bfloat16 if bf16 else torch.float32,
        scheduler=lambda one: get_linear_schedule_with_warmup(one, 0, steps),
    )
    assert_same(run.model.state_dict(), twin.model.state_dict())
    assert_same(run.optimizer.state_dict(), optimizer.state_dict())


def test_an_epoch_that_ends_inside_a_step(tmp_path: Path) -> None:
    """Six batches in steps of four: the second step has two, and means are taken over two."""
    options: dict[str, Any] = {
        "gradient_accumulation_steps": 4,
        "train_sampling_strategy": "sequential",
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
    }
    run, twin = (trainer(tmp_path, **options) for _ in range(2))
    run.train()
    assert run.state.global_step == 2 * EPOCHS
    optimizer = twin.create_optimizer()
    twin.model.train()
    for part in (batches()[:4], batches()[4:]) * EPOCHS:
        bare_loop(part, model=twin.model, optimizer=optimizer, micro=len(part), clip=0.5)
    assert_same(run.model.state_dict(), twin.model.state_dict())


@pytest.mark.parametrize("bf16", [False, True])
def test_resume(bf16: bool, tmp_path: Path) -> None:
    """From the checkpoint in the middle, shuffled and with dropout: as if never interrupted."""
    options: dict[str, Any] = {
        "bf16": bf16,
        "gradient_accumulation_steps": 2,
        "dropout": 0.1,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = trainer(tmp_path, **options)
    whole.train()
    assert whole.state.global_step == 6
    resumed = trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(resumed.model.state_dict(), whole.model.state_dict())
    assert_same(resumed.optimizer.state_dict(), whole.optimizer.state_dict())
