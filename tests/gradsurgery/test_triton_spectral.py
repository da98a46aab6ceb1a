"""Solvers in one Triton launch against the CPU's, and against what their weights have to fulfil.

On a GPU, or in Triton's interpreter on the CPU: `test_triton_builds.py` runs this file in a process
with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conditions import (
    FAMILIES_TO_PROJECT,
    RANKS,
    WELL_POSED,
    barely_dependent,
    check_aligned,
    check_balance,
    check_equal_angles,
    check_no_conflict,
    check_opposite,
    check_partly_dependent,
    check_projections,
)
from families import FAMILIES, gradients_of
from torch import Tensor

pytest.importorskip("triton")

from gradsurgery.kernels import _backend, native, tasks, triton_rows, triton_tasks
from gradsurgery.methods import IMTLG, AlignedMTL, ConFIG, FairGrad, GradOPS, NashMTL

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.skipif(
        not (INTERPRETED or torch.cuda.is_available()),
        reason="needs a CUDA device, or TRITON_INTERPRET=1",
    ),
    # The interpreter computes with NumPy, which warns: of infinity minus infinity, of old habits.
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]
DEVICE = "cpu" if INTERPRETED else "cuda"
COUNTS = (1, 2, 3, 8) if INTERPRETED else (1, 2, 3, 8, 16, 40, 64)
ALPHAS = (1.0, 2.0) if INTERPRETED else (0.1, 0.5, 1.0, 2.0, 5.0)
STEPS = {
    "balance": (0.5, 1e-12),
    "imtl_g": (1e-10, 1e-14),
    "config": (1e-10, 1e-14),
    "gradops": (1e-10, 1e-15),
    "aligned_mtl": (1e-13,),
}
METHODS = (NashMTL(), FairGrad(), IMTLG(), ConFIG(), GradOPS(), AlignedMTL())
COMPARED = [
    (name, family)
    for name in STEPS
    for family in (*WELL_POSED, "zero rows", "few dimensions", "one giant")
    # There only the ridge makes w unique, so that rounding moves it.
    if (name, family) != ("balance", "few dimensions")
]
every_family = pytest.mark.parametrize("family", FAMILIES)
every_step = pytest.mark.parametrize("name", STEPS)


@pytest.fixture(autouse=True)
def no_fallback(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A kernel that fails would be replaced by torch ops, and its test would pass."""
    monkeypatch.setattr(_backend, "_refused", None)
    yield
    assert _backend._refused is None


def weights(method: Any, gram: Tensor) -> Tensor:
    found: Tensor = method.weights(gram.to(DEVICE)).cpu()
    return found


def on_the_cpu(name: str, gram: Tensor, numbers: tuple[float, ...]) -> Tensor:
    """By C, or where that was not built by torch ops."""
    if native.function(f"gradsurgery_step_{name}") is not None:
        return tasks._native(name, gram, [], numbers)
    found: Tensor = tasks._plain[name](gram, *numbers)
    return found


@every_step
def test_a_step_is_one_launch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []

    def launch(kernel: Any, *arguments: Any, **constants: Any) -> None:
        launched.append(kernel.__name__)
        original(kernel, *arguments, **constants)

    original = triton_rows.launch
    monkeypatch.setattr(triton_tasks, "launch", launch)
    gram = torch.eye(3, dtype=torch.float64, device=DEVICE).expand(2, 2, 3, 3)
    assert tasks._triton(name, gram) is tasks._triton_steps()[name]
    assert tasks.run(name, gram, numbers=STEPS[name]).shape == (2, 2, 3)
    assert launched == [f"{name}_one"]


@pytest.mark.parametrize(("name", "family"), COMPARED)
def test_as_on_the_cpu(name: str, family: str) -> None:
    """As gradients w_i g_i: rounding times M's condition number on its range, 1e4, several times.

    Also a batch and its elements, to the last digit.
    """
    for count in COUNTS:
        gradients = torch.stack([gradients_of(family, count, seed) for seed in range(2)])
        gram, norms = gradients @ gradients.mT, gradients.norm(dim=-1)
        found = tasks.run(name, gram.to(DEVICE), numbers=STEPS[name]).cpu()
        wanted = on_the_cpu(name, gram, STEPS[name])
        size = (wanted.abs() * norms).amax(-1, keepdim=True)
        assert ((found - wanted).abs() * norms <= 1e-8 * size).all()
        alone = tasks.run(name, gram[1].to(DEVICE), numbers=STEPS[name]).cpu()
        assert torch.equal(alone, found[1])


@every_step
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so(name: str, bad: float) -> None:
    for count in COUNTS:
        gradients = gradients_of("independent", count)
        gram = (gradients @ gradients.T).repeat(3, 1, 1)
        gram[1, -1, 0] = bad
        found = tasks.run(name, gram.to(DEVICE), numbers=STEPS[name])
        assert found[1].isnan().all()
        assert found[[0, 2]].isfinite().all()
        assert torch.equal(found[0], found[2])


@every_family
@pytest.mark.parametrize("alpha", ALPHAS)
def test_balance_on_every_family(family: str, alpha: float) -> None:
    for count in COUNTS:
        gradients = gradients_of(family, count)
        gram = gradients @ gradients.T
        method = NashMTL() if alpha == 1 else FairGrad(alpha)
        check_balance(gram, weights(method, gram), 1 / alpha)


@pytest.mark.parametrize("alpha", [0.01, 10.0])
def test_balance_with_an_extreme_alpha(alpha: float) -> None:
    for family in ("independent", "few dimensions", "conflicting", "one giant"):
        for count in COUNTS:
            gradients = gradients_of(family, count)
            gram = gradients @ gradients.T
            check_balance(gram, weights(FairGrad(alpha), gram), 1 / alpha)


@every_family
def test_pseudo_inverse_times_one(family: str) -> None:
    for count in COUNTS:
        gradients = gradients_of(family, count)
        gram = gradients @ gradients.T
        check_equal_angles(gradients, weights(IMTLG(), gram), weights(ConFIG(), gram))


@pytest.mark.parametrize("method", [IMTLG(), ConFIG()], ids=lambda method: method.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("factor", [1.0, 1.01, 3.0])
def test_opposite_gradients_in_any_precision(
    method: Any, dtype: torch.dtype, factor: float
) -> None:
    for seed in range(20):
        check_opposite(lambda gram: weights(method, gram), factor, dtype, seed)


@pytest.mark.parametrize("family", FAMILIES_TO_PROJECT)
def test_gradops_is_its_definition(family: str) -> None:
    for count in COUNTS:
        gradients = gradients_of(family, count)
        check_projections(gradients, weights(GradOPS(), gradients @ gradients.T))


@every_family
def test_gradops_conflicts_with_no_gradient(family: str) -> None:
    for count in COUNTS:
        gradients = gradients_of(family, count)
        check_no_conflict(gradients, weights(GradOPS(), gradients @ gradients.T))


def test_gradops_where_some_gradients_depend_on_each_other() -> None:
    check_partly_dependent(lambda gram: weights(GradOPS(), gram))


@pytest.mark.parametrize(("family", "ranks"), RANKS)
def test_aligned_mtl_to_many_digits(family: str, ranks: dict[int, int]) -> None:
    for count, rank in ranks.items():
        gradients = gradients_of(family, count)
        check_aligned(gradients, weights(AlignedMTL(), gradients @ gradients.T), rank)


@every_family
def test_aligned_mtl_is_no_longer_than_any_gradient(family: str) -> None:
    """As in `test_spectral_methods`."""
    for count in COUNTS:
        gradients = gradients_of(family, count)
        found = weights(AlignedMTL(), gradients @ gradients.T)
        assert found.isfinite().all()
        length = float((gradients.T @ found).norm())
        assert length <= float(gradients.norm(dim=1).max()) * (1 + 1e-9)


def test_aligned_mtl_of_gradients_that_are_dependent_up_to_rounding() -> None:
    gram = barely_dependent()
    found = weights(AlignedMTL(), gram)
    assert found.isfinite().all()
    assert (found.abs() * gram.diagonal().sqrt()).max() <= 1e-6


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_order_of_tasks(method: Any) -> None:
    for family in ("independent", "conflicting", "stationary", "zero rows"):
        if family == "stationary" and isinstance(method, NashMTL | FairGrad):
            continue
        gradients = gradients_of(family, 8)
        order = torch.tensor([3, 1, 7, 5, 0, 2, 4, 6])
        other, norms = gradients[order], gradients.norm(dim=1)
        first = weights(method, gradients @ gradients.T) * norms
        again = weights(method, other @ other.T) * norms[order]
        assert (again - first[order]).abs().max() <= 1e-8 * first.abs().max()
