"""The pretraining losses against loops over their equations, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slam_ags_example.losses import (
    cross_entropy_loss,
    hypersphere_loss,
    nt_xent_loss,
    similarity_loss,
)

# Both renderings do the same sums in another order: at most about (2N)² · d terms of size 1/τ, so
# float64's 1.1e-16 times a few thousand, relative to 1/τ. 1e-11/τ leaves two orders of magnitude.
TOLERANCE = 1e-11


def unit_rows(a: Tensor, b: Tensor) -> list[list[float]]:
    rows = [*a.tolist(), *b.tolist()]
    return [[value / math.sqrt(sum(v * v for v in row)) for value in row] for row in rows]


def dot(x: list[float], y: list[float]) -> float:
    return math.fsum(p * q for p, q in zip(x, y, strict=True))


def nt_xent_by_loops(a: Tensor, b: Tensor, temperature: float) -> float:
    z, n = unit_rows(a, b), len(a)
    total = 0.0
    for i in range(2 * n):
        partner = i + n if i < n else i - n
        logits = [dot(z[i], z[k]) / temperature for k in range(2 * n) if k != i]
        top = max(logits)
        denominator = top + math.log(math.fsum(math.exp(value - top) for value in logits))
        total += denominator - dot(z[i], z[partner]) / temperature
    return total / (2 * n)


def similarity_by_loops(a: Tensor, b: Tensor, temperature: float) -> float:
    z = unit_rows(a, b)
    pairs = [(i, j) for i in range(len(z)) for j in range(len(z)) if i != j]
    return -math.fsum(dot(z[i], z[j]) / temperature for i, j in pairs) / len(pairs)


LOSSES = [
    pytest.param(nt_xent_loss, nt_xent_by_loops, id="nt_xent"),
    pytest.param(similarity_loss, similarity_by_loops, id="similarity"),
]


def views(n: int, d: int, seed: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, n, d, generator=random, dtype=torch.float64)
    return a, b


@pytest.mark.parametrize(("loss", "by_loops"), LOSSES)
@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 6),
    d=st.integers(1, 7),
    temperature=st.floats(0.02, 5),
    scale=st.floats(1e-3, 1e3),
    seed=st.integers(0, 2**32),
)
def test_loss_is_its_equation(loss, by_loops, n, d, temperature, scale, seed):
    a, b = views(n, d, seed)
    value = loss(scale * a, b, temperature)
    assert value.shape == ()
    expected = by_loops(scale * a, b, temperature)
    assert abs(float(value) - expected) <= TOLERANCE / temperature


@pytest.mark.parametrize(("loss", "by_loops"), LOSSES)
def test_default_temperature_is_the_published_one(loss, by_loops):
    a, b = views(5, 4, 0)
    assert float(loss(a, b)) == pytest.approx(by_loops(a, b, 0.07), rel=1e-11)


@pytest.mark.parametrize("loss", [nt_xent_loss, similarity_loss])
def test_gradient_is_that_of_finite_differences(loss):
    a, b = (view.requires_grad_() for view in views(4, 3, 1))
    # gradcheck's own defaults: steps of 1e-6 in float64, absolute error 1e-5
    assert torch.autograd.gradcheck(lambda x, y: loss(x, y, 0.3), (a, b))


@pytest.mark.parametrize("loss", [nt_xent_loss, similarity_loss])
def test_loss_does_not_depend_on_the_order_of_patches_or_of_views(loss):
    a, b = views(7, 5, 2)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loss(a[order], b[order]), loss(a, b))
    torch.testing.assert_close(loss(b, a), loss(a, b))


def test_similarity_loss_is_least_where_all_views_agree():
    row = torch.randn(1, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a = row.expand(9, 8)
    assert float(similarity_loss(a, 3 * a, 0.07)) == pytest.approx(-1 / 0.07, rel=1e-12)


def test_nt_xent_of_one_patch_is_zero():
    a, b = views(1, 4, 3)
    assert float(nt_xent_loss(a, b)) == 0


@pytest.mark.parametrize("loss", [nt_xent_loss, similarity_loss])
def test_float32_agrees_with_float64(loss):
    a, b = views(64, 32, 4)
    # Unit rows carry float32's 6e-8, and 1/τ = 14 of it per logit; 1e-5 absolute on values near 10.
    assert float(loss(a.float(), b.float())) == pytest.approx(float(loss(a, b)), abs=1e-5)


@pytest.mark.parametrize("loss", [nt_xent_loss, similarity_loss])
@pytest.mark.parametrize(
    ("a", "b", "temperature", "message"),
    [
        (torch.ones(3), torch.ones(3), 0.07, r"matrices \[N, d\], got shapes \(3,\)"),
        (torch.ones(2, 3, 4), torch.ones(2, 3, 4), 0.07, "matrices"),
        (torch.ones(3, 4), torch.ones(2, 4), 0.07, r"got \(3, 4\) and \(2, 4\)"),
        (torch.ones(0, 4), torch.ones(0, 4), 0.07, "N >= 1"),
        (torch.ones(4, 0), torch.ones(4, 0), 0.07, "d >= 1"),
        (torch.ones(2, 3), torch.ones(2, 3).double(), 0.07, "dtype"),
        (torch.ones(2, 3).long(), torch.ones(2, 3).long(), 0.07, "dtype"),
        (torch.ones(2, 3), torch.ones(2, 3, device="meta"), 0.07, "one device"),
        (torch.ones(2, 3), torch.ones(2, 3), 0.0, "temperature must be positive"),
        (torch.ones(2, 3), torch.ones(2, 3), -1.0, "temperature"),
        (torch.ones(2, 3), torch.ones(2, 3), math.nan, "temperature"),
        (torch.ones(2, 3), torch.ones(2, 3), math.inf, "temperature"),
    ],
)
def test_wrong_views_are_refused_by_name(loss, a, b, temperature, message):
    with pytest.raises(ValueError, match=message):
        loss(a, b, temperature)


def cross_entropy_by_loops(logits: Tensor, labels: Tensor, positive_share: float) -> float:
    total = 0.0
    for logit, label in zip(logits.tolist(), labels.tolist(), strict=True):
        # 1 - σ(s) = σ(-s), which keeps its digits where σ(s) is near 1
        if label:
            total += math.log1p(math.exp(-logit)) / (2 * positive_share)
        else:
            total += math.log1p(math.exp(logit)) / (2 * (1 - positive_share))
    return total / len(logits)


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 9),
    scale=st.floats(1e-3, 5),
    positive_share=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32),
)
def test_cross_entropy_is_its_equation(n, scale, positive_share, seed):
    random = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, generator=random, dtype=torch.float64)
    labels = torch.rand(n, generator=random) < positive_share
    expected = cross_entropy_by_loops(logits, labels, positive_share)
    assert float(cross_entropy_loss(logits, labels, positive_share)) == pytest.approx(
        expected, rel=1e-12
    )


def test_cross_entropy_weighs_a_rare_class_as_much_as_the_other():
    labels = torch.arange(40) < 2
    logits = torch.where(labels, 1.0, -2.0).double()
    of_class = [float(cross_entropy_loss(logits[labels == c], labels[labels == c])) for c in (0, 1)]
    value = float(cross_entropy_loss(logits, labels, positive_share=0.05))
    assert value == pytest.approx(sum(of_class) / 2, rel=1e-12)


def test_cross_entropy_at_even_shares_is_the_plain_one():
    logits = torch.randn(8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8) < 3
    plain = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels.float())
    assert torch.equal(cross_entropy_loss(logits, labels), plain)


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 6), d=st.integers(1, 7), seed=st.integers(0, 2**32))
def test_hypersphere_loss_is_its_equation(n, d, seed):
    random = torch.Generator().manual_seed(seed)
    z = torch.randn(n, d, generator=random, dtype=torch.float64)
    centre = torch.randn(d, generator=random, dtype=torch.float64)
    distances = [
        math.fsum((z_k - c_k) ** 2 for z_k, c_k in zip(row, centre.tolist(), strict=True))
        for row in z.tolist()
    ]
    assert float(hypersphere_loss(z, centre)) == pytest.approx(math.fsum(distances) / n, rel=1e-12)


@pytest.mark.parametrize(
    ("logits", "labels", "positive_share", "message"),
    [
        (torch.ones(2, 1), torch.ones(2, 1).bool(), 0.5, r"one shape \[N\].*got \(2, 1\)"),
        (torch.ones(2), torch.ones(3).bool(), 0.5, r"got \(2,\) and \(3,\)"),
        (torch.ones(0), torch.ones(0).bool(), 0.5, "N >= 1"),
        (torch.ones(2), torch.ones(2), 0.5, "booleans, got torch.float32"),
        (torch.ones(2), torch.ones(2).bool(), 0.0, r"positive_share must be in \(0, 1\), got 0.0"),
        (torch.ones(2), torch.ones(2).bool(), 1.0, "got 1.0"),
        (torch.ones(2), torch.ones(2).bool(), math.nan, "got nan"),
    ],
)
def test_wrong_labels_are_refused_by_name(logits, labels, positive_share, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy_loss(logits, labels, positive_share)


@pytest.mark.parametrize(
    ("embeddings", "centre"),
    [
        (torch.ones(3), torch.ones(3)),
        (torch.ones(2, 3), torch.ones(2)),
        (torch.ones(2, 3), torch.ones(1, 3)),
        (torch.ones(0, 3), torch.ones(3)),
        (torch.ones(2, 0), torch.ones(0)),
    ],
)
def test_a_centre_of_another_shape_is_refused(embeddings, centre):
    with pytest.raises(ValueError, match=r"must be \[N, d\] and \[d\]"):
        hypersphere_loss(embeddings, centre)
