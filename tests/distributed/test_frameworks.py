"""Two processes in a framework train as one process does in a bare loop."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import framework_jobs
import pytest
import torch
from framework_data import HALF, STEPS, bare, like_torchrun
from framework_jobs import JOBS
from launch import Processes
from torch import Tensor

# torch deprecates what Lightning's loop imports from torch.utils._pytree; its advice on workers.
IGNORED = ["ignore:.*LeafSpec.*", "ignore:.*does not have many workers"]
pytestmark = [pytest.mark.filterwarnings(each) for each in IGNORED]


@pytest.fixture(scope="module")
def workers() -> Iterator[Processes]:
    """Frameworks warn about themselves; what this library says is an error under torchrun."""
    processes = Processes(2, warnings_are_errors=False)
    yield processes
    processes.close()


@pytest.fixture
def tolerant(workers: Processes) -> Processes:
    """Whatever test came before, if any."""
    workers(like_torchrun)
    return workers


def check(
    results: list[Tensor], record: Callable[[float], None], *, by_items: bool = False
) -> None:
    for result in results[1:]:
        assert torch.equal(result, results[0])
    expected = bare(by_items)
    distance = float((results[0] - expected).norm() / expected.norm())
    record(distance)
    # Sums over samples in another order, six steps in float32.
    assert distance < 1e-6


@pytest.mark.parametrize("name", JOBS)
def test_two_processes(
    tolerant: Processes, name: str, tmp_path: Path, record_distance: Callable[[float], None]
) -> None:
    """Micro-batches, clipping, a schedule; Fabric and Accelerate load a checkpoint half-way."""
    check(tolerant(JOBS[name], tmp_path / "state"), record_distance)


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_under_torchrun(
    name: str, tmp_path: Path, record_distance: Callable[[float], None]
) -> None:
    """The same where the framework itself makes the group, before the plugin asks for it."""
    path = tmp_path / "state"
    launcher = "torch.distributed.run --standalone --nproc-per-node 2"
    done = subprocess.run(
        [sys.executable, "-m", *launcher.split(), framework_jobs.__file__, name, str(path)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    check([torch.load(f"{path}.rank{rank}") for rank in range(2)], record_distance)


@pytest.mark.parametrize("count", [1, 2])
def test_lightning_resumes(
    tolerant: Processes, count: int, tmp_path: Path, record_distance: Callable[[float], None]
) -> None:
    """A checkpoint of two processes, in two and in one."""
    path = tmp_path / "state.ckpt"
    tolerant(framework_jobs.lightning_trainer, path, HALF)
    arguments = (path, STEPS, True)
    if count == 1:
        results = [framework_jobs.lightning_trainer(*arguments)]
    else:
        tolerant(like_torchrun)
        results = tolerant(framework_jobs.lightning_trainer, *arguments)
    check(results, record_distance)


def test_transformers_resumes(
    tolerant: Processes, tmp_path: Path, record_distance: Callable[[float], None]
) -> None:
    tolerant(framework_jobs.transformers, tmp_path)
    check(tolerant(framework_jobs.transformers, tmp_path, True), record_distance)


def test_transformers_counts_labels(
    tolerant: Processes, tmp_path: Path, record_distance: Callable[[float], None]
) -> None:
    """Sums over num_items_in_batch, where one rank has more labels than the other."""
    results = tolerant(framework_jobs.transformers, tmp_path, False, True)
    check(results, record_distance, by_items=True)
