"""Pretraining by several processes against one: steps, resume, the command, its messages."""

import json
import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from test_objectives import Exact
from test_pretrain import pretrain_small, small, stop_after

from slam_ags_example.__main__ import main
from slam_ags_example.augment import DigitViews
from slam_ags_example.checkpoint import LAST, read_checkpoint
from slam_ags_example.launch import Launch
from slam_ags_example.objectives import OBJECTIVES
from slam_ags_example.output import read_csv
from slam_ags_example.ranks import rank

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
DIGITS = ["--data", "digits", "--bags", "12", "--seed", "3"]
TIMEOUT_S = 240


# ------------------------------------------------------------------------- several steps


def doubled(objective):
    """The objective with its own head in float64 too."""

    class Doubled(objective):
        def __init__(self, *facts):
            super().__init__(*facts)
            self.double()

    return Doubled


class DoubleViews:
    """Views of digits in float64."""

    centre_is_a_view = False

    def random(self, *args, **more):
        return DigitViews().random(*args, **more).double()

    def centre(self, images):
        return DigitViews().centre(images).double()


def train(settings, double=False, folder=None, resume=False, stop=None):
    """State of the model, and records, of one process or of several; ``stop``: (rank, steps)."""
    more = {"stop_asked": stop_after(stop[1])} if stop and stop[0] == rank() else {}
    if double:
        more |= {"views": DoubleViews(), "dtype": torch.float64}
    exact = {name: doubled(objective) for name, objective in Exact.items()}
    with mock.patch.dict(OBJECTIVES, exact if double else {}):
        try:
            model, records = pretrain_small(small(**settings), folder, resume, **more)
        except KeyboardInterrupt:
            return None
    return model.state_dict(), [record.row() for record in records]


def distance(ours, theirs, name=""):
    """Of the tensor, weights or running statistics, that is furthest off in relative norm."""
    pairs = [(a.double(), theirs[0][name].double()) for name, a in ours[0].items()]
    furthest = max(float((a - b).norm() / b.norm()) for a, b in pairs if b.norm() > 0)
    print(f"{name}: relative distance {furthest:.1e}")
    return furthest


def assert_close(ours, theirs, tolerance, name):
    """Weights and running statistics, then what each epoch recorded."""
    assert distance(ours, theirs, name) < tolerance
    for our_row, their_row in zip(ours[1], theirs[1], strict=True):
        # A cosine near 0 has fewer digits than the gradients that it is made of.
        assert our_row == pytest.approx(their_row, rel=10 * tolerance, abs=tolerance)


# After 12 steps of AdamW, at a learning rate of 3e-3. Processes add up in another order, which is
# 1e-16 or 6e-8 of a value; AdamW divides by the root of the mean square, so a weight whose gradient
# is rounding alone may move by a whole step, and simclr has more such weights than the others.
FLOAT64, FLOAT32 = 1e-10, 1e-3


@pytest.mark.parametrize("double", [True, False], ids=["float64", "float32"])
@pytest.mark.parametrize("method", OBJECTIVES)
def test_two_processes_come_to_what_one_comes_to(method, double, two):
    settings = {"method": method, "epochs": 4}
    first, second = two(train, settings, double)
    assert first[1] == second[1]
    assert all(torch.equal(value, second[0][name]) for name, value in first[0].items())
    name = f"{method}, {'float64' if double else 'float32'}, 12 steps"
    assert_close(first, train(settings, double), FLOAT64 if double else FLOAT32, name)


@pytest.mark.parametrize(
    "settings",
    [{"micro_batches": 2}, {"surgery": "pcgrad", "optimizer": "sgd", "learning_rate": 1e-2}],
    ids=["micro-batches", "pcgrad"],
)
def test_other_settings_come_to_the_same(settings, two):
    ours, _ = two(train, settings, True)
    assert_close(ours, train(settings, True), FLOAT64, str(settings))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_takes_the_same_way(precision, two, tmp_path):
    settings = {"precision": precision, "epochs": 1}
    together, alone = tmp_path / "together", tmp_path / "alone"
    for folder in (together, alone):
        folder.mkdir()
    (ours,) = two(train, settings, False, together)[0][1]
    (theirs,) = train(settings, False, alone)[1]
    # 8 or 11 bits of mantissa, three steps
    for name in ("nt_xent", "norm_nt_xent", "norm_similarity"):
        assert ours[name] == pytest.approx(theirs[name], rel=0.05), name
    if precision == "float16":  # as many steps were skipped: each halves the scale
        scale, of_one = (
            read_checkpoint(folder / LAST)["parts"]["scaler"]["scale"]
            for folder in (together, alone)
        )
        assert 2 * scale == of_one


@pytest.mark.slow
def test_a_process_may_have_no_patch_of_a_kind(three):
    settings = {"batch_size": 4, "epochs": 1}  # two or three patches of a kind in each step
    ours, *_ = three(train, settings, True)
    assert_close(ours, train(settings, True), FLOAT64, "three processes, batches of 4")


# -------------------------------------------------------------------------------- resume


def test_a_run_goes_on_with_another_number_of_processes(two, tmp_path):
    """Two processes, then one, then two, each stopped by the one that is asked to."""
    settings = {"epochs": 4}
    assert two(train, settings, True, tmp_path, False, (1, 4)) == [None, None]
    assert read_checkpoint(tmp_path / LAST)["step"] == 1  # of the second epoch
    assert train(settings, True, tmp_path, True, (0, 4)) is None
    ours, second = two(train, settings, True, tmp_path, True)
    assert ours[1] == second[1]
    assert_close(ours, train(settings, True), FLOAT64, "2, 1 and 2 processes")


# -------------------------------------------------------------------- the command itself


def torchrun(*arguments):
    """Run under torchrun, to the end; its result, whatever the exit code."""
    return subprocess.run(
        [*TORCHRUN, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


def numbers(folder):
    rows = read_csv(folder / "pretraining.csv")
    return [{name: float(value) for name, value in row.items()} for row in rows]


@pytest.mark.slow
def test_torchrun_pretrains_as_one_process_does(tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    for folder in (alone, together):
        assert main(["bags", *DIGITS, "--output", str(folder)]) == 0
    assert main(["pretrain", "--epochs", "2", "--output", str(alone)]) == 0
    options = ["pretrain", "--epochs", "2", "--output", together]
    done = torchrun("-m", "slam_ags_example", *options)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.count("Wrote: ") == 1
    for ours, theirs in zip(numbers(together), numbers(alone), strict=True):
        assert ours == pytest.approx(theirs, rel=FLOAT32, abs=FLOAT32)
    assert {path.name for path in together.iterdir()} == {path.name for path in alone.iterdir()}
    assert json.loads((together / "timing.json").read_text())["pretrain_processes"] == 2
    # what it wrote is any run's
    assert main(["embed", "--output", str(together)]) == 0


@pytest.mark.slow
def test_torchrun_runs_all_stages_and_leaves_a_finished_run_alone(tmp_path):
    options = ["run", *DIGITS, "--epochs", 2, "--mil-epochs", 3, "--output", tmp_path / "run"]
    options += ["--cache", tmp_path / "cache"]
    done = torchrun("-m", "slam_ags_example", *options)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.count("cell average precision") == 1
    before = (tmp_path / "run" / LAST).stat().st_mtime_ns
    assert torchrun("-m", "slam_ags_example", *options, "--resume").returncode == 0
    assert (tmp_path / "run" / LAST).stat().st_mtime_ns == before


FAILING = """
import os, sys
from slam_ags_example import data
from slam_ags_example.cli import main
from slam_ags_example.config import InputError
read, calls = data.ImageSet.read, []

def read_some(self, rows):
    calls.append(rows)
    if os.environ["RANK"] == sys.argv[1] and len(calls) == 5:
        raise {error}
    return read(self, rows)

data.ImageSet.read = read_some
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize(
    ("error", "last_line"),
    [
        ('InputError("bad.png cannot be read")', "slam-ags: error: bad.png cannot be read"),
        ('RuntimeError("no memory")', "RuntimeError: no memory"),
    ],
)
def test_one_process_that_fails_ends_all_with_one_message(failing, error, last_line, tmp_path):
    (tmp_path / "failing.py").write_text(FAILING.format(error=error))
    assert main(["bags", *DIGITS, "--output", str(tmp_path / "run")]) == 0
    options = ["pretrain", "--epochs", 9, "--output", tmp_path / "run"]
    done = torchrun(tmp_path / "failing.py", failing, *options)
    assert done.returncode != 0
    said, _, _ = done.stderr.partition("torch/distributed/elastic")  # then torchrun's own report
    assert last_line in said.splitlines()
    assert said.count("slam-ags: error") + said.count("Traceback (most") == 1, done.stderr
    assert not (tmp_path / "run" / "pretraining.csv").exists()


@pytest.fixture
def as_rank_0(monkeypatch):
    """This process as the first of two, whose other one never comes."""
    launch = Launch(rank=0, local_rank=0, local_size=2, size=2, store=dist.HashStore())
    monkeypatch.setattr(Launch, "of_environment", lambda: launch)
    return launch


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bags"], "`slam-ags bags` runs in one process: start it without torchrun"),
        (["embed"], "`slam-ags embed` runs in one process: start it without torchrun"),
        (["study"], "`slam-ags study` runs in one process: start it without torchrun"),
        (["run", "--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["run", "--device", "cuda:1"], "--device cuda:1 cannot be shared by 2 processes: pass"),
        (["run", "--device", "mps"], "several processes run on --device cpu or cuda, got mps"),
        (["run", "--device", "cuda"], "2 processes need 2 CUDA devices, there are 1: start fewer"),
    ],
)
def test_what_several_processes_cannot_do_is_one_line(
    arguments, message, as_rank_0, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert main([*arguments, "--output", str(tmp_path / "new")]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "new").exists()
    assert as_rank_0.wait_for_call() is None  # the other one may go


def test_the_second_to_fail_is_silent(as_rank_0, capsys):
    as_rank_0.say_once("first")
    as_rank_0.say_once("second")
    assert capsys.readouterr().err == "first\n"


def test_processes_without_torchrun_are_refused_in_one_line(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert main(["pretrain", "--output", "nowhere"]) == 2
    captured = capsys.readouterr()
    assert "several processes are started by torchrun: " in captured.err
    assert "RANK expected, but not set" in captured.err
    assert captured.err.count("\n") == 1
