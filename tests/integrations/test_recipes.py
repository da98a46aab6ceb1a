"""Precision, averages, schedules, schedule-free optimizers, clipping and logging."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import pytest
import schedulefree
import torch
from bare_loop import Net, assert_same, bare_loop, epochs, plugin
from bare_loop import one_thread as one_thread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.tensorboard import SummaryWriter

import gradsurgery
from gradsurgery import AdaptiveGradientSurgery
from gradsurgery.methods import PCGrad

# ------------------------------------------------------------------ bfloat16, float32 masters


class Half(nn.Module):
    """float32 parameters; every forward pass runs on their bfloat16 copies."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        """The cast is part of the graph, so gradients arrive in float32."""
        copies = {name: p.bfloat16() for name, p in self.net.named_parameters()}
        return Net.losses_of(torch.func.functional_call(self.net, copies, x.bfloat16()))


def test_bfloat16_model_with_float32_masters() -> None:
    """Against masters kept by hand: a bfloat16 model, gradients of each task cast and combined."""
    model = Half()
    optimizer = AdaptiveGradientSurgery(
        torch.optim.AdamW(model.parameters(), lr=0.01), scope="all", seed=5
    )
    bare_loop(epochs(2), model=model, optimizer=optimizer, clip=0.5)
    masters, half = list(Net().parameters()), Net().bfloat16()
    base, order = torch.optim.AdamW(masters, lr=0.01), torch.Generator().manual_seed(5)
    for x in epochs(2):
        with torch.no_grad():
            for p, master in zip(half.parameters(), masters, strict=True):
                p.copy_(master)
        rows = []
        for loss in half.losses(x.bfloat16()).values():
            found = torch.autograd.grad(
                loss, list(half.parameters()), retain_graph=True, materialize_grads=True
            )
            rows.append(torch.cat([g.float().flatten() for g in found]))
        combined = gradsurgery.aggregate(torch.stack(rows), generator=order)
        parts = combined.split([p.numel() for p in masters])
        for master, part in zip(masters, parts, strict=True):
            master.grad = part.view_as(master).clone()
        nn.utils.clip_grad_norm_(masters, 0.5)
        base.step()
    for p, master in zip(model.parameters(), masters, strict=True):
        assert p.dtype == torch.float32
        torch.testing.assert_close(p.detach(), master.detach(), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------ schedules, averages, clipping


class Operated:
    """A plain optimizer whose gradients come from surgery by a plugin that never steps."""

    def __init__(self, model: nn.Module, base: Any) -> None:
        self.base = base
        self.source = plugin(model)

    def run(self, model: Net, batches: list[Tensor], after: Any) -> None:
        """Train; `after` is called at the end of each step."""
        for x in batches:
            self.source.zero_grad()
            self.source.backward(model.losses(x))
            self.base.step()
            after()


def test_schedule_free() -> None:
    """train() and eval() of the optimizer pass through, also after a checkpoint in between."""

    def base(model: Net) -> Any:
        return schedulefree.AdamWScheduleFree(model.parameters(), lr=0.01, warmup_steps=3)

    model, twin = Net(), Net()
    plain = Operated(twin, base(twin))
    optimizer = AdaptiveGradientSurgery(base(model), method="gradvac")
    for _ in range(2):
        optimizer.train()
        bare_loop(epochs(1), model=model, optimizer=optimizer)
        optimizer.eval()
        state = copy.deepcopy(optimizer.state_dict())
        optimizer = AdaptiveGradientSurgery(base(model), method="gradvac", seed=9)
        optimizer.load_state_dict(state)
        plain.base.train()
        plain.run(twin, epochs(1), lambda: None)
        plain.base.eval()
        assert_same(model.state_dict(), twin.state_dict())


SCHEDULES: dict[str, Any] = {
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.05, total_steps=12),
    "warm-up, then cosine": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.CosineAnnealingLR(o, 8)],
        milestones=[4],
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
# SequentialLR steps its first schedule before any optimizer step, with or without the plugin.
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_schedule_and_moving_average(name: str) -> None:
    """Schedules that touch lr and betas, with an EMA of the weights: as beside the plain AdamW."""
    found = []
    for operated in (True, False):
        model = Net()
        base = torch.optim.AdamW(model.parameters(), lr=0.01)
        optimizer: Any = plugin(model) if operated else base
        rates = SCHEDULES[name](optimizer)
        average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))

        def after(rates: Any = rates, average: Any = average, model: Net = model) -> None:
            average.update_parameters(model)
            rates.step()

        if operated:
            for x in epochs(2):
                bare_loop([x], model=model, optimizer=optimizer)
                after()
        else:
            Operated(model, base).run(model, epochs(2), after)
        found.append((average.state_dict(), rates.get_last_lr(), rates.state_dict()["last_epoch"]))
    assert_same(found[0], found[1])


class ClippedPCGrad(PCGrad):
    """Each task's gradient clipped to a norm, then PCGrad: a rule on M like any other."""

    name: ClassVar[str] = "clipped_pcgrad"

    def __init__(self, max_norm: float) -> None:
        self.max_norm = max_norm

    def solve(self, gram: Tensor, *rest: Any) -> Tensor:
        norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
        factors = (self.max_norm / norms).clamp(max=1)
        clipped = factors[..., None] * gram * factors[..., None, :]
        return factors * super().solve(clipped, *rest)


def test_clipping_of_each_task() -> None:
    """Rows clipped by hand and combined by PCGrad, against the rule on M."""
    rows = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    rows *= torch.tensor([0.01, 1.0, 30.0])[:, None]
    found = gradsurgery.aggregate(
        rows, ClippedPCGrad(2.0), generator=torch.Generator().manual_seed(1)
    )
    clipped = rows * (2.0 / rows.norm(dim=1, keepdim=True)).clamp(max=1)
    expected = gradsurgery.aggregate(clipped, "pcgrad", generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(found, expected)


# ------------------------------------------------------------------ logging


class Reads(TorchDispatchMode):
    """Counts what makes the device's value known to Python."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """`item()`, `float()` and `bool()` all end here."""
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_logging_every_few_steps(tmp_path: Path) -> None:
    """Scalars in TensorBoard are the reports of those steps; in between nothing is read."""
    model = Net()
    optimizer = AdaptiveGradientSurgery(torch.optim.SGD(model.parameters(), lr=0.01))
    expected, reads = {}, []
    with SummaryWriter(tmp_path) as writer:
        for number, x in enumerate(epochs(2)):
            losses = model.losses(x)
            with Reads() as counted:
                optimizer.zero_grad()
                optimizer.backward(losses)
                optimizer.step()
                if number % 5 == 0:
                    last = optimizer.last
                    assert last is not None
                    weights = dict(zip(last.names, last.weights.tolist(), strict=True))
                    writer.add_scalars("weight", weights, number)
                    writer.add_scalar("conflicts", last.conflicts, number)
                    expected[number] = float(last.conflicts)
            reads.append(counted.count)
    assert [number for number, count in enumerate(reads) if count] == [0, 5, 10]
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {event.step: event.value for event in events.Scalars("conflicts")} == expected
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [
        "weight_far",
        "weight_near",
        "weight_odd",
    ]
