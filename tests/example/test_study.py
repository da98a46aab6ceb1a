"""The grid of runs: resumed after any kill, strict about settings, failing cell by cell."""

import csv
import fcntl
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from slam_ags_example.config import InputError, RunConfig
from slam_ags_example.study import Study, failures, run_study, tables
from slam_ags_example.study.rows import CHANCE, MEASURES

# A module in the place of slam_ags_example: it leaves a run's files without a run. A file named
# fail-METHOD, die-METHOD or hang-METHOD beside it tells it to do that instead.
FAKE_RUNNER = """
import json, os, pathlib, signal, sys, time
here = pathlib.Path(__file__).parent
arguments = sys.argv[1:]
assert arguments[0] == "run" and "--resume" in arguments
option = lambda name: pathlib.Path(arguments[arguments.index(name) + 1])
config = json.loads(option("--config").read_text())["config"]
output, method = option("--output"), config["method"]
call = {"method": config["surgery"] or method, "wr": config["witness_rate"], "seed": config["seed"],
        "pid": os.getpid(), "begun": (output / "config.json").exists(),
        "cache": str(option("--cache")), "threads": os.environ["OMP_NUM_THREADS"]}
with (here / "calls").open("a") as file:
    file.write(json.dumps(call) + "\\n")
output.mkdir(parents=True, exist_ok=True)
(output / "config.json").write_text(json.dumps({"config": config}))
if (here / f"hang-{method}").exists():
    (here / f"hangs-{os.getpid()}").touch()
    time.sleep(600)
if (here / f"fail-{method}").exists():
    print("first line\\nslam-ags: error: the loss is not finite: lower --lr", file=sys.stderr)
    print("standard output, which is not the error")
    sys.exit(1)
if (here / f"die-{method}").exists():
    os.kill(os.getpid(), signal.SIGKILL)
value = len(method) / 20 + config["witness_rate"] + config["seed"] / 100
names = ["f1", "auroc", "balanced_accuracy"]
cell = ["average_precision", "precision_at_positives", "recall_at_k"]
chance = lambda names: {f"{name}_chance": 0.25 for name in names}
metrics = {
    "bag": {**dict.fromkeys(names, value), **chance(names)},
    "cell": {**dict.fromkeys(cell, value), **chance(cell),
             "top_k": {"k": 5, "positives": 2 * value, "chance": 0.5}},
    "pretraining": {"epochs": 1, "effective_rank": 3.0, "feature_std": 0.5},
}
timing = {"pretrain_s": 1.5, "mil_s": 0.25, "patches_per_s": 1000.0}
(output / "timing.json").write_text(json.dumps(timing))
(output / "metrics.json").write_text(json.dumps(metrics))
(output / "report.html").touch()
"""
METHODS_HERE = ("slam-ags", "slam-ags:pcgrad", "simclr")
KILLED_STUDY = """
import sys
from pathlib import Path
from slam_ags_example.config import RunConfig
from slam_ags_example.study import Study, run_study
study = Study(RunConfig(), ["slam-ags", "simclr"], [0.1], [0, 1])
run_study(study, Path(sys.argv[1]), jobs=2, runner="fake_runner")
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """The folder with the fake runner, which every Python process finds as ``fake_runner``."""
    folder = tmp_path / "fake"
    folder.mkdir()
    (folder / "fake_runner.py").write_text(FAKE_RUNNER)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


def grid(methods=METHODS_HERE, rates=(0.1, 0.01), seeds=(0, 1), **base):
    return Study(RunConfig(**base), methods, rates, seeds)


def run(study, output, **options):
    return run_study(study, output, **{"jobs": 2, "runner": "fake_runner", **options})


def calls(fake):
    path = fake / "calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# The grid.


def test_cells_on_the_same_images_stand_together_and_whole_seeds_come_first():
    cells = grid().cells()
    assert [(cell.config.seed, cell.config.witness_rate, cell.label) for cell in cells] == list(
        itertools.product((0, 1), (0.1, 0.01), METHODS_HERE)
    )
    assert cells[0].folder.as_posix() == "cells/wr0.1/slam-ags/seed0"
    assert cells[4].folder.as_posix() == "cells/wr0.01/slam-ags_pcgrad/seed0"
    assert len({cell.folder for cell in cells}) == len(cells)
    assert [cell.config.surgery for cell in cells[:3]] == ["ags", "pcgrad", None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ["slam-agz"]}, "did you mean slam-ags"),
        ({"methods": ["slam-ags:pcgrd"]}, "did you mean pcgrad"),
        ({"methods": ["simclr:ags"]}, "leave --surgery ags out"),
        ({"methods": ["slam-ags:"]}, "--surgery must be one of"),
        ({"methods": ["slam-ags", "slam-ags:ags"]}, "methods hold slam-ags twice"),
        ({"rates": [0.1, 0]}, "--witness-rate must be in (0, 1]"),
        ({"rates": [1, 1.0]}, "witness rates hold 1.0 twice"),
        ({"seeds": []}, "needs seeds"),
        ({"seeds": [-1]}, "--seed must"),
    ],
)
def test_a_wrong_grid_is_refused_in_one_line(change, message):
    with pytest.raises(InputError) as caught:
        grid(**change)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# Running it.


def test_every_cell_runs_once_and_ends_in_a_row(fake, tmp_path):
    output, seen = tmp_path / "study", []
    rows = run(grid(), output, on_cell=seen.append)
    assert sorted(map(repr, seen)) == sorted(map(repr, rows))
    assert [(r.label, r.witness_rate, r.seed) for r in rows] == [
        (cell.label, cell.config.witness_rate, cell.config.seed) for cell in grid().cells()
    ]
    assert rows[0].measures["cell_average_precision"] == 8 / 20 + 0.1
    assert rows[0].measures["positives_at_k"] == 2 * (8 / 20 + 0.1)
    assert rows[0].measures["conflict_rate"] is None
    assert rows[0].chance == dict.fromkeys(CHANCE, 0.25) | {"positives_at_k": 0.5}
    assert {(r.seconds, r.error) for r in rows} == {(1.75, None)}

    made = calls(fake)
    assert len(made) == 12
    assert {call["cache"] for call in made} == {str(output / "cache")}
    assert not any(call["begun"] for call in made)
    written = read_csv(output / "rows.csv")
    assert [(r["method"], r["surgery"]) for r in written[:3]] == [
        ("slam-ags", "ags"),
        ("slam-ags", "pcgrad"),
        ("simclr", ""),
    ]
    names = ["method", "surgery", "witness_rate", "seed", *MEASURES]
    assert list(written[0]) == [*names, *(f"{name}_chance" for name in CHANCE), "seconds", "error"]
    assert float(written[0]["bag_f1"]) == rows[0].measures["bag_f1"]
    assert written[0]["conflict_rate"] == ""
    assert {"summary.csv", "table.md", "figure.png", "figure.svg"} <= set(os.listdir(output))
    # Where all is finished, the same call runs nothing and says the same.
    before = {name: (output / name).read_bytes() for name in ("rows.csv", "table.md", "figure.svg")}
    assert run(grid(), output) == rows
    assert len(calls(fake)) == 12
    assert {name: (output / name).read_bytes() for name in before} == before


@pytest.mark.parametrize(("given_threads", "jobs"), [(None, 1), (None, 10_000), ("3", 1)])
def test_jobs_share_the_cpus_unless_told_otherwise(
    given_threads, jobs, fake, tmp_path, monkeypatch
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given_threads:
        monkeypatch.setenv("OMP_NUM_THREADS", given_threads)
    run(grid(["simclr"], [0.1], [0]), tmp_path / "study", jobs=jobs)
    expected = given_threads or ("1" if jobs > 1 else str(len(os.sched_getaffinity(0))))
    assert calls(fake)[0]["threads"] == expected


def test_a_grid_may_grow_and_shrink_in_one_folder(fake, tmp_path):
    output = tmp_path / "study"
    run(grid(["slam-ags"], [0.1], [0]), output)
    assert len(run(grid(["slam-ags", "simclr"], [0.1, 0.05], [0, 1]), output)) == 8
    assert len(calls(fake)) == 8
    assert len(run(grid(["simclr"], [0.05], [1]), output)) == 1
    assert len(calls(fake)) == 8
    # Nothing but methods, witness rates and seeds was asked of the base's own.
    run(grid(["simclr"], [0.05], [1], method="ws-sil", witness_rate=0.5, seed=9), output)
    assert len(calls(fake)) == 8


def test_other_settings_are_refused_and_the_first_difference_is_named(fake, tmp_path):
    output = tmp_path / "study"
    run(grid(["simclr"], [0.1], [0], epochs=7), output)
    stored = (output / "study.json").read_bytes()
    with pytest.raises(InputError, match="epochs is 7 there and 8 here") as caught:
        run(grid(["simclr"], [0.1], [0], epochs=8, batch_size=128), output)
    assert "\n" not in str(caught.value)
    assert (output / "study.json").read_bytes() == stored

    there = output / "cells" / "wr0.1" / "simclr" / "seed0" / "config.json"
    content = json.loads(there.read_text())
    content["config"]["temperature"] = 0.5
    there.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"simclr/seed0 .* temperature is 0.5 there and 0.07 here"):
        run(grid(["simclr"], [0.1], [0], epochs=7), output)
    assert len(calls(fake)) == 1


def test_a_failing_cell_is_a_row_and_is_tried_again(fake, tmp_path):
    output, study = tmp_path / "study", grid(["slam-ags", "simclr", "random"], [0.1], [0, 1])
    (fake / "fail-simclr").touch()
    (fake / "die-random").touch()
    rows = run(study, output)
    of = {(r.label, r.seed): r for r in rows}
    assert of["simclr", 0].error == "the loss is not finite: lower --lr"
    assert of["random", 1].error == "killed by signal 9 (Killed)"
    assert of["slam-ags", 1].error is None
    assert (of["simclr", 0].measures, of["simclr", 0].seconds) == ({}, None)
    assert len(failures(rows)) == 4
    assert "simclr, witness rate 0.1, seed 0: the loss is not finite" in failures(rows)[0]
    assert failures(rows)[0] in (output / "table.md").read_text(encoding="utf-8")
    assert read_csv(output / "rows.csv")[1]["error"] == of["simclr", 0].error
    methods = {line["method"] for line in read_csv(output / "summary.csv")}
    assert methods == {"slam-ags"}

    (fake / "fail-simclr").unlink()
    (fake / "die-random").unlink()
    assert all(r.error is None for r in run(study, output))
    again = calls(fake)[6:]
    assert sorted(call["method"] for call in again) == ["random", "random", "simclr", "simclr"]
    assert all(call["begun"] for call in again)


def test_where_every_cell_fails_there_is_no_table_and_no_figure(fake, tmp_path):
    (fake / "fail-simclr").touch()
    rows = run(grid(["simclr"], [0.1], [0]), tmp_path / "study")
    assert len(failures(rows)) == 1
    assert tables(rows, "simclr") == []
    assert not (tmp_path / "study" / "figure.png").exists()


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "what was waited for did not happen"
        time.sleep(0.02)


def is_alive(pid):
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as file:  # a zombie has ended
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    return False


needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc to see who is alive")


@needs_proc
def test_ctrl_c_ends_the_runs_and_says_how_to_go_on(fake, tmp_path):
    (fake / "hang-simclr").touch()

    def interrupt(row):
        wait_for(lambda: list(fake.glob("hangs-*")))
        signal.raise_signal(signal.SIGINT)

    study = grid(["slam-ags", "simclr"], [0.1], [0, 1])
    with pytest.raises(KeyboardInterrupt, match="with 1 of 4 runs finished: the same command"):
        run(study, tmp_path / "study", on_cell=interrupt)
    assert [is_alive(call["pid"]) for call in calls(fake)] == [False] * len(calls(fake))
    (fake / "hang-simclr").unlink()
    assert all(r.error is None for r in run(study, tmp_path / "study"))


@needs_proc
def test_a_killed_study_leaves_no_process_and_goes_on_at_the_same_call(fake, tmp_path):
    output = tmp_path / "study"
    (fake / "hang-simclr").touch()
    study = subprocess.Popen([sys.executable, "-c", KILLED_STUDY, str(output)])
    wait_for(lambda: len(list(fake.glob("hangs-*"))) == 2)
    study.kill()
    study.wait(timeout=30)
    wait_for(lambda: not any(is_alive(call["pid"]) for call in calls(fake)))
    first = sorted((call["method"], call["seed"]) for call in calls(fake))
    assert first == [("ags", 0), ("ags", 1), ("simclr", 0), ("simclr", 1)]

    (fake / "hang-simclr").unlink()
    rows = run(grid(["slam-ags", "simclr"], [0.1], [0, 1]), output)
    assert [r.error for r in rows] == [None] * 4
    again = [(call["method"], call["begun"]) for call in calls(fake)[4:]]
    assert again == [("simclr", True)] * 2


def test_a_second_study_does_not_come_between(fake, tmp_path):
    output = tmp_path / "study"
    output.mkdir()
    with (output / "study.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # shared: the study has to want it alone
        with pytest.raises(InputError, match="a study is at work there"):
            run(grid(["simclr"], [0.1], [0]), output)
    assert len(run(grid(["simclr"], [0.1], [0]), output)) == 1
    assert len(calls(fake)) == 1


def test_wrong_input_of_a_study_is_refused(fake, tmp_path):
    study = grid(["simclr"], [0.1], [0])
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        run(study, tmp_path / "file")
    with pytest.raises(InputError, match="cannot be written"):
        run(study, tmp_path / "file" / "below")
    with pytest.raises(InputError, match="--jobs must be at least 1, got 0"):
        run(study, tmp_path / "study", jobs=0)
    with pytest.raises(InputError, match="the reference must be one of"):
        run(study, tmp_path / "study", reference="slam-ags")
    assert not (tmp_path / "study").exists()
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "study.json").write_text("{")
    with pytest.raises(InputError, match=r"study\.json is damaged: remove it"):
        run(study, tmp_path / "study")
    assert calls(fake) == []
