"""The two pretraining losses: NT-Xent and the similarity loss."""

import math

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["nt_xent_loss", "similarity_loss"]


def nt_xent_loss(a: Tensor, b: Tensor, temperature: float = 0.07) -> Tensor:
    """Normalised-temperature cross entropy over the 2N views of N patches.

    With z the 2N rows of a and b brought to unit norm, and p(i) the other view of i's patch::

        loss = 1/(2N) · Σ_i -log( exp(z_i·z_p(i) / τ) / Σ_{k ≠ i} exp(z_i·z_k / τ) )

    Args:
        a: [N, d], one view of each patch; need not be normalised.
        b: [N, d], the other view; row i shows the same patch as row i of ``a``.
        temperature: τ > 0, dimensionless.

    Returns:
        The loss, a 0-dim tensor. With N = 1 there is nothing to contrast with, and it is 0.

    Raises:
        ValueError: the views are not two floating-point matrices of one shape, dtype and device
            with at least one row and one column, or the temperature is not positive and finite.

    Example:
        >>> a = torch.eye(2)
        >>> round(float(nt_xent_loss(a, a, temperature=1.0)), 4)
        0.5514

    Source: Chen et al. 2020 (arXiv 2002.05709), equation 1 and algorithm 1.
    """
    _check_views(a, b, temperature)
    n = a.shape[0]
    z = functional.normalize(torch.cat([a, b]), dim=1)
    logits = (z @ z.T / temperature).fill_diagonal_(-math.inf)
    partner = torch.arange(2 * n, device=z.device).roll(n)
    return functional.cross_entropy(logits, partner)


def similarity_loss(a: Tensor, b: Tensor, temperature: float = 0.07) -> Tensor:
    """Minus the mean similarity over all ordered pairs of the 2N views of N patches.

    With z the 2N rows of a and b brought to unit norm::

        loss = -1/(2N(2N - 1)) · Σ_{i ≠ j} z_i·z_j / τ
             = -(‖Σ_i z_i‖² - Σ_i ‖z_i‖²) / (2N(2N - 1) τ)

    The second line takes O(N d) instead of O(N² d). There is no denominator as in NT-Xent: the
    minimum, -1/τ, is reached where every view has the same direction (collapse). Something else,
    here the conflict with NT-Xent, has to keep the encoder from it.

    Args:
        a: [N, d], one view of each patch; need not be normalised.
        b: [N, d], the other view; row i shows the same patch as row i of ``a``.
        temperature: τ > 0, dimensionless.

    Returns:
        The loss, a 0-dim tensor in [-1/τ, 1/((2N - 1)τ)].

    Raises:
        ValueError: as in :func:`nt_xent_loss`.

    Example:
        >>> a = torch.eye(2)
        >>> round(float(similarity_loss(a, a, temperature=1.0)), 4)
        -0.3333

    Source: SLAM-AGS (arXiv 2511.14639), the loss on slide-negative patches; WeakSupCon
    (arXiv 2503.04165).
    """
    _check_views(a, b, temperature)
    n_views = 2 * a.shape[0]
    z = functional.normalize(torch.cat([a, b]), dim=1)
    # Σ‖z_i‖² is 2N up to rounding, but a row of zeros stays zero and counts as such.
    pair_sum = z.sum(dim=0).square().sum() - z.square().sum()
    return -pair_sum / (n_views * (n_views - 1) * temperature)


def _check_views(a: Tensor, b: Tensor, temperature: float) -> None:
    if a.ndim != 2 or b.ndim != 2:
        raise ValueError(
            f"a and b must be matrices [N, d], got shapes {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if a.shape != b.shape:
        raise ValueError(
            "a and b must be two views of the same patches, with one shape [N, d], "
            f"got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if a.shape[0] < 1 or a.shape[1] < 1:
        raise ValueError(f"a and b need N >= 1 and d >= 1, got shape {tuple(a.shape)}")
    if not a.is_floating_point() or a.dtype != b.dtype:
        raise ValueError(f"a and b must share a floating-point dtype, got {a.dtype} and {b.dtype}")
    if a.device != b.device:
        raise ValueError(f"a and b must be on one device, got {a.device} and {b.device}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
