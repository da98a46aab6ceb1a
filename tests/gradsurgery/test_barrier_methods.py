"""Nash-MTL and FairGrad: the condition M w = w^(-1/α) on every family, in both versions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conditions import check_balance
from families import COUNTS, FAMILIES, gradients_of
from scipy.optimize import least_squares
from test_invariants import crossings, recorded
from torch._subclasses.fake_tensor import FakeTensorMode

from gradsurgery.kernels import native, tasks
from gradsurgery.methods._barrier import balance
from gradsurgery.methods.fairgrad import FairGrad
from gradsurgery.methods.nash_mtl import NashMTL

every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(params=["native", pytest.param("torch", marks=pytest.mark.slow)])
def version(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "native" and not native.available():
        pytest.skip("was built without a C compiler")
    if request.param == "torch":
        monkeypatch.setattr(tasks, "_runs_native", lambda name, gram: False)
    return request.param


@every_family
@pytest.mark.parametrize(
    "alpha", [1.0, 2.0, *(pytest.param(alpha, marks=pytest.mark.slow) for alpha in (0.5, 5.0))]
)
def test_balance_on_every_family(family: str, alpha: float, version: str) -> None:
    for count in COUNTS if version == "native" else (1, 2, 3, 8, 40):
        gradients = gradients_of(family, count)
        gram = gradients @ gradients.T
        method = NashMTL() if alpha == 1 else FairGrad(alpha)
        check_balance(gram, method.weights(gram), 1 / alpha)


@pytest.mark.slow
@every_family
@pytest.mark.skipif(not native.available(), reason="was built without a C compiler")
@pytest.mark.parametrize("alpha", [0.01, 0.1, 10.0])
def test_balance_with_an_extreme_alpha(family: str, alpha: float) -> None:
    """In C, which takes as many steps as it needs. w of tiny gradients may reach 1e200."""
    for count in COUNTS:
        gradients = gradients_of(family, count)
        gram = gradients @ gradients.T
        check_balance(gram, FairGrad(alpha).weights(gram), 1 / alpha)


@every_family
def test_a_float32_gram_matrix(family: str, version: str) -> None:
    """Rounded to 6e-8, where norms fit into float32; regularised by 4 times eps, 5e-7."""
    if "1e-12" in family:
        pytest.skip("norms that float32 does not hold, squared")
    for count in (1, 2, 3, 8, 40):
        gradients = gradients_of(family, count)
        gram = (gradients @ gradients.T).float()
        # (C + εI) y is the pull, so that ε of the terms may be missing, beside 1e-6.
        check_balance(gram.double(), NashMTL().weights(gram), 1.0, accuracy=2e-6)


@pytest.mark.parametrize("family", ["independent", "agreeing", "conflicting", "zero rows"])
@pytest.mark.parametrize("p", [0.5, 1.0, 2.0])
def test_both_versions_agree(family: str, p: float) -> None:
    """Well-posed: the solution is good to its condition's accuracy times M's condition number."""
    for count in COUNTS:
        gradients = torch.stack([gradients_of(family, count, seed) for seed in range(2)])
        gram = gradients @ gradients.mT
        found = tasks.run("balance", gram, numbers=(p, 1e-12))
        torch.testing.assert_close(found, balance(gram, p, 1e-12), rtol=1e-9, atol=0)
        for one, weights in zip(gram, found, strict=True):
            alone = tasks.run("balance", one, numbers=(p, 1e-12))
            torch.testing.assert_close(alone, weights, rtol=1e-9, atol=0)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_against_a_least_squares_routine(alpha: float, version: str) -> None:
    """The authors' way, to its own tolerance of 1e-12 in each of its three criteria."""
    for family in ("independent", "conflicting"):
        gradients = gradients_of(family, 5)
        gram = (gradients @ gradients.T).numpy()
        tight = {"xtol": 1e-12, "ftol": 1e-12, "gtol": 1e-12}
        wanted = least_squares(
            lambda x, gram=gram: gram @ x - x ** (-1 / alpha),
            np.full(5, 0.5),
            bounds=(1e-9, np.inf),
            **tight,
        ).x
        found = FairGrad(alpha).weights(torch.from_numpy(gram)).numpy()
        np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_the_combined_gradient_of_nash_does_not_depend_on_scales(version: str) -> None:
    """w is homogeneous of degree -1 in each g_i: ‖Gᵀw‖² = Σ_i w_i (Mw)_i = T whatever they are."""
    gradients = gradients_of("conflicting", 5)
    scales = torch.tensor([1e-12, 1.0, 7.0, 1e12, 1e-6], dtype=torch.float64)[:, None]
    plain, scaled = (
        rows.T @ NashMTL().weights(rows @ rows.T) for rows in (gradients, gradients * scales)
    )
    torch.testing.assert_close(plain, scaled, rtol=1e-8, atol=1e-10)
    assert float(plain.norm()) == pytest.approx(5**0.5, rel=1e-9)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("scale", [1e-24, 1e-6, 1e6, 1e24])
def test_a_common_scale_of_m(alpha: float, scale: float, version: str) -> None:
    """c M w' = w'^(-p) has w' = c^(-1/(1 + p)) w."""
    gradients = gradients_of("conflicting", 4)
    gram, p = gradients @ gradients.T, 1 / alpha
    plain, scaled = FairGrad(alpha).weights(gram), FairGrad(alpha).weights(scale * gram)
    torch.testing.assert_close(scaled * scale ** (1 / (1 + p)), plain, rtol=1e-9, atol=0)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_order_of_tasks_and_no_conflict(alpha: float, version: str) -> None:
    """g·g_i = w_i^(-1/α) > 0 for every task."""
    gradients = gradients_of("conflicting", 6)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    first = FairGrad(alpha).weights(gradients @ gradients.T)
    again = FairGrad(alpha).weights(gradients[order] @ gradients[order].T)
    torch.testing.assert_close(again, first[order], rtol=1e-10, atol=0)
    assert (gradients @ (gradients.T @ first) > 0).all()


def test_pareto_stationary_points_are_finite(version: str) -> None:
    """1e-12 ‖y‖² + yᵀCy = T bounds y and the combined gradient, ‖Gᵀw‖² = yᵀCy.

    Rounding of C, up to 6 times 1e-16, may make 1e-3 of those 1e-12.
    """
    for family in ("stationary", "opposite"):
        gradients = gradients_of(family, 6)
        weights = NashMTL().weights(gradients @ gradients.T)
        sizes = weights * gradients.norm(dim=1)
        assert sizes.norm() <= 6**0.5 * 1e6 * (1 + 1e-3)
        assert (gradients.T @ weights).norm() <= 6**0.5


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (3, 8, 8)])
def test_nothing_waits_for_a_device(p: float, shape: tuple[int, ...]) -> None:
    with FakeTensorMode(), recorded() as ours:
        balance(torch.zeros(shape, device="cuda", dtype=torch.float64), p, 1e-12)
    assert crossings(ours) == []


@pytest.mark.parametrize("bad", [0, -1.0, float("nan"), 1e-3, 10.1, 1e10])
def test_alpha_out_of_range(bad: float) -> None:
    with pytest.raises(ValueError, match="alpha"):
        FairGrad(bad)


def test_alpha_is_no_number() -> None:
    with pytest.raises(TypeError, match="alpha"):
        FairGrad("2")  # type: ignore[arg-type]
