"""IMTL-G, ConFIG, GradOPS, Aligned-MTL: their conditions on every family, in both versions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchjd.aggregation
from conditions import (
    FAMILIES_TO_PROJECT,
    RANKS,
    WELL_POSED,
    barely_dependent,
    check_aligned,
    check_equal_angles,
    check_no_conflict,
    check_opposite,
    check_partly_dependent,
    check_projections,
    cosines_of,
)
from families import COUNTS, FAMILIES, gradients_of
from test_invariants import crossings, recorded
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gradsurgery.kernels import native, tasks
from gradsurgery.methods import resolve
from gradsurgery.methods._base import Method
from gradsurgery.methods._spectral import basis_of, pseudo_solve
from gradsurgery.methods.aligned_mtl import AlignedMTL, align
from gradsurgery.methods.config import ConFIG, equal_angles
from gradsurgery.methods.gradops import GradOPS, project_out
from gradsurgery.methods.imtl_g import IMTLG, equal_projections

METHODS = (IMTLG(), ConFIG(), GradOPS(), AlignedMTL())
TORCHJD = {
    ConFIG: torchjd.aggregation.ConFIG(),
    IMTLG: torchjd.aggregation.IMTLG(),
    AlignedMTL: torchjd.aggregation.AlignedMTL(),
}
# Rounding times M's condition number, up to 1e4, several times over.
CLOSE = {"rtol": 1e-8, "atol": 1e-8}
every_family = pytest.mark.parametrize("family", FAMILIES)
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
well_posed = pytest.mark.parametrize("family", WELL_POSED)


@pytest.fixture(params=["native", pytest.param("torch", marks=pytest.mark.slow)])
def version(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "native" and not native.available():
        pytest.skip("was built without a C compiler")
    if request.param == "torch":
        monkeypatch.setattr(tasks, "_runs_native", lambda name, gram: False)
    return request.param


def cases(family: str, version: str) -> list[Tensor]:
    counts = COUNTS if version == "native" else (1, 2, 3, 8, 40)
    return [gradients_of(family, count) for count in counts]


def combined(gradients: Tensor, method: Method) -> Tensor:
    return gradients.T @ method.weights(gradients @ gradients.T)


# ------------------------------------------------------------ IMTL-G and ConFIG


@every_family
def test_pseudo_inverse_times_one(family: str, version: str) -> None:
    for gradients in cases(family, version):
        gram = gradients @ gradients.T
        check_equal_angles(gradients, IMTLG().weights(gram), ConFIG().weights(gram))


@well_posed
def test_config_has_equal_positive_cosines(family: str, version: str) -> None:
    for count in (2, 7, 40):
        gradients = gradients_of(family, count)
        found = combined(gradients, ConFIG())
        unit = torch.nn.functional.normalize(gradients, dim=1)
        cosines = unit @ found / found.norm()
        assert cosines.min() > 0
        # Float64 rounding times M's condition number, up to 1e4 here.
        assert (cosines / cosines.mean() - 1).abs().max() < 1e-10
        assert float(found.norm()) == pytest.approx(float((gradients @ found).sum() / found.norm()))


@well_posed
def test_imtl_g_and_config_against_their_definitions(family: str, version: str) -> None:
    """C⁺ from NumPy. TorchJD has ConFIG's conventions, and IMTL-G's where C is regular."""
    for count in (2, 7, 40):
        gradients = gradients_of(family, count)
        gram = gradients @ gradients.T
        torch.testing.assert_close(
            combined(gradients, ConFIG()),
            torchjd.aggregation.ConFIG()(gradients),
            rtol=1e-8,
            atol=1e-8,
        )
        cosines, norms, _ = cosines_of(gradients)
        w = torch.from_numpy(np.linalg.pinv(cosines.numpy()).sum(0)) / norms
        torch.testing.assert_close(IMTLG().weights(gram), w / w.sum(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(
            combined(gradients, IMTLG()),
            torchjd.aggregation.IMTLG()(gradients),
            rtol=1e-8,
            atol=1e-8,
        )


def test_opposite_gradients_have_no_common_direction(version: str) -> None:
    gradients = gradients_of("opposite", 6)
    assert not IMTLG().weights(gradients @ gradients.T).any()
    assert combined(gradients, ConFIG()).norm() == 0


@pytest.mark.parametrize("name", ["imtl_g", "config"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("factor", [1.0, 1.01, 3.0])
def test_opposite_gradients_in_any_precision(name: str, dtype: torch.dtype, factor: float) -> None:
    """Losses L and -factor L: only rounding has a direction, and it counts as none."""
    step = {"imtl_g": equal_projections, "config": equal_angles}[name]
    eps = torch.finfo(dtype).eps

    def by_torch(gram: Tensor) -> Tensor:
        return step(gram.double(), max(8 * eps, 1e-10), 8 * eps)

    for seed in range(20):
        for weights in (resolve(name).weights, by_torch):
            check_opposite(weights, factor, dtype, seed)


def test_pseudo_solve_of_dependent_gradients() -> None:
    """Against NumPy: both are good to rounding times the condition number on the range, 1e3."""
    for count, rank in ((3, 1), (8, 3), (40, 13)):
        generator = torch.Generator().manual_seed(count)
        rows = torch.randn(2, count, rank, generator=generator, dtype=torch.float64)
        unit = torch.nn.functional.normalize(rows, dim=-1)
        cosines = unit @ unit.mT
        right = torch.randn(2, count, generator=generator, dtype=torch.float64)
        tolerance = 1e-10
        basis = basis_of(cosines, tolerance)
        assert basis.kept.sum(-1).tolist() == [rank, rank]
        torch.testing.assert_close(basis.factor @ basis.factor.mT, cosines, rtol=0, atol=1e-13)
        wanted = torch.linalg.pinv(cosines, rtol=1e-10) @ right[..., None]
        found = pseudo_solve(basis, right)
        torch.testing.assert_close(found, wanted[..., 0], rtol=1e-8, atol=1e-9)


# ------------------------------------------------------------------ Aligned-MTL


@pytest.mark.parametrize(("family", "ranks"), RANKS)
def test_aligned_mtl_to_many_digits(family: str, ranks: dict[int, int], version: str) -> None:
    for count, rank in ranks.items():
        gradients = gradients_of(family, count)
        check_aligned(gradients, AlignedMTL().weights(gradients @ gradients.T), rank)


def test_aligned_mtl_of_gradients_that_are_dependent_up_to_rounding() -> None:
    """One longer gradient would be 1e25 times a shorter one that rounding made independent."""
    gram = barely_dependent()
    for weights in (AlignedMTL().weights(gram), align(gram, 8 * torch.finfo(gram.dtype).eps)):
        assert weights.isfinite().all()
        # None of its parts is longer than the weakest component.
        assert (weights.abs() * gram.diagonal().sqrt()).max() <= 1e-6


@well_posed
def test_aligned_mtl_as_torchjd(family: str, version: str) -> None:
    """Its eigenvectors are good to rounding times M's condition number."""
    for count in (2, 4, 5, 16, 64):
        gradients = gradients_of(family, count)
        torch.testing.assert_close(
            combined(gradients, AlignedMTL()),
            torchjd.aggregation.AlignedMTL()(gradients),
            rtol=1e-8,
            atol=1e-9,
        )


@every_family
def test_aligned_mtl_is_no_longer_than_any_gradient(family: str, version: str) -> None:
    """‖mean of Ĝ‖ = σ_min ‖V Uᵀ 1‖ / T <= σ_min / sqrt(T), and σ_min <= sqrt(T) times a norm."""
    for gradients in cases(family, version):
        weights = AlignedMTL().weights(gradients @ gradients.T)
        assert weights.isfinite().all()
        length = float((gradients.T @ weights).norm())
        assert length <= float(gradients.norm(dim=1).max()) * (1 + 1e-9)


# ---------------------------------------------------------------------- GradOPS


@pytest.mark.parametrize("family", FAMILIES_TO_PROJECT)
def test_gradops_is_its_definition(family: str, version: str) -> None:
    for count in (1, 2, 3, 8, 40):
        gradients = gradients_of(family, count)
        check_projections(gradients, GradOPS().weights(gradients @ gradients.T))


@every_family
def test_gradops_conflicts_with_no_gradient(family: str, version: str) -> None:
    for gradients in cases(family, version):
        check_no_conflict(gradients, GradOPS().weights(gradients @ gradients.T))


def test_gradops_where_some_gradients_depend_on_each_other() -> None:
    """Two are independent and conflict, two are opposite: (0.8, 0.4, 0) + (0, 2, 0)."""
    for weights in (GradOPS().weights, lambda gram: project_out(gram, 1e-10, 1e-15)):
        check_partly_dependent(weights)


# ------------------------------------------------------------------ all of them


@every_method
def test_order_of_tasks(method: Method, version: str) -> None:
    for family in (*WELL_POSED, "norms 1e-12 to 1e12", "stationary", "zero rows"):
        gradients = gradients_of(family, 8)
        order = torch.tensor([3, 1, 7, 5, 0, 2, 4, 6])
        first = method.weights(gradients @ gradients.T) * gradients.norm(dim=1)
        other = gradients[order]
        again = method.weights(other @ other.T) * other.norm(dim=1)
        size = first.abs().max()
        assert (again - first[order]).abs().max() <= 1e-8 * size


@every_method
@pytest.mark.parametrize("scale", [1e-24, 1e-6, 1e6, 1e24])
def test_a_common_scale(method: Method, scale: float, version: str) -> None:
    for family in (*WELL_POSED, "stationary", "zero rows"):
        gradients = gradients_of(family, 6)
        gram = gradients @ gradients.T
        plain, scaled = method.weights(gram), method.weights(scale * gram)
        torch.testing.assert_close(scaled, plain, rtol=1e-8, atol=1e-8 * float(plain.abs().max()))


STEPS = (
    ("imtl_g", equal_projections, (1e-10, 1e-14)),
    ("config", equal_angles, (1e-10, 1e-14)),
    ("gradops", project_out, (1e-10, 1e-15)),
    ("aligned_mtl", align, (1e-13,)),
)


@pytest.mark.skipif(not native.available(), reason="was built without a C compiler")
@pytest.mark.parametrize(
    ("name", "plain", "numbers"), STEPS, ids=lambda x: x if isinstance(x, str) else ""
)
@pytest.mark.parametrize(
    "family",
    [*WELL_POSED, "zero rows", "equal", "one giant", "one dwarf", "norms 1e-12 to 1e12"],
)
def test_both_versions_agree(
    name: str, plain: object, numbers: tuple[float, ...], family: str
) -> None:
    """As gradients w_i g_i; also a batch and its elements."""
    for count in COUNTS:
        gradients = torch.stack([gradients_of(family, count, seed) for seed in range(2)])
        gram, norms = gradients @ gradients.mT, gradients.norm(dim=-1)
        found = tasks.run(name, gram, numbers=numbers)
        wanted = plain(gram, *numbers)  # type: ignore[operator]
        size = (wanted.abs() * norms).amax(-1, keepdim=True)
        assert ((found - wanted).abs() * norms <= 1e-8 * size).all()
        for one, weights, scale in zip(gram, wanted, size, strict=True):
            alone = plain(one, *numbers)  # type: ignore[operator]
            assert ((alone - weights).abs() * one.diagonal().sqrt() <= 1e-9 * scale).all()


@every_method
def test_a_float32_gram_matrix(method: Method, version: str) -> None:
    """Its rounding, 6e-8, times M's condition number, up to 1e3."""
    for family in FAMILIES:
        if "1e-12" in family:
            continue
        for count in (1, 2, 3, 8, 40):
            gradients = gradients_of(family, count)
            gram = gradients @ gradients.T
            found = method.weights(gram.float())
            assert found.isfinite().all()
            if family in WELL_POSED and count < 40:
                torch.testing.assert_close(found, method.weights(gram), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("name", "plain", "numbers"), STEPS, ids=lambda x: x if isinstance(x, str) else ""
)
@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (3, 8, 8)])
def test_nothing_waits_for_a_device(
    name: str, plain: object, numbers: tuple[float, ...], shape: tuple[int, ...]
) -> None:
    with FakeTensorMode(), recorded() as ours:
        plain(torch.zeros(shape, device="cuda", dtype=torch.float64), *numbers)  # type: ignore[operator]
    assert crossings(ours) == []
    # Nor may a copy from the host be captured in a CUDA graph.
    mixed = [n for n, i, out in ours.calls if len({x.device.type for x in (*i, *out)}) > 1]
    assert mixed == []
