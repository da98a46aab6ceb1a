"""The patch encoder, the heads on it, and their weights from an explicit generator."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn
from torchvision.models import resnet18

__all__ = ["LinearHead", "PretrainingModel", "own_stream"]

PROJECTION_DIM = 128  # of the small encoder's head
_SMALL_BELOW_PX = 32  # images below this side keep their resolution in the first convolution


class PretrainingModel(nn.Module):
    """A patch encoder and the head that the pretraining losses see.

    ``encoder`` is one of

    - ``"small"``: 3x3 convolutions, each with batch norm and ReLU, and the mean over the remaining
      positions. For images of 32 px and more: 24, 48, 96, 192 channels, all of stride 2. For
      smaller ones: 32, 64, 128 channels, the last two of stride 2.
    - ``"resnet18"``: torchvision's, randomly initialised, without its classifier: 512 features.

    The head that ResNet18 gets is the published one: linear, ReLU, linear, of the encoder's width.
    On the small encoder both linear layers are followed by batch norm, as in SimCLR's own code
    (google-research/simclr), the last without scale and shift. Without that last one, the
    similarity loss finds its minimum within a few epochs: one direction for every patch.

    Downstream stages use ``encoder`` alone; ``forward`` is head(encoder(x)).

    Args:
        in_channels: 1 or 3.
        image_px: side of the images, which decides the small encoder's strides.
        encoder: ``"small"`` or ``"resnet18"``.
        generator: where all weights come from, on the CPU.

    Attributes:
        embedding_dim: width of the encoder's output.
        norm_in_head: whether the head has batch norm.
    """

    def __init__(
        self,
        in_channels: int,
        image_px: int,
        *,
        encoder: str = "small",
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.norm_in_head = encoder == "small"
        with own_stream(self, generator):
            if encoder == "resnet18":
                self.encoder, self.embedding_dim = _resnet18(in_channels)
            else:
                self.encoder, self.embedding_dim = _small(in_channels, image_px)
            self.head = _head(self.embedding_dim, with_norm=self.norm_in_head)

    def forward(self, patches: Tensor) -> Tensor:
        """Projections [N, d] of patches [N, C, H, W]."""
        projections: Tensor = self.head(self.encoder(patches))
        return projections


class LinearHead(nn.Module):
    """One logit a patch, linear in the encoder's output: what a patch label is predicted with."""

    def __init__(self, embedding_dim: int, *, generator: torch.Generator) -> None:
        super().__init__()
        with own_stream(self, generator):
            self.linear = nn.Linear(embedding_dim, 1)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Logits [N] of embeddings [N, embedding_dim]."""
        logits: Tensor = self.linear(embeddings).squeeze(1)
        return logits


@contextmanager
def own_stream(module: nn.Module, generator: torch.Generator) -> Iterator[None]:
    """Layers built in this context on ``module`` take their weights from ``generator``.

    torch's layers draw from the global stream, which belongs to the caller: it is put back as it
    was. Then every weight of a convolution or linear layer is drawn anew with He's normal
    initialisation, std = sqrt(2 / fan_in) (arXiv 1502.01852), and their biases are set to 0.
    """
    with torch.random.fork_rng(devices=[]):
        yield
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(part.weight, nonlinearity="relu", generator=generator)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def _small(in_channels: int, image_px: int) -> tuple[nn.Module, int]:
    tiny = image_px < _SMALL_BELOW_PX
    widths = [in_channels, 32, 64, 128] if tiny else [in_channels, 24, 48, 96, 192]
    strides = [1, 2, 2] if tiny else [2, 2, 2, 2]
    layers: list[nn.Module] = []
    for (inner, outer), stride in zip(pairwise(widths), strides, strict=True):
        layers += [
            nn.Conv2d(inner, outer, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outer),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), widths[-1]


def _head(dim: int, *, with_norm: bool) -> nn.Module:
    if not with_norm:
        return nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
    return nn.Sequential(
        nn.Linear(dim, dim, bias=False),
        nn.BatchNorm1d(dim),
        nn.ReLU(),
        nn.Linear(dim, PROJECTION_DIM, bias=False),
        nn.BatchNorm1d(PROJECTION_DIM, affine=False),
    )


def _resnet18(in_channels: int) -> tuple[nn.Module, int]:
    network = resnet18(weights=None)
    if in_channels != 3:
        network.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
    dim = network.fc.in_features
    network.fc = nn.Identity()
    return network, dim
