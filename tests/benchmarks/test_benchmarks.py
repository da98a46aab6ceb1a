"""The benchmarks at tiny sizes: every command leaves whole rows, and failures stay in the file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import gradsurgery
from benchmarks import aggregators, measure, memory, plot, published, table
from benchmarks.__main__ import COMMANDS, main
from benchmarks.models import MODELS, build
from benchmarks.rows import Row, Rows, read

CPU = torch.device("cpu")
TIMES = {"median_ms", "p20_ms", "p80_ms", "runs"}
ORIGIN = {"device", "threads", "torch", "gradsurgery", "python", "commit", "date"}
TINY = {
    "projection": ["--tasks", "2,3", "--width", "1e3"],
    "step": ["--models", "mlp"],
    "overhead": ["--counts", "3"],
    "memory": [],
    "processes": [],
    "peers": ["--tasks", "2", "--width", "100"],
    "scaling": ["--tasks", "2,3", "--width", "100", "--widths", "1e2,1e3", "--counts", "2,3"],
}


def tiny(command: str, path: Path) -> list[Row]:
    assert (
        main([command, "--quick", "--device=cpu", f"--output={path}", *TINY.get(command, ())]) == 0
    )
    return read(path)


def rows_of(seed: int, count: int, width: int = 50) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64)


# ----------------------------------------------------------------------------------- commands


# These say other things than times; they have tests of their own.
OTHERS = {"memory", "metric", "compare"}


def test_steps_that_raise_a_loss_are_counted(tmp_path: Path) -> None:
    rows = tiny("metric", tmp_path / "rows.jsonl")
    assert {(row["optimizer"], row["metric"]) for row in rows} >= {("Adam", "optimizer")}
    assert all(0 <= row["raised"] <= 1 for row in rows)


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - OTHERS))
def test_command_leaves_whole_rows(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tiny(command, tmp_path / "rows.jsonl")
    assert rows
    for row in rows:
        assert row.keys() >= ORIGIN | {"benchmark", "case", "T"}
        # A peer that is not installed is a failure that says so.
        whole = row.keys() >= TIMES or row.keys() >= {"from_ms", "to_ms"}
        assert whole or ("peer" in row and "error" in row)
    assert len({row["date"] for row in rows}) == 1
    assert f"### {rows[0]['benchmark']}" in capsys.readouterr().out


def test_processes_move_what_the_formula_says(tmp_path: Path) -> None:
    rows = [row for row in tiny("processes", tmp_path / "rows.jsonl") if "moved_mb" in row]
    assert {row["case"] for row in rows} == {"one loss", "every row", "surgery, waiting", "surgery"}
    for row in rows:
        # Headers, and agreements of 8 bytes, on rows of 262,144 bytes.
        assert 1 <= row["moved_over_formula"] < 1.05


def test_memory_compares_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def child(*arguments: str) -> dict[str, float]:
        if arguments[1:4] == ("sum", "mlp", "disjoint"):
            raise RuntimeError("child process: killed")
        return {"peak_mib": 130.0 if arguments[1] == "surgery" else 100.0, "row_mib": 10.0}

    monkeypatch.setattr(memory, "in_child", child)
    rows = tiny("memory", tmp_path / "rows.jsonl")
    assert [(row["graph"], row["case"]) for row in rows] == [
        (graph, case) for graph in ("disjoint", "shared") for case in ("sum", "surgery")
    ]
    assert rows[0]["error"] == "RuntimeError: child process: killed"
    assert "over_plain_mib" not in rows[1]
    assert rows[3]["over_plain_mib"] == 30.0
    assert all(row.keys() >= ORIGIN for row in rows)


def test_memory_of_a_process_is_its_peak() -> None:
    numbers = ("2", "4", "8", "1")
    found = measure.in_child("memory-child", "surgery", "mlp", "shared", "cpu", *numbers)
    assert found["peak_mib"] > found["row_mib"] > 0


def test_all_rows_failed_is_exit_status_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    given = ["projection", "--quick", "--device=cpu", "--backend=abacus", f"--output={path}"]
    assert main([*given, "--tasks=2", "--width=10"]) == 0  # the floor was measured
    errors = {row["case"]: row["error"] for row in read(path) if "error" in row}
    assert set(errors) == {"gram", "combine", "gram + combine"}
    assert all(error.startswith("ValueError: backend must be one of") for error in errors.values())
    assert main([*given, "--tasks=2", "--width=1e14"]) == 1
    assert read(path)[-1]["error"].startswith("MemoryError: ")


def test_missing_peer_is_a_failed_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchjd.aggregation", "pytorch_optimizer", "conflictfree.grad_operator"):
        monkeypatch.setitem(sys.modules, name, None)
    for row in tiny("peers", tmp_path / "rows.jsonl"):
        assert ("peer" in row) == ("error" in row)
        assert row.get("error", "ModuleNotFoundError: ").startswith("ModuleNotFoundError: ")


def test_rows_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    first = len(tiny("overhead", path))
    assert len(tiny("overhead", path)) == 2 * first


def test_unknown_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["step", "--models", "mlp,resnet81", f"--output={tmp_path / 'rows.jsonl'}"])
    assert "resnet81" in capsys.readouterr().err


# -------------------------------------------------------------------------------- measurement


def test_ratios_are_medians_of_pairs() -> None:
    times = {"base": [1.0, 10.0, 100.0], "case": [2.0, 10.0, 50.0]}
    found = measure.Measured(times, {}, {})
    assert found.ratio("case", "base") == 1.0  # of 2, 1 and 0.5
    times["base"], times["case"] = [1.0, 2.0, 9.0], [3.0, 4.0, 9.0]
    assert found.ratio("case", "base") == 2.0  # of 3, 2 and 1; the medians' ratio is 2
    times["base"], times["case"] = [1.0, 4.0, 5.0], [6.0, 2.0, 5.0]
    assert found.ratio("case", "base") == 1.0  # of 6, 0.5 and 1; the medians' ratio is 1.25
    assert found.added_ms("case", "base") == 0.0
    assert found.ratio("case", "missing") is None


def test_cases_take_turns_and_the_first_round_does_not_count() -> None:
    calls: list[str] = []
    cases = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    found = measure.alternate(cases, 3, CPU)
    assert calls == ["a", "b"] * 4
    assert [len(times) for times in found.times_ms.values()] == [3, 3]


def test_rounds_end_at_the_time_limit() -> None:
    found = measure.alternate({"a": lambda: None}, 1000, CPU, limit_s=0.0)
    assert len(found.times_ms["a"]) == 3


def test_failing_case_is_out_and_the_others_go_on() -> None:
    def fails() -> None:
        raise RuntimeError("first line\nsecond line")

    def missing() -> measure.Case:
        raise ImportError("no such peer")

    cases = {"good": lambda: None, "bad": fails, "absent": measure.lazily(missing)}
    found = measure.alternate(cases, 2, CPU)
    assert found.row("bad", ratio="good") == {"case": "bad", "error": "RuntimeError: first line"}
    assert found.row("absent")["error"] == "ImportError: no such peer"
    assert found.row("good", ratio="bad")["ratio"] is None
    assert found.row("good")["runs"] == 2


def test_failing_child_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"child process: .*invalid choice"):
        measure.in_child("memory-child", "sum", "no model", "shared", "cpu", "2", "1", "8", "1")


# ----------------------------------------------------------------------------- tables and plots


@pytest.fixture
def made_up(tmp_path: Path) -> list[Row]:
    """Rows of each benchmark that has a plot, and a failure in each."""
    rows = Rows(tmp_path / "rows.jsonl", CPU)
    for benchmark, about in {
        "projection": [{"T": 2, "dtype": "float32"}, {"T": 4, "dtype": "float32"}],
        "scaling/D": [{"T": 4, "D": 10_000}, {"T": 4, "D": 1_000_000}],
        "scaling/batch": [{"model": "mlp", "graph": "shared", "batch": b} for b in (1, 8)],
        "peers/aggregate": [{"T": 2}, {"T": 4}],
        "step": [{"model": "mlp", "graph": "shared", "T": 2, "amp": False}],
    }.items():
        for fields in about:
            for case in ("floor", "surgery"):
                times = measure.summary([1.0, 2.0, 3.0])
                ratios = {"over_ours": 2.0, "over_sum": 20.0, "percent_over_sum": 7.0}
                rows.add(benchmark=benchmark, **fields, case=case, **times, **ratios)
            rows.add(benchmark=benchmark, **fields, case="broken", error="OutOfMemoryError: | so")
    return read(rows.path)


def test_table_shows_failures_and_says_once_what_is_the_same(made_up: list[Row]) -> None:
    text = table.tables(made_up)
    block = text[text.index("### scaling/D") : text.index("### scaling/batch")]
    assert "| D | case | error |" in block
    assert "| 10000 | broken | OutOfMemoryError: \\| so |" in block
    assert "T 4, " in block
    assert "runs 3" in block
    assert torch.__version__ in block


def test_plots_are_made_of_rows_that_have_times(
    made_up: list[Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    paths = plot.plots(made_up, tmp_path / "plots")
    assert [path.stem for path in paths] == [
        "projection-float32",
        "scaling-D",
        "scaling-batch-mlp-shared",
        "peers-aggregate",
        "step-mlp",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    only_failures = [row for row in made_up if "error" in row]
    assert plot.plots(only_failures, tmp_path / "none") == []


def test_table_and_plot_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    tiny("overhead", path)
    shown = capsys.readouterr().out
    assert main(["table", str(path)]) == 0
    assert capsys.readouterr().out == shown
    assert main(["plot", str(path), "--output-dir", str(tmp_path / "plots")]) == 0


# ------------------------------------------------------------------- what is measured, is right


@pytest.mark.parametrize("seed", range(5))
def test_published_loop_agrees_with_ours_for_two_tasks(seed: int) -> None:
    gradients = rows_of(seed, 2)
    gradients[1] -= gradients[0]  # a conflict
    found = published.combine(list(gradients))
    torch.testing.assert_close(found, gradsurgery.aggregate(gradients, "ags"), rtol=1e-10, atol=0)


@pytest.mark.parametrize("seed", range(5))
def test_published_loop_keeps_the_norm_of_the_sum(seed: int) -> None:
    gradients = rows_of(seed, 3)
    gradients[1] -= gradients[0]
    generator = torch.Generator().manual_seed(seed)
    found = published.combine(list(gradients), generator)
    torch.testing.assert_close(found.norm(), gradients.sum(0).norm())
    assert (found - gradients.sum(0)).norm() > 1e-3


def test_published_backward_agrees_with_the_plugin() -> None:
    def gradients(ours: bool) -> list[Tensor | None]:
        problem = build("mlp", "shared", 2, batch=4, pixels=0, device=CPU)
        losses = problem.losses()
        if ours:
            base = torch.optim.SGD(problem.parameters, lr=0.1)
            gradsurgery.AdaptiveGradientSurgery(base, scope="all").backward(losses)
        else:
            published.backward(losses, problem.parameters)
        return [p.grad for p in problem.parameters]

    torch.testing.assert_close(gradients(ours=True), gradients(ours=False), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["torchjd", "pytorch_optimizer", "conflictfree"])
def test_peer_runs_and_pcgrad_agrees(name: str) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(name)
    gradients = rows_of(0, 2)
    gradients[1] -= gradients[0]
    cases = {
        case: run
        for case, run in aggregators.aggregators(gradients).items()
        if aggregators.package_of(case) == name
    }
    assert cases
    for case, run in cases.items():
        found = run()
        if case == "torchjd PCGrad":
            torch.testing.assert_close(found, gradsurgery.aggregate(gradients, "pcgrad"))


@pytest.mark.parametrize("model", MODELS)
def test_models_have_one_loss_per_task_that_reaches_the_trunk(model: str) -> None:
    if model == "resnet18":
        pytest.importorskip("torchvision")
    for graph, batches in (("shared", 1), ("disjoint", 3)):
        problem = build(model, graph, 3, batch=2, pixels=32, device=CPU, amp=True)
        features, losses = problem.forward()
        assert (len(features), len(losses)) == (batches, 3)
        found = torch.autograd.grad(losses[2], list(problem.trunk.parameters()))
        assert sum(g.abs().sum() for g in found) > 0
        assert problem.width == sum(g.numel() for g in found)


def test_module_runs_as_a_command(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    Rows(path, CPU).add(benchmark="step", case="sum", T=2, median_ms=1.0)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "benchmarks", "table", str(path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert "### step" in done.stdout
    assert json.loads(path.read_text())["torch"] == torch.__version__
