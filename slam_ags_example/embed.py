"""Embeddings of patches: the encoder's output, its collapse measures, and its file."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from slam_ags_example.config import InputError
from slam_ags_example.output import write_whole

__all__ = [
    "CHUNK",
    "collapse_measures",
    "effective_rank",
    "embed",
    "feature_std",
    "read_embeddings",
    "write_embeddings",
]

CHUNK = 256  # patches per forward pass


@torch.no_grad()
def embed(encoder: nn.Module, patches: Tensor) -> Tensor:
    """The encoder's output for each patch, in evaluation mode.

    Args:
        encoder: maps [N, C, h, w] to [N, d].
        patches: [N, C, h, w], N >= 1, on the encoder's device.

    Returns:
        [N, d], on the same device.
    """
    encoder.eval()
    return torch.cat([encoder(chunk) for chunk in torch.split(patches, CHUNK)])


def effective_rank(embeddings: Tensor) -> Tensor:
    """How many directions the embeddings use: exp of the entropy of their spectrum.

    With σ the singular values of the centred embeddings and p = σ / Σσ::

        effective rank = exp( -Σ p_k log p_k )

    Args:
        embeddings: [N, d].

    Returns:
        0-dim float64 tensor in [1, min(N, d)]; 1 also where all embeddings are equal.

    Source: Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality".
    """
    centred = embeddings.double() - embeddings.double().mean(dim=0)
    singular = torch.linalg.svdvals(centred)
    share = singular / singular.sum().clamp_min(torch.finfo(torch.float64).tiny)
    rank: Tensor = torch.special.entr(share).sum().exp()
    return rank


def feature_std(embeddings: Tensor) -> Tensor:
    """Spread of the embeddings' directions, as √d times the mean per-feature std of unit rows.

    Args:
        embeddings: [N, d], N >= 2.

    Returns:
        0-dim tensor: 0 where all point the same way, about 1 where directions are isotropic.

    Source: the collapse measure of SimSiam (arXiv 2011.10566, section 4.1), times √d.
    """
    unit = functional.normalize(embeddings, dim=1)
    spread: Tensor = unit.std(dim=0).mean() * embeddings.shape[1] ** 0.5
    return spread


def collapse_measures(embeddings: Tensor) -> tuple[float, float]:
    """Effective rank and feature std of embeddings [N, d], N >= 2, as plain numbers."""
    return float(effective_rank(embeddings)), float(feature_std(embeddings))


def write_embeddings(path: Path, embeddings: Tensor, references: list[str]) -> None:
    """Write as .npz with the arrays ``embeddings`` [N, d] and ``images`` [N], nothing pickled.

    Args:
        path: ends in .npz.
        embeddings: [N, d].
        references: the image reference of each row.
    """
    arrays = {
        "embeddings": embeddings.cpu().numpy(),
        "images": np.array(references, dtype=np.str_),
    }
    write_whole(path, lambda file: np.savez(file, allow_pickle=False, **arrays))


def read_embeddings(path: Path, references: list[str]) -> Tensor:
    """Read what :func:`write_embeddings` wrote, as [len(references), d] on the CPU.

    Args:
        path: the .npz file; nothing in it is executed.
        references: the images wanted, in the order wanted.

    Raises:
        InputError: the file is not there, is not such a file, or lacks an image.
    """
    try:
        with np.load(path, allow_pickle=False) as content:
            row_of = {str(image): row for row, image in enumerate(content["images"])}
            rows = [row_of[reference] for reference in references]
            return torch.from_numpy(content["embeddings"][rows])
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{path} does not hold the embeddings of these bags: embed the patches again"
        ) from error
