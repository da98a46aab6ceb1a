"""Nash-MTL, FairGrad, IMTL-G, ConFIG, Aligned-MTL, GradOPS: optimal on every family.

Conditions are judged in scaled variables y = n∘w, where the matrix C of cosines stands for M, and
beside the sum of the absolute values of their terms: what float64 can promise where they cancel.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import COUNTS, FAMILIES, gradients_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradsurgery.kernels import native, tasks
from gradsurgery.methods import IMTLG, AlignedMTL, ConFIG, FairGrad, GradOPS, NashMTL, Rescaled

OPTIMAL = 1e-6
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(params=["native", pytest.param("torch", marks=pytest.mark.slow)])
def version(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "native" and not native.available():
        pytest.skip("was built without a C compiler")
    if request.param == "torch":
        monkeypatch.setattr(tasks, "_runs_native", lambda name, gram: False)
    return request.param


def cases(family: str, version: str) -> list[Tensor]:
    """G at every T; the slow version at fewer."""
    counts = COUNTS if version == "native" else (1, 2, 3, 8, 40)
    return [gradients_of(family, count) for count in counts]


def scaled(gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """C and n of the tasks that have a gradient, and which these are."""
    norms = gradients.norm(dim=1)
    there = norms > 0
    unit = gradients[there] / norms[there, None]
    return unit @ unit.T, norms[there], there


def check_balance(gradients: Tensor, weights: Tensor, p: float) -> None:
    """M w = w^(-p), w > 0."""
    cosines, norms, there = scaled(gradients)
    assert weights.isfinite().all()
    assert not weights[~there].any()
    y = weights[there] * norms
    assert (y > 0).all()
    wanted = norms ** (p - 1) * y**-p
    terms = cosines.abs() @ y + wanted
    assert ((cosines @ y - wanted).abs() <= OPTIMAL * terms).all()


@every_family
def test_nash_balances(family: str, version: str) -> None:
    for gradients in cases(family, version):
        check_balance(gradients, NashMTL().weights(gradients @ gradients.T), 1.0)


@every_family
@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_fairgrad_balances(family: str, alpha: float, version: str) -> None:
    for gradients in cases(family, version):
        weights = FairGrad(alpha).weights(gradients @ gradients.T)
        check_balance(gradients, weights, 1 / alpha)


def test_fairgrad_is_nash_at_one(version: str) -> None:
    gradients = gradients_of("conflicting", 8)
    gram = gradients @ gradients.T
    assert torch.equal(FairGrad(1.0).weights(gram), NashMTL().weights(gram))


def test_nash_does_not_depend_on_the_scale_of_a_loss(version: str) -> None:
    """Its promise: the same combined gradient however the losses are scaled."""
    gradients = gradients_of("independent", 5)
    other = gradients * torch.tensor([1e-3, 1.0, 7.0, 1e4, 1e-6], dtype=torch.float64)[:, None]
    found = [rows.T @ NashMTL().weights(rows @ rows.T) for rows in (gradients, other)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-10)
    # ‖Gᵀw‖² = Σ_i w_i (Mw)_i = T.
    assert float(found[0].norm()) == pytest.approx(5**0.5, rel=1e-8)


def test_nash_where_tasks_oppose_each_other_is_finite(version: str) -> None:
    gradients = gradients_of("opposite", 6)
    weights = NashMTL().weights(gradients @ gradients.T)
    assert weights.isfinite().all()
    assert (weights * gradients.norm(dim=1) < 1.01e6).all()


def pseudo_inverse_times_one(cosines: Tensor) -> tuple[Tensor, float]:
    """C⁺1, and how accurate float64 can make it."""
    values, vectors = np.linalg.eigh(cosines.numpy())
    kept = values > 1e-10 * values.max()
    y = torch.from_numpy(vectors[:, kept] / values[kept] @ vectors[:, kept].sum(0))
    return y, OPTIMAL + 1e-14 * float(values.max() / values[kept].min())


# Where the rank is not clear, least squares has several answers: see test_spectral_methods.
CLEAR = [family for family in FAMILIES if family != "rank one and noise"]


@pytest.mark.parametrize("family", CLEAR)
def test_imtl_g_and_config_look_the_same_way(family: str, version: str) -> None:
    """C y = 1 by least squares; IMTL-G sums to 1, ConFIG is as long as the projections together."""
    for gradients in cases(family, version):
        cosines, norms, there = scaled(gradients)
        gram = gradients @ gradients.T
        impartial, config = IMTLG().weights(gram), ConFIG().weights(gram)
        assert impartial.isfinite().all()
        assert config.isfinite().all()
        if not there.any():
            continue
        y, accuracy = pseudo_inverse_times_one(cosines)
        product = cosines @ y
        # Normal equations of least squares: C (C y - 1) = 0, for what is not counted as zero.
        size = float(y.abs().max())
        z = config[there] * norms
        square = float(y @ product)
        if square > 1e-6 * size:
            factor = float((norms * product).sum()) / square
            assert ((z - factor * y).abs() <= accuracy * abs(factor) * size).all()
        total = float((y / norms).sum())
        if abs(total) > 1e-6 * float((y / norms).abs().sum()):
            found = impartial[there] * norms
            assert ((found - y / total).abs() <= accuracy * size / abs(total)).all()
            assert float(impartial.sum()) == pytest.approx(1, rel=1e-9)


def test_config_has_equal_positive_cosines(version: str) -> None:
    gradients = gradients_of("conflicting", 7)
    combined = gradients.T @ ConFIG().weights(gradients @ gradients.T)
    cosines = gradients @ combined / gradients.norm(dim=1) / combined.norm()
    assert cosines.min() > 0
    assert (cosines - cosines.mean()).abs().max() < 1e-9
    projections = (gradients @ combined / combined.norm()).sum()
    assert float(combined.norm()) == pytest.approx(float(projections), rel=1e-9)


def test_imtl_g_has_equal_projections(version: str) -> None:
    gradients = gradients_of("conflicting", 7) * 3
    combined = gradients.T @ IMTLG().weights(gradients @ gradients.T)
    projections = gradients @ combined / gradients.norm(dim=1)
    assert (projections - projections.mean()).abs().max() < 1e-9 * projections.abs().max()


# Their singular values lie so far apart that their squares, M's eigenvalues, meet its rounding.
TOO_FAR = {"nearly opposite", "nearly equal", "one giant", "one dwarf"}


@pytest.mark.parametrize("family", [f for f in FAMILIES if "1e-12" not in f and f not in TOO_FAR])
def test_aligned_gradients_are_orthogonal_and_equally_long(family: str, version: str) -> None:
    """From the singular values of G itself, not from M."""
    for gradients in cases(family, version):
        weights = AlignedMTL().weights(gradients @ gradients.T)
        assert weights.isfinite().all()
        u, sizes, v = np.linalg.svd(gradients.numpy(), full_matrices=False)
        # M's eigenvalues are squares: what is below 1e-8 of the largest is lost in them.
        kept = sizes > 1e-7 * max(sizes.max(), 1e-300)
        if not kept.any():
            continue
        aligned = sizes[kept].min() * u[:, kept] @ v[kept]
        wanted = aligned.mean(0)
        found = (gradients.T @ weights).numpy()
        worst = sizes[kept].max() / sizes[kept].min()
        scale = sizes[kept].min()
        assert np.abs(found - wanted).max() <= 1e-13 * worst**2 * scale + 1e-9 * scale


@every_family
def test_gradops_conflicts_with_nobody(family: str, version: str) -> None:
    for gradients in cases(family, version):
        weights = GradOPS().weights(gradients @ gradients.T)
        assert weights.isfinite().all()
        combined = gradients.T @ weights
        norms = gradients.norm(dim=1)
        terms = (weights.abs() * norms).sum()
        assert (gradients @ combined >= -OPTIMAL * norms * terms).all()


def by_projection(gradients: Tensor) -> Tensor:
    """GradOPS one gradient at a time, by least squares on the others."""
    total = torch.zeros_like(gradients[0])
    for i, row in enumerate(gradients):
        others = torch.cat([gradients[:i], gradients[i + 1 :]])
        if (others @ row < 0).any():
            fit = np.linalg.lstsq(others.T.numpy(), row.numpy(), rcond=None)[0]
            row = row - others.T @ torch.from_numpy(fit)
        total += row
    return total


@settings(max_examples=30, deadline=None)
@given(count=st.integers(2, 6), width=st.integers(2, 9), seed=st.integers(0, 999))
def test_gradops_is_its_definition(count: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(count, width, generator=generator, dtype=torch.float64)
    combined = gradients.T @ GradOPS().weights(gradients @ gradients.T)
    # Least squares loses the square of the condition number, as inverting M does.
    loss = 1e-12 * float(np.linalg.cond(gradients[:, : max(width, 1)].numpy())) ** 2
    assert (combined - by_projection(gradients)).abs().max() <= 1e-9 + min(loss, 1e-3)


def test_rescaled_gives_any_of_them_the_length_of_the_sum(version: str) -> None:
    gradients = gradients_of("conflicting", 5)
    for method in (NashMTL(), FairGrad(), AlignedMTL(), ConFIG()):
        combined = gradients.T @ Rescaled(method).weights(gradients @ gradients.T)
        assert float(combined.norm()) == pytest.approx(float(gradients.sum(0).norm()), rel=1e-9)
        alone = gradients.T @ method.weights(gradients @ gradients.T)
        cosine = combined @ alone / combined.norm() / alone.norm()
        assert float(cosine) == pytest.approx(1, abs=1e-12)
