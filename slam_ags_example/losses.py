"""The pretraining losses: NT-Xent, similarity, balanced cross entropy, and Deep SVDD's distance."""

import math

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["cross_entropy_loss", "hypersphere_loss", "nt_xent_loss", "similarity_loss"]


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


def cross_entropy_loss(logits: Tensor, labels: Tensor, positive_share: float = 0.5) -> Tensor:
    """Binary cross entropy in which both classes weigh the same, however rare one of them is.

    With s a row's logit, y its label and π the share of positive labels in the whole training set::

        loss = -1/N · Σ_i [ y_i/(2π) · log σ(s_i) + (1 - y_i)/(2(1 - π)) · log(1 - σ(s_i)) ]

    The weights come from the training set, not from the batch: their mean over the set is 1, a
    batch without a positive row is no special case, and π = 1/2 is plain cross entropy.

    Args:
        logits: [N], N >= 1.
        labels: [N] booleans.
        positive_share: π, in (0, 1).

    Returns:
        The loss, a 0-dim tensor, in nats.

    Raises:
        ValueError: the shapes are not [N] with N >= 1, the labels are not booleans, or the share
            is not in (0, 1).

    Example:
        >>> labels = torch.tensor([True, False])
        >>> round(float(cross_entropy_loss(torch.tensor([2.0, -2.0]), labels)), 4)
        0.1269

    Source: weights N/(2 N_c) as of King and Zeng 2001, "Logistic regression in rare events data".
    """
    if logits.ndim != 1 or logits.shape != labels.shape or len(logits) < 1:
        raise ValueError(
            "logits and labels must have one shape [N] with N >= 1, "
            f"got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if labels.dtype != torch.bool:
        raise ValueError(f"labels must be booleans, got {labels.dtype}")
    if not 0 < positive_share < 1:
        raise ValueError(f"positive_share must be in (0, 1), got {positive_share}")
    y = labels.to(logits.dtype)
    weight = y * (0.5 / positive_share) + (1 - y) * (0.5 / (1 - positive_share))
    return functional.binary_cross_entropy_with_logits(logits, y, weight=weight)


def hypersphere_loss(embeddings: Tensor, centre: Tensor) -> Tensor:
    """Mean squared distance of embeddings to a fixed centre::

        loss = 1/N · Σ_i ‖z_i - c‖²

    Args:
        embeddings: z, [N, d], N >= 1.
        centre: c, [d].

    Returns:
        The loss, a 0-dim tensor. Its minimum, 0, is collapse: every embedding on the centre.

    Raises:
        ValueError: the shapes are not [N, d] and [d], with N >= 1 and d >= 1.

    Example:
        >>> float(hypersphere_loss(torch.eye(2), torch.zeros(2)))
        1.0

    Source: Ruff et al. 2018, "Deep One-Class Classification" (PMLR 80), equation 4; its weight
    decay is the optimizer's.
    """
    if embeddings.ndim != 2 or embeddings.shape[1:] != centre.shape or embeddings.numel() < 1:
        raise ValueError(
            "embeddings and centre must be [N, d] and [d] with N >= 1 and d >= 1, "
            f"got {tuple(embeddings.shape)} and {tuple(centre.shape)}"
        )
    return (embeddings - centre).square().sum(dim=1).mean()


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
