"""The models that are trained: a trunk, a head per task, and losses that disagree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["GRAPHS", "MODELS", "Problem", "build"]

MODELS = ("mlp", "resnet18", "transformer")
GRAPHS = ("disjoint", "shared")

_TOKENS, _CHANNELS = 64, 256


@dataclass(frozen=True)
class Problem:
    """A model and its fixed inputs: one batch for all tasks, or one batch for each."""

    trunk: nn.Module
    heads: nn.ModuleList
    inputs: Sequence[Tensor]
    amp: bool = False

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All of them, trunk first."""
        return [*self.trunk.parameters(), *self.heads.parameters()]

    @property
    def width(self) -> int:
        """D: the elements of the trunk, which every task reaches."""
        return sum(p.numel() for p in self.trunk.parameters())

    def forward(self) -> tuple[list[Tensor], list[Tensor]]:
        """Features, one tensor per batch of inputs, and losses, one per task."""
        device_type = self.inputs[0].device.type
        with torch.autocast(device_type, dtype=torch.bfloat16, enabled=self.amp):
            features = [self.trunk(x) for x in self.inputs]
            outputs = [head(features[t % len(features)]) for t, head in enumerate(self.heads)]
        # Targets of opposite sign, so that the tasks disagree.
        losses = [(out.float() - (-1) ** t).square().mean() for t, out in enumerate(outputs)]
        return features, losses

    def losses(self) -> list[Tensor]:
        """The losses alone."""
        return self.forward()[1]


def build(
    model: str,
    graph: str,
    tasks: int,
    *,
    batch: int,
    pixels: int,
    device: torch.device,
    amp: bool = False,
) -> Problem:
    """The same weights and inputs at every call.

    Args:
        model: one of `MODELS`.
        graph: "disjoint": a batch of its own for each task; "shared": one batch for all.
        tasks: T.
        batch: samples in each batch.
        pixels: width and height of an image; resnet18 only.
        device: where it is trained.
        amp: forward passes under bfloat16 autocast.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        trunk, features, shape = _trunk(model, pixels)
        heads = nn.ModuleList(nn.Linear(features, 1) for _ in range(tasks))
        count = tasks if graph == "disjoint" else 1
        inputs = [torch.randn(batch, *shape).to(device) for _ in range(count)]
    return Problem(trunk.to(device), heads.to(device), inputs, amp)


def _trunk(model: str, pixels: int) -> tuple[nn.Module, int, tuple[int, ...]]:
    """The trunk, the number of its features and the shape of one input."""
    if model == "mlp":
        layers = [layer for _ in range(4) for layer in (nn.Linear(256, 256), nn.ReLU())]
        return nn.Sequential(*layers), 256, (256,)
    if model == "resnet18":
        from torchvision.models import resnet18

        network = resnet18()
        network.fc = nn.Identity()
        return network, 512, (3, pixels, pixels)
    if model == "transformer":
        return _Transformer(), _CHANNELS, (_TOKENS, _CHANNELS)
    raise ValueError(f"model must be one of {', '.join(MODELS)}; got {model!r}")


class _Transformer(nn.Module):
    """Four encoder layers, and the mean over tokens."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            _CHANNELS, 4, 4 * _CHANNELS, dropout=0.0, batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """[batch, tokens, channels] -> [batch, channels]."""
        encoded: Tensor = self.encoder(tokens)
        return encoded.mean(1)
