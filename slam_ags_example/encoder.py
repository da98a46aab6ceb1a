"""The patch encoder, the heads on it, and their weights from an explicit generator."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["EMBEDDING_DIM", "LinearHead", "PretrainingModel", "own_stream"]

EMBEDDING_DIM = 128


class PretrainingModel(nn.Module):
    """A small convolutional encoder and the head that the pretraining losses see.

    The encoder is three 3x3 convolutions (32, 64, 128 channels; the last two with stride 2), each
    with batch norm and ReLU, and the mean over the remaining positions. The head has batch norm on
    its hidden layer too, as SimCLR's has. The published head has none; on these small images its
    output then collapses within a few epochs, and NT-Xent stays near the logarithm of the number
    of views.

    Downstream stages use ``encoder`` alone; ``forward`` is head(encoder(x)).
    """

    def __init__(self, in_channels: int, *, generator: torch.Generator) -> None:
        super().__init__()
        with own_stream(self, generator):
            self.encoder = nn.Sequential(
                *_block(in_channels, 32, stride=1),
                *_block(32, 64, stride=2),
                *_block(64, EMBEDDING_DIM, stride=2),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
            )
            self.head = nn.Sequential(
                nn.Linear(EMBEDDING_DIM, EMBEDDING_DIM, bias=False),
                nn.BatchNorm1d(EMBEDDING_DIM),
                nn.ReLU(),
                nn.Linear(EMBEDDING_DIM, EMBEDDING_DIM),
            )

    def forward(self, patches: Tensor) -> Tensor:
        """Projections [N, d] of patches [N, C, H, W]."""
        projections: Tensor = self.head(self.encoder(patches))
        return projections


class LinearHead(nn.Module):
    """One logit a patch, linear in the encoder's output: what a patch label is predicted with."""

    def __init__(self, *, generator: torch.Generator) -> None:
        super().__init__()
        with own_stream(self, generator):
            self.linear = nn.Linear(EMBEDDING_DIM, 1)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Logits [N] of embeddings [N, EMBEDDING_DIM]."""
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


def _block(in_channels: int, out_channels: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    ]
