"""MGDA, UPGrad, DualProj, CAGrad, ConicGrad: optimal on every family, and what each promises.

Conditions are judged in scaled variables y = n∘w, where the matrix C of cosines stands for M, and
beside the sum of the absolute values of their terms: what float64 can promise where they cancel.
"""

from __future__ import annotations

import cvxpy
import numpy as np
import pytest
import quadprog
import torch
import torchjd.aggregation
from families import COUNTS, FAMILIES, gradients_of
from scipy.optimize import nnls
from torch import Tensor

from gradsurgery.kernels import native, tasks
from gradsurgery.methods import MGDA, CAGrad, ConicGrad, DualProj, Method, UPGrad
from gradsurgery.methods._quadratic import noise_of, ridge_of, scale, solve_program

OPTIMAL = 1e-6
METHODS = (MGDA(), UPGrad(), DualProj(), CAGrad(), ConicGrad())
RADII = (0.1, 0.4, 0.9)
COSINES = (0.0, 0.5, 0.9)
every_family = pytest.mark.parametrize("family", FAMILIES)
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


@pytest.fixture(params=["native", pytest.param("torch", marks=pytest.mark.slow)])
def version(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "native" and not native.available():
        pytest.skip("was built without a C compiler")
    if request.param == "torch":
        monkeypatch.setattr(tasks, "_runs_native", lambda name, gram: False)
    return request.param


def cases(family: str, version: str, seeds: int = 1) -> list[Tensor]:
    """G at every T; the slow version at fewer."""
    counts = COUNTS if version == "native" else (1, 2, 3, 8, 40)
    return [gradients_of(family, count, seed) for count in counts for seed in range(seeds)]


def scaled(gradients: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """C, n and y of the tasks that have a gradient, in units of the largest n."""
    assert weights.isfinite().all()
    norms = gradients.norm(dim=1)
    there = norms > 0
    unit = gradients[there] / norms[there, None]
    norms = norms[there] / (norms.max() if there.any() else 1.0)
    return unit @ unit.T, norms, weights[there] * norms


def combined(gradients: Tensor, method: Method) -> Tensor:
    return gradients.T @ method.weights(gradients @ gradients.T)


def check_projection(gradients: Tensor, weights: Tensor) -> None:
    """w = argmin vᵀMv over v >= 1/T: v feasible, d in the dual cone, and no v moved in vain."""
    cosines, norms, y = scaled(gradients, weights)
    least = norms / len(weights)
    product, terms = cosines @ y, cosines.abs() @ y.abs()
    assert (y >= least * (1 - 1e-12)).all()
    assert (product >= -OPTIMAL * terms).all()
    assert ((y - least) / y * product.abs() <= OPTIMAL * terms).all()


@every_family
def test_dualproj_is_optimal(family: str, version: str) -> None:
    for gradients in cases(family, version, seeds=2):
        check_projection(gradients, DualProj().weights(gradients @ gradients.T))


@every_family
def test_upgrad_harms_no_task(family: str, version: str) -> None:
    for gradients in cases(family, version, seeds=2):
        weights = UPGrad().weights(gradients @ gradients.T)
        cosines, norms, y = scaled(gradients, weights)
        assert (y >= norms / len(weights) * (1 - 1e-12)).all()
        assert (cosines @ y >= -OPTIMAL * (cosines.abs() @ y.abs())).all()


@every_family
def test_upgrad_has_one_optimal_projection_per_task(family: str, version: str) -> None:
    """With g_i 1e15 times as long as the others, all projections but its own are rounding."""
    for gradients in cases(family, version):
        count = len(gradients)
        for i in {0, count // 2, count - 1}:
            unit = torch.nn.functional.normalize(gradients, dim=1)
            if not unit[i].any():
                continue
            unit[i] *= 1e15
            weights = UPGrad().weights(unit @ unit.T) * count
            cosines, _, y = scaled(unit, weights)
            there = unit.norm(dim=1) > 0
            start = torch.where(torch.arange(count)[there] == i, 1.0, 0.0)
            product, terms = cosines @ y, cosines.abs() @ y.abs()
            # Every other task's own projection comes in with 1e-15, and T of them.
            assert (product >= -OPTIMAL * terms).all()
            moved = (y - start).clamp(min=0)
            assert (moved * product.abs() <= OPTIMAL * moved.max() * terms + 1e-12).all()


@every_family
def test_mgda_is_optimal(family: str, version: str) -> None:
    """w on the simplex, (Mw)_i >= wᵀMw, with equality where w_i > 0."""
    for gradients in cases(family, version, seeds=2):
        weights = MGDA().weights(gradients @ gradients.T)
        cosines, norms, y = scaled(gradients, weights)
        assert (weights >= 0).all()
        assert float(weights.sum()) == pytest.approx(1, rel=1e-12)
        if len(y) < len(weights):
            assert not y.any()
            continue
        level = (y @ cosines @ y) / norms
        product, terms = cosines @ y, cosines.abs() @ y + level
        assert (product - level >= -OPTIMAL * terms).all()
        assert (y / y.max() * (product - level).abs() <= OPTIMAL * terms).all()


def check_path(cosines: Tensor, norms: Tensor, z: Tensor, d: Tensor) -> float:
    """d = mean + z is the nearest to the mean with C d >= s / n, for the s that is returned.

    A condition's terms are those of its product and the level itself.
    """
    if not z.any():
        return float((norms * (cosines @ d)).min())
    product = cosines @ d
    level = float((z * product).sum() / (z / norms).sum())
    terms = cosines.abs() @ d.abs() + abs(level) / norms
    assert (product - level / norms >= -OPTIMAL * terms).all()
    assert (z / z.max() * (product - level / norms).abs() <= OPTIMAL * terms).all()
    return level


def shortest(gradients: Tensor) -> float:
    """‖g‖ of MGDA beside the norms that it is made of."""
    weights = MGDA().weights(gradients @ gradients.T)
    norms = gradients.norm(dim=1)
    return float((gradients.T @ weights).norm() / (weights * norms).sum().clamp(min=1e-300))


@every_family
def test_cagrad_is_optimal(family: str, version: str) -> None:
    """On the sphere around g_0, or where gradients oppose each other, at level 0 inside."""
    for gradients in cases(family, version):
        for c in RADII if version == "native" else RADII[1:2]:
            weights = CAGrad(c).weights(gradients @ gradients.T)
            cosines, norms, y = scaled(gradients, weights)
            if len(weights) == 1 or not len(y):
                assert (weights == 1 / len(weights)).all()
                continue
            mean = norms / len(weights)
            assert (y >= mean * (1 - 1e-12)).all()
            z = (y - mean).clamp(min=0)
            length = float((z @ cosines @ z).clamp(min=0).sqrt())
            radius = c * float((mean @ cosines @ mean).clamp(min=0).sqrt())
            level = check_path(cosines, norms, z, y)
            # M holds squares, good to 1e-16: lengths are good to 1e-8 of their terms.
            size = float(z.sum() + mean.sum())
            assert length <= radius + OPTIMAL * size
            if length < radius - OPTIMAL * size:
                assert shortest(gradients[gradients.norm(dim=1) > 0]) <= 1e-7
                assert abs(level) <= OPTIMAL * size


@every_family
def test_conicgrad_is_optimal(family: str, version: str) -> None:
    """On the edge of the cone, or MGDA's direction inside, or no direction for all."""
    for gradients in cases(family, version):
        for c in COSINES if version == "native" else COSINES[1:2]:
            weights = ConicGrad(c).weights(gradients @ gradients.T)
            cosines, norms, y = scaled(gradients, weights)
            mean = norms / len(weights)
            e = float((mean @ cosines @ mean).clamp(min=0).sqrt()) if len(y) else 0.0
            if e <= OPTIMAL * mean.sum():
                continue  # all directions are rounding
            # In units of the mean's own part of d.
            y = y / (y / mean).min()
            z = (y - mean).clamp(min=0)
            level = check_path(cosines, norms, z, y)
            length = float((y @ cosines @ y).clamp(min=0).sqrt())
            if length <= OPTIMAL * y.sum():
                continue
            factor = float((weights[gradients.norm(dim=1) > 0] * norms / y).mean())
            # The square of a length is good to 1e-15 of its terms.
            accuracy = 1e-12 + 1e-14 * float(y.sum() / length) ** 2
            accuracy += 1e-14 * float(mean.sum()) ** 2 / e**2
            assert factor * length == pytest.approx(e, rel=accuracy)
            cosine = float(y @ cosines @ mean) / e / length
            assert cosine >= c - accuracy
            if cosine > c + max(accuracy, 1e-6) and (z > 0).any():
                present = gradients[gradients.norm(dim=1) > 0]
                best = combined(present, MGDA())
                if shortest(present) > 1e-6:
                    along = best / best.norm() @ gradients.T @ weights
                    assert float(along) == pytest.approx(float((gradients.T @ weights).norm()))
                else:
                    assert abs(level) <= OPTIMAL * float(y.sum())


@every_family
@every_method
def test_both_versions_give_the_same_gradient(
    family: str, method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The length of the difference beside its terms: M, good to 1e-16, holds squares of lengths."""
    if not native.available():
        pytest.skip("was built without a C compiler")
    for gradients in cases(family, "torch"):
        first = method.weights(gradients @ gradients.T)
        with monkeypatch.context() as patch:
            patch.setattr(tasks, "_runs_native", lambda name, gram: False)
            second = method.weights(gradients @ gradients.T)
        size = ((first.abs() + second.abs()) * gradients.norm(dim=1)).sum()
        assert (gradients.T @ (first - second)).norm() <= 1e-6 * size


@every_family
def test_interior_points_are_optimal(family: str) -> None:
    """z >= 0, Az + q >= 0, z·(Az + q) = 0, for all of UPGrad's programs at once."""
    for count in COUNTS:
        gradients = gradients_of(family, count)
        gradients = gradients[gradients.norm(dim=1) > 0]
        if not len(gradients):
            continue
        cosines, _ = scale(gradients @ gradients.T)
        z = solve_program(cosines.expand(len(cosines), -1, -1), cosines, ridge_of(1e-16))
        slack = z @ cosines + cosines
        terms = z @ cosines.abs() + cosines.abs()
        assert (z >= 0).all()
        assert (slack >= -1e-9 * terms).all()
        largest = z.amax(-1, keepdim=True).clamp(min=1e-300)
        assert (z / largest * slack.abs() <= 1e-9 * terms).all()


well_posed = pytest.mark.parametrize("seed", range(3))
sizes = pytest.mark.parametrize("count", [2, 5, 12])


def well_posed_gradients(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, 20, generator=generator, dtype=torch.float64)
    return rows * torch.rand(count, 1, generator=generator, dtype=torch.float64).mul(2).exp()


@well_posed
@sizes
def test_projections_against_nnls(count: int, seed: int, version: str) -> None:
    """min ‖Gᵀ(u + z)‖ over z >= 0; TorchJD has the same convention, the mean over tasks."""
    gradients = well_posed_gradients(count, seed)
    gram, rows = gradients @ gradients.T, gradients.numpy()

    def projected(u: np.ndarray) -> np.ndarray:
        return u + nnls(rows.T, -rows.T @ u)[0]

    wanted = np.mean([projected(u) for u in np.eye(count)], axis=0)
    np.testing.assert_allclose(UPGrad().weights(gram).numpy(), wanted, rtol=1e-9)
    wanted = projected(np.full(count, 1 / count))
    np.testing.assert_allclose(DualProj().weights(gram).numpy(), wanted, rtol=1e-9)
    # It adds 1e-4 to the diagonal of M, once its trace is 1.
    peers = {
        UPGrad(): torchjd.aggregation.UPGradWeighting(),
        DualProj(): torchjd.aggregation.DualProjWeighting(),
    }
    for ours, theirs in peers.items():
        torch.testing.assert_close(ours.weights(gram), theirs(gram), rtol=2e-2, atol=2e-2)


@well_posed
@sizes
def test_mgda_against_quadprog(count: int, seed: int, version: str) -> None:
    gram = well_posed_gradients(count, seed) @ well_posed_gradients(count, seed).T
    simplex = np.vstack([np.ones(count), np.eye(count)]).T
    wanted = quadprog.solve_qp(
        gram.numpy(), np.zeros(count), simplex, np.r_[1.0, np.zeros(count)], meq=1
    )[0]
    np.testing.assert_allclose(MGDA().weights(gram).numpy(), wanted, rtol=1e-8, atol=1e-10)


@well_posed
@sizes
def test_cagrad_against_a_conic_solver(count: int, seed: int, version: str) -> None:
    """Its problem as stated, over d. Clarabel promises 1e-8 of the value: 1e-4 of d, at its top."""
    gradients = well_posed_gradients(count, seed)
    mean = gradients.numpy().mean(0)
    for c in RADII:
        d, level = cvxpy.Variable(20), cvxpy.Variable()
        ball = cvxpy.norm(d - mean) <= c * np.linalg.norm(mean)
        problem = cvxpy.Problem(cvxpy.Maximize(level), [gradients.numpy() @ d >= level, ball])
        problem.solve(solver=cvxpy.CLARABEL)
        found = combined(gradients, CAGrad(c))
        assert float((gradients @ found).min()) == pytest.approx(level.value, rel=1e-6, abs=1e-6)
        np.testing.assert_allclose(found.numpy(), d.value, atol=1e-3)


@well_posed
@pytest.mark.parametrize("count", [2, 5])
def test_conicgrad_against_a_conic_solver(count: int, seed: int, version: str) -> None:
    """Where some direction of the cone serves all, ‖d‖ <= ‖g_0‖ makes the problem convex."""
    gradients = well_posed_gradients(count, seed)
    mean = gradients.numpy().mean(0)
    size = np.linalg.norm(mean)
    for c in COSINES:
        d, level = cvxpy.Variable(20), cvxpy.Variable()
        bounds = [cvxpy.norm(d) <= size, c * size * cvxpy.norm(d) <= mean @ d]
        problem = cvxpy.Problem(cvxpy.Maximize(level), [gradients.numpy() @ d >= level, *bounds])
        problem.solve(solver=cvxpy.CLARABEL)
        if level.value > 1e-3:
            found = combined(gradients, ConicGrad(c))
            assert float((gradients @ found).min()) == pytest.approx(level.value, rel=1e-6)
            np.testing.assert_allclose(found.numpy(), d.value, atol=1e-3)


def test_cagrad_against_torchjd(version: str) -> None:
    """Whose weights are those of the same d, to the accuracy of its solver."""
    gradients = well_posed_gradients(4, 1)
    peer = torchjd.aggregation.CAGradWeighting(c=0.4, norm_eps=0.0)
    wanted = gradients.T @ peer(gradients @ gradients.T)
    torch.testing.assert_close(combined(gradients, CAGrad(0.4)), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", [UPGrad(), DualProj()], ids=lambda method: method.name)
def test_what_does_not_conflict_stays_the_mean(method: Method, version: str) -> None:
    gradients = gradients_of("agreeing", 8)
    gradients *= torch.linspace(0.1, 9, 8, dtype=torch.float64)[:, None]
    assert (gradients @ gradients.T > 0).all()
    assert method.weights(gradients @ gradients.T).tolist() == [1 / 8] * 8


def test_upgrad_is_linear_under_scaling(version: str) -> None:
    """Of its paper: a task's gradient times a number moves the result along a line."""
    gradients = gradients_of("conflicting", 6)
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(2, 6, 1, generator=generator, dtype=torch.float64)
    parts = [combined(factor * gradients, UPGrad()) for factor in (first, second)]
    torch.testing.assert_close(combined((first + second) * gradients, UPGrad()), sum(parts))


@pytest.mark.parametrize("family", ["stationary", "opposite"])
def test_mgda_is_zero_at_stationary_points(family: str, version: str) -> None:
    for count in (2, 3, 8, 40):
        gradients = gradients_of(family, count)
        found = combined(gradients, MGDA())
        # A length from squares that are good to 1e-16 of norms near 10.
        assert float(found.norm()) <= 1e-6
        assert float(found.norm()) <= 1e-7 * float(gradients.norm(dim=1).max())


def test_a_finished_task_has_all_of_mgda(version: str) -> None:
    gram = torch.tensor([[4.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 1.0]])
    assert MGDA().weights(gram).tolist() == [0.0, 1.0, 0.0]


def test_cagrad_between_opposite_tasks_is_dualproj(version: str) -> None:
    """g_1 = -2 g_0 and a third: no d serves all; what harms none lies within reach for c = 0.9."""
    first, third = torch.eye(2, dtype=torch.float64)
    gradients = torch.stack([first, -2 * first, 3 * third])
    wanted = combined(gradients, DualProj())
    torch.testing.assert_close(combined(gradients, CAGrad(0.9)), wanted)
    near = combined(gradients, CAGrad(0.1))
    mean = gradients.mean(0)
    assert float((near - mean).norm() / mean.norm()) == pytest.approx(0.1)


def test_the_ends_of_their_ranges_are_the_mean(version: str) -> None:
    gram = gradients_of("conflicting", 5) @ gradients_of("conflicting", 5).T
    assert CAGrad(0).weights(gram).tolist() == [0.2] * 5
    assert ConicGrad(1).weights(gram).tolist() == [0.2] * 5


@every_method
def test_a_batch_is_its_elements(method: Method, version: str) -> None:
    kinds = ("independent", "conflicting", "zero rows", "stationary", "one dwarf", "all zero")
    gradients = torch.stack([gradients_of(kind, 7) for kind in kinds])
    gram = (gradients @ gradients.mT).view(3, 2, 7, 7)
    together = method.weights(gram).view(6, 7)
    for rows, mine, element in zip(gradients, together, gram.view(6, 7, 7), strict=True):
        alone = method.weights(element)
        size = (alone.abs() * rows.norm(dim=1)).sum()
        # As between the versions: a batched product rounds in another order.
        assert (rows.T @ (mine - alone)).norm() <= 1e-6 * size


@every_method
@every_family
def test_a_float32_gram_matrix(method: Method, family: str, version: str) -> None:
    """Finite, and as near to the exact d as 4 roundings per entry let a length be, on good rows."""
    for count in (2, 3, 8, 40) if version == "native" else (2, 8):
        gradients = gradients_of(family, count)
        gram = gradients @ gradients.T
        weights = method.weights(gram.float())
        assert weights.isfinite().all()
        assert (weights >= 0).all()
        if family in ("independent", "agreeing", "conflicting"):
            exact = method.weights(gram)
            size = (exact * gradients.norm(dim=1)).sum()
            assert (gradients.T @ (weights - exact)).norm() <= 1e-4 * size


@pytest.mark.parametrize("bad", [-0.1, 1.0, 1.5, float("nan")])
def test_cagrad_refuses_a_ball_that_reaches_zero(bad: float) -> None:
    with pytest.raises(ValueError, match=r"c must be in \[0, 1\)"):
        CAGrad(bad)


@pytest.mark.parametrize("bad", [-0.1, 1.5, float("nan")])
def test_conicgrad_refuses_what_is_no_cosine(bad: float) -> None:
    with pytest.raises(ValueError, match=r"c must be in \[0, 1\]"):
        ConicGrad(bad)


@pytest.mark.parametrize("kind", [CAGrad, ConicGrad])
def test_c_is_a_number(kind: type[CAGrad] | type[ConicGrad]) -> None:
    with pytest.raises(TypeError, match="c must be a number"):
        kind("0.4")  # type: ignore[arg-type]


def test_what_rounding_may_hide() -> None:
    assert ridge_of(1e-16) == 1e-13
    assert ridge_of(1e-7) == pytest.approx(4e-7)
    assert noise_of(1e-16) == pytest.approx(2e-8)
