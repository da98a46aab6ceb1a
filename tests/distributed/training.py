"""One training, in one process on the joined batch or in many on parts of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from gradsurgery import AdaptiveGradientSurgery
from gradsurgery.methods import Method

SAMPLES = 16
STEPS = 10
FLAGS = ("autocast", "scaler", "clip", "checkpointed", "compiled", "features")
DDP = {
    "ddp": {},
    "ddp find_unused": {"find_unused_parameters": True},
    "ddp static_graph": {"static_graph": True},
    "ddp bucket_view": {"gradient_as_bucket_view": True},
}


class Network(nn.Module):
    """A trunk, a head for each of three tasks, and a layer that no task reaches; odd sizes."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first = nn.Linear(7, 13)
            self.norm = nn.LayerNorm(13)
            self.second = nn.Linear(13, 5)
            self.heads = nn.ModuleList(nn.Linear(5, width) for width in (3, 1, 2))
            self.unused = nn.Linear(2, 2)
        self.trunk: Any = self.features
        self.seen: Tensor | None = None
        self.to(dtype)

    def features(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x).tanh()))

    def forward(self, x: Tensor) -> list[Tensor]:
        features = self.trunk(x)
        self.seen = features
        first, second, third = (head(features) for head in self.heads)
        return [
            first.float().square().mean(),
            (second.float() - 1).square().mean(),
            (third + features[:, :2]).float().abs().mean() * 3,
        ]


class FromLosses(Method):
    """w_t = the share of loss t: one backward pass, of losses that must be those of all ranks."""

    name = "from_losses"
    reads_gram = False
    reads_losses = True
    known_beforehand = True

    def solve(
        self,
        gram: Tensor,
        losses: Tensor | None,
        generator: torch.Generator | None,
        relative_error: float,
    ) -> Tensor:
        assert losses is not None
        return 3 * losses / losses.sum()


@dataclass(frozen=True)
class Setting:
    """How to train; `how` is "bare", a key of DDP, or one of fully_shard's forms."""

    how: str = "bare"
    method: str = "ags"
    tasks: int = 3
    scope: str = "shared"
    micro_batches: int = 1
    dtype: torch.dtype = torch.float32
    autocast: bool = False
    scaler: bool = False
    clip: bool = False
    freeze_unused: bool = False
    checkpointed: bool = False
    compiled: bool = False
    granularity: str = "model"
    every: int = 1
    metric: str = "euclidean"
    features: bool = False

    def __str__(self) -> str:
        extras = [name for name in FLAGS if getattr(self, name)]
        dtype = str(self.dtype).removeprefix("torch.")
        words = [self.how, self.method, f"T={self.tasks}", self.scope, dtype, *extras]
        words += [f"every={self.every}"] * (self.every > 1)
        words += [self.granularity] * (self.granularity != "model")
        words += [f"metric={self.metric}"] * (self.metric != "euclidean")
        return " ".join(words) + (f" micro={self.micro_batches}" if self.micro_batches > 1 else "")


def wrap(model: nn.Module, how: str) -> tuple[nn.Module, Any]:
    """The model as `how` says, and the process group that the optimizer gets."""
    if not dist.is_initialized():
        return model, None
    if how == "bare":
        return model, dist.group.WORLD
    if how in DDP:
        return DistributedDataParallel(model, **DDP[how]), dist.group.WORLD
    size = dist.get_world_size()
    shape, names = ((2, size // 2), ("replicas", "shards")) if "hybrid" in how else ((size,), None)
    options: dict[str, Any] = {"mesh": init_device_mesh("cpu", shape, mesh_dim_names=names)}
    if "mixed" in how:
        options["mp_policy"] = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32
        )
    if "blocks" in how:
        for layer in (model.first, model.second):
            fully_shard(layer, **options)
    fully_shard(model, **options)
    return model, None


def make(setting: Setting, seed: int = 0) -> tuple[nn.Module, nn.Module, AdaptiveGradientSurgery]:
    """The bare network, the wrapped one, the optimizer."""
    network = Network(setting.dtype)
    network.unused.requires_grad_(not setting.freeze_unused)
    if setting.checkpointed:
        network.trunk = partial(checkpoint, network.features, use_reentrant=False)
    if setting.compiled:
        network.trunk = torch.compile(network.features, backend="aot_eager")
    model, group = wrap(network, setting.how)
    base = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = AdaptiveGradientSurgery(
        base,
        FromLosses() if setting.method == FromLosses.name else setting.method,
        scope=setting.scope,
        granularity=setting.granularity,
        every=setting.every,
        metric=setting.metric,
        process_group=group,
        seed=seed,
    )
    return network, model, optimizer


def batches(steps: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """This rank's part of every batch; in one process all of it."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    source = torch.Generator().manual_seed(1)
    whole = [torch.randn(SAMPLES, 7, generator=source).to(dtype) for _ in range(steps)]
    return [batch.chunk(size)[rank] for batch in whole]


def full(parameters: Any) -> Tensor:
    """All parameters, whole, in one float64 vector."""
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in parameters]
    return torch.cat([p.detach().double().flatten() for p in whole])


def train(setting: Setting) -> Tensor:
    """The parameters after ten steps."""
    network, model, optimizer = make(setting)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=setting.scaler)
    parts = iter(batches(STEPS * setting.micro_batches, setting.dtype))
    for _ in range(STEPS):
        optimizer.zero_grad()
        for left in reversed(range(setting.micro_batches)):
            with torch.autocast("cpu", enabled=setting.autocast):
                losses = model(next(parts))[: setting.tasks]
            losses = [loss / setting.micro_batches for loss in losses]
            features = network.seen if setting.features else None
            optimizer.backward(scaler.scale(losses), accumulate=left > 0, features=features)
        scaler.unscale_(optimizer)
        if setting.clip:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
    return full(network.parameters())


def attempt(job: Callable[[], Any]) -> str:
    """The text of the error that a job raises."""
    try:
        job()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"
