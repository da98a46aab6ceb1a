"""The comparison: its problems are what they say, its tuning is fair, its report adds up."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import compare, compare_report, problems
from benchmarks.problems import PROBLEMS, Digits, Oscillator, Pareto
from benchmarks.rows import Row, Rows, read
from gradsurgery import methods

pytest.importorskip("sklearn")

CPU = torch.device("cpu")
TINY: dict[str, Any] = {
    "problems": ["pareto"],
    "methods": ["ags", "mean"],
    "steps": 5,
    "rates": 2,
    "seeds": 2,
    "validation_seeds": 1,
    "rounds": 1,
    "jobs": 1,
    "device": CPU,
}


def measured(path: Path, **changes: Any) -> list[Row]:
    compare.run(Rows(path, CPU), **TINY | changes)
    return read(path)


def without_times(rows: list[Row]) -> list[Row]:
    """Only what was trained for a given number of steps."""
    dropped = ("date", "step_ms", "over_sum")
    return [
        {key: value for key, value in row.items() if key not in dropped}
        for row in rows
        if row["budget"] == "steps"
        and (row["case"] != compare.SUM or row["steps"] == TINY["steps"])
    ]


@pytest.fixture
def plan() -> compare._Plan:
    return compare._plan("pareto", 5, 2, 2, 1, 1)


# ------------------------------------------------------------------------------------ problems


@pytest.mark.parametrize("name", PROBLEMS)
def test_problem_has_what_it_says(name: str) -> None:
    kind = PROBLEMS[name]
    problem = kind(3)
    losses = problem.losses()
    assert tuple(losses) == kind.objectives
    assert tuple(problem.evaluate("validation")) == kind.metrics
    assert all(len(own) == len(kind.objectives) for own in kind.weights)
    assert (1.0,) * len(kind.objectives) in kind.weights
    again = kind(3)
    assert [x.item() for x in again.losses().values()] == [x.item() for x in losses.values()]
    assert kind(4).losses() != losses


def test_no_digit_is_in_two_splits() -> None:
    from sklearn.datasets import load_digits

    # Images may be equal by chance, so it is counted: each of the data set is used once.
    images = torch.cat([images for images, _ in problems._images().values()])
    every = torch.tensor(load_digits().images, dtype=torch.float32) / 16
    assert sorted(images.flatten(1).tolist()) == sorted(every.flatten(1).tolist())


def test_digits_lie_over_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels, classes = problems._overlay("train", 7, generator)
    chosen = torch.randint(997, (2, 7), generator=torch.Generator().manual_seed(0))
    images, targets = problems._images()["train"]
    canvas = pixels.view(7, 10, 12)
    assert torch.equal(canvas[:, :8, :4], images[chosen[0]][:, :, :4])
    assert torch.equal(canvas[:, 2:, 8:], images[chosen[1]][:, :, 4:])
    assert torch.equal(classes, targets[chosen])
    assert Digits(0).evaluate("test")["accuracy"] < 0.25


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9, 1.0])
def test_front_minimizes_the_weighted_losses(share: float) -> None:
    x = torch.zeros(20, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [x], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        first, second = problems._mean_squares(x)
        value = share * first + (1 - share) * second
        value.backward()
        return value

    optimizer.step(loss)
    place = problems._normalized(problems._mean_squares(x.detach()))
    # The sag of a polygon of 4001 points: that of half as many is 2e-6 away from it.
    assert problems.distance_to_front(place) < 1e-5


def test_distance_is_that_along_the_normal() -> None:
    front = problems.front()
    along = front[2100] - front[2099]
    normal = torch.stack([-along[1], along[0]]) / along.norm()  # towards larger losses
    middle = (front[2100] + front[2099]) / 2
    assert (normal > 0).all()
    # What is above a convex front is a convex set: from below, the foot of the normal is nearest.
    below = problems.distance_to_front(middle - 0.1 * normal)
    assert below == pytest.approx(0.1, rel=1e-9)
    above = middle + 0.3 * normal
    nearest = (problems.front(40_001) - above).norm(dim=-1).min().item()
    # A foot may lie between two points of the finer front, which are 2e-4 apart: half of that,
    # squared, over twice the distance is 2e-8; the polygon's sag is 3e-7.
    assert problems.distance_to_front(above) == pytest.approx(nearest, abs=4e-7)


def test_front_is_a_trade_off() -> None:
    front = problems.front()
    torch.testing.assert_close(front[0], front.new_tensor([0.0, 1.0]), rtol=0, atol=1e-12)
    torch.testing.assert_close(front[-1], front.new_tensor([1.0, 0.0]), rtol=0, atol=1e-12)
    assert (front[1:, 0] > front[:-1, 0]).all()
    assert (front[1:, 1] < front[:-1, 1]).all()


def test_jet_is_the_derivatives() -> None:
    problem = Oscillator(0)
    problem.model.double()
    t = torch.linspace(0, 1, 9, dtype=torch.float64, requires_grad=True)
    value = problem.jet(t)[0]
    (first,) = torch.autograd.grad(value.sum(), t, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), t)
    torch.testing.assert_close(problem.jet(t), torch.stack([value, first, second]))


def test_exact_solution_solves_the_equation() -> None:
    t = torch.linspace(0, 1, 9, dtype=torch.float64, requires_grad=True)
    value = problems._displacement(t)
    (first,) = torch.autograd.grad(value.sum(), t, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), t)
    residual = second + 2 * problems._DAMPING * first + problems._FREQUENCY**2 * value
    torch.testing.assert_close(residual, torch.zeros_like(t), rtol=0, atol=1e-11)
    assert (value[0].item(), first[0].item()) == pytest.approx((1, 0))


# --------------------------------------------------------------------------------- contenders


@pytest.mark.parametrize("name", ["ags", "mean", "pcgrad", "gradvac"])
def test_control_has_the_direction_of_the_sum_and_the_length_of_the_method(name: str) -> None:
    gradients = torch.randn(3, 7, generator=torch.Generator().manual_seed(1)).double()
    gradients[1] -= 2 * gradients[0]
    gram = gradients @ gradients.T
    generators = (torch.Generator().manual_seed(5) for _ in range(2))
    own = methods.resolve(name).weights(gram, generator=next(generators))
    control = compare.NormMatched(name).weights(gram, generator=next(generators))
    assert (control == control[0]).all()
    torch.testing.assert_close((control @ gradients).norm(), (own @ gradients).norm())
    if name in compare.KEEP_THE_SUM:
        torch.testing.assert_close(control, torch.ones_like(control))


def test_control_of_gradients_that_cancel_is_finite() -> None:
    gram = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert compare.NormMatched("mean").weights(gram).isfinite().all()


def test_sum_is_plain_training(plan: compare._Plan) -> None:
    found = plan.train(compare._weighted, (0.1, (3.0, 1.0)), 2, "test", [5])[5]
    problem = Pareto(2)
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    for _ in range(5):
        losses = problem.losses()
        optimizer.zero_grad()
        (3 * losses["first"] + losses["second"]).backward()
        optimizer.step()
    assert found == pytest.approx(problem.evaluate("test"), rel=1e-5)  # float32, five steps


def test_earlier_marks_are_those_of_shorter_runs(plan: compare._Plan) -> None:
    long = plan.train(compare._weighted, (0.1, None), 0, "test", [3, 5])
    assert long[3] == plan.train(compare._weighted, (0.1, None), 0, "test", [3])[3]
    assert long[3] != long[5]


def test_divergence_is_a_row_and_keeps_what_came_before(plan: compare._Plan) -> None:
    found = plan.train(compare._weighted, (1e3, None), 0, "test", [1, 200])
    assert "error" not in found[1]
    assert found[200] == {"error": "FloatingPointError: diverged within 200 steps"}


# ------------------------------------------------------------------------------------- tuning


@pytest.mark.parametrize("higher", [True, False])
def test_validation_chooses(
    plan: compare._Plan, higher: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pareto, "higher_is_better", higher)
    a, b, c = ((rate, None) for rate in (0.1, 0.2, 0.3))
    scores = {(a, 5): 1.0, (b, 5): 2.0, (b, 9): 0.0}
    assert plan.best(scores, [a, b, c], 5) == (b if higher else a)
    assert plan.best(scores, [a, b, c], 9) == b
    assert plan.best(scores, [c], 5) is None


def test_every_contender_gets_as_many_trials_with_other_seeds_than_the_test(
    tmp_path: Path,
) -> None:
    rows = measured(tmp_path / "rows.jsonl", methods=["ags", "mean"])
    trials: dict[str, set[tuple[float, int]]] = {}
    for row in rows:
        if row["split"] == "validation" and row["case"] != compare.GRID:
            trials.setdefault(row["case"], set()).add((row["lr"], row["seed"]))
    assert set(trials) == {compare.SUM, "ags", "mean", "mean: norm-matched sum"}
    assert len(set(map(frozenset, trials.values()))) == 1
    assert len(trials["ags"]) == 2
    for row in rows:
        assert (row["seed"] >= 1000) == (row["split"] == "validation")
    grid = [r for r in rows if r["case"] == compare.GRID and r["split"] == "validation"]
    assert len(grid) == 2 * len(Pareto.weights)
    assert sum(r["case"] == compare.STATIC for r in rows) == 2


def test_sum_gets_the_steps_that_fit_into_the_method_s_time(tmp_path: Path) -> None:
    rows = measured(tmp_path / "rows.jsonl")
    timed = [row for row in rows if row["budget"] == "time"]
    assert {(row["time_of"], row["seed"]) for row in timed} == {
        (name, seed) for name in ("ags", "mean") for seed in (0, 1)
    }
    for row in timed:
        assert row["case"] == compare.SUM
        assert row["steps"] == max(1, round(5 * row["over_sum"]))


@pytest.mark.slow
def test_same_seeds_give_the_same_numbers_in_any_number_of_processes(tmp_path: Path) -> None:
    one, two = (
        measured(tmp_path / f"{jobs}.jsonl", methods=["ags", "random"], jobs=jobs)
        for jobs in (1, 2)
    )
    assert without_times(one) == without_times(two)
    assert len(without_times(one)) > 20


def test_method_that_fails_is_a_row(tmp_path: Path) -> None:
    rows = measured(tmp_path / "rows.jsonl", methods=["pcgard", "mean"])
    failed = [row for row in rows if "error" in row]
    assert {row["case"] for row in failed} == {"pcgard", "pcgard: norm-matched sum"}
    tried = [row for row in failed if row["split"] == "validation"]
    assert all(row["error"].startswith("ValueError: method 'pcgard' is unknown") for row in tried)
    assert "2 of 2: no setting is left" in compare_report.tables(rows)
    assert {row["time_of"] for row in rows if row["budget"] == "time"} == {"mean"}


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "rows.jsonl", CPU)
    with pytest.raises(ValueError, match="problems are digits, pareto, physics; got 'digit'"):
        compare.run(rows, **TINY | {"problems": ["digit"]})
    with pytest.raises(ValueError, match="use --device cpu"):
        compare.run(rows, **TINY | {"device": torch.device("cuda")})


# ------------------------------------------------------------------------------------- report


def test_interval_is_students() -> None:
    found = compare_report.estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found is not None
    assert found.mean == 3
    # t(0.975, 4) = 2.7764 in any table.
    assert found.half == pytest.approx(2.7764 * math.sqrt(2.5 / 5), rel=1e-4)
    assert str(found) == "3.0 ± 2.0"
    assert str(compare_report.estimate([0.5])) == "0.5"
    assert compare_report.estimate([]) is None


def made_up(problem: str, scores: dict[str, list[float]], path: Path) -> list[Row]:
    """Rows of contenders with one score per seed; "sum in time" and "control" are ags's."""
    rows = Rows(path, CPU)
    kind = PROBLEMS[problem]
    for name, values in scores.items():
        about: dict[str, Any] = {"case": name, "budget": "steps"}
        if name == "ags":
            about |= {"method": "ags", "over_sum": 2.0}
        elif name == "sum in time":
            about |= {"case": compare.SUM, "budget": "time", "time_of": "ags"}
        for seed, value in enumerate(values):
            rows.add(
                benchmark="compare",
                problem=problem,
                split="test",
                lr=0.1,
                seed=seed,
                steps=7,
                **about,
                **dict.fromkeys(kind.metrics, value),
            )
    return read(path)


@pytest.mark.parametrize(("problem", "score"), [("digits", "2 : 1"), ("physics", "1 : 2")])
def test_seeds_are_counted_for_the_better_one(problem: str, score: str, tmp_path: Path) -> None:
    scores = {
        compare.SUM: [0.5, 0.5, 0.5],
        "ags": [0.7, 0.6, 0.4],
        "sum in time": [0.9, 0.1, 0.4],
    }
    lines = compare_report.tables(made_up(problem, scores, tmp_path / "r.jsonl")).splitlines()
    equal, controls = (line for line in lines if line.startswith("| ags |"))
    assert f"| +0.07 ± 0.38 | {score} |" in equal
    # In the sum's time one seed each and a tie; AGS has the sum itself for a control.
    assert "| 2.00 | 7 |" in controls
    assert "| 1 : 1 |" in controls
    assert controls.endswith(f"| {score} |")
    order = [line.split(" | ")[0] for line in lines if line.startswith(("| ags", "| tuned"))]
    assert (order[0] == "| ags") == (problem == "digits")


@pytest.mark.parametrize("problem", PROBLEMS)
def test_report_of_a_run(problem: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = measured(tmp_path / "rows.jsonl", problems=[problem], methods=["ags", "mean"])
    text = compare_report.tables(rows)
    assert text.count("| mean |") == text.count("| ags |") == 2
    assert torch.__version__ in text
    paths = compare_report.plots(rows, tmp_path / "plots")
    assert [path.name for path in paths] == [f"compare-{problem}.png"]
    assert paths[0].read_bytes().startswith(b"\x89PNG")
