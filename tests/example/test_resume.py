"""Runs in processes of their own: killed and resumed, they come to the same numbers."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from slam_ags_example.checkpoint import LAST
from slam_ags_example.stages import FILES

SETTINGS = ["--data", "digits", "--bags", "24", "--epochs", "30", "--mil-epochs", "30"]
SAME = ("metrics.json", "pretraining.csv", "mil.csv", "test_bags.csv", "test_cells.csv")
TIMEOUT_S = 240


def start(folder, *options):
    """A run; two threads or one change the order of sums, so it is one."""
    command = [sys.executable, "-m", "slam_ags_example", "run", "--output", str(folder)]
    return subprocess.Popen(
        [*command, *SETTINGS, *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, err
    return out


def wait_for(path, process):
    deadline = time.monotonic() + TIMEOUT_S
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing stopped, and how long it took."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    started_s = time.monotonic()
    finish(start(folder))
    return folder, time.monotonic() - started_s


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_three_kills_at_random_moments_and_a_resume(whole, seed, tmp_path):
    folder, seconds = whole
    draw = random.Random(seed)
    moments_s = [draw.uniform(0.2, 1.0) * seconds for _ in range(3)]
    print(f"kills after {', '.join(f'{moment:.2f}' for moment in moments_s)} s of {seconds:.2f}")
    for moment_s in moments_s:
        process = start(tmp_path / "run", "--resume")
        time.sleep(moment_s)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    out = finish(start(tmp_path / "run", "--resume"))
    assert "cell average precision" in out
    for name in SAME:
        assert (tmp_path / "run" / name).read_bytes() == (folder / name).read_bytes(), name
    expected = {name for names in FILES.values() for name in names} - {"corrupt.txt"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == expected | {
        "config.json",
        "timing.json",
    }


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(whole, tmp_path):
    process = start(tmp_path / "run")
    wait_for(tmp_path / "run" / LAST, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130
    assert err == (
        "slam-ags: error: interrupted: the same command with --resume goes on from here\n"
    )
    assert not (tmp_path / "run" / "metrics.json").exists()
    finish(start(tmp_path / "run", "--resume"))
    for name in SAME:
        assert (tmp_path / "run" / name).read_bytes() == (whole[0] / name).read_bytes(), name


@pytest.mark.slow
def test_a_finished_run_is_left_as_it_is_by_resume(whole):
    folder, _ = whole
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    finish(start(folder, "--resume"))
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed <= {"config.json"}
    assert json.loads((folder / "metrics.json").read_text())["bag"]["n_bags"] == 8
