"""Two processes in a framework train as one process does in a bare loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import framework_jobs
import pytest
import torch
from framework_jobs import STEPS, bare
from launch import Processes
from torch import Tensor

# torch deprecates what Lightning's loop imports from torch.utils._pytree; its advice on workers.
IGNORED = ["ignore:.*LeafSpec.*", "ignore:.*does not have many workers"]
pytestmark = [pytest.mark.filterwarnings(each) for each in IGNORED]


@pytest.fixture(scope="module")
def tolerant() -> Iterator[Processes]:
    """Frameworks warn about themselves; what this library says is looked at elsewhere."""
    processes = Processes(2, warnings_are_errors=False)
    yield processes
    processes.close()


def check(results: list[Tensor], record: Callable[[float], None]) -> None:
    for result in results[1:]:
        assert torch.equal(result, results[0])
    expected = bare()
    distance = float((results[0] - expected).norm() / expected.norm())
    record(distance)
    # Sums over samples in another order, six steps of AdamW in float32.
    assert distance < 1e-6


JOBS: dict[str, Any] = {
    "lightning": framework_jobs.lightning_trainer,
    "fabric": framework_jobs.fabric,
    "accelerate": framework_jobs.accelerate,
    "transformers": framework_jobs.transformers,
}


@pytest.mark.parametrize("name", JOBS)
def test_two_processes(
    tolerant: Processes, name: str, tmp_path: Path, record_distance: Callable[[float], None]
) -> None:
    """Micro-batches and clipping; Fabric and Accelerate with a checkpoint in the middle."""
    check(tolerant(JOBS[name], tmp_path / "state"), record_distance)


@pytest.mark.parametrize("count", [1, 2])
def test_lightning_resumes(
    tolerant: Processes, count: int, tmp_path: Path, record_distance: Callable[[float], None]
) -> None:
    """A checkpoint of two processes, in two and in one."""
    path = tmp_path / "state.ckpt"
    tolerant(framework_jobs.lightning_trainer, path, STEPS // 2)
    arguments = (path, STEPS, True)
    if count == 1:
        results = [framework_jobs.lightning_trainer(*arguments)]
    else:
        results = tolerant(framework_jobs.lightning_trainer, *arguments)
    check(results, record_distance)


def test_transformers_resumes(
    tolerant: Processes, tmp_path: Path, record_distance: Callable[[float], None]
) -> None:
    tolerant(framework_jobs.transformers, tmp_path)
    check(tolerant(framework_jobs.transformers, tmp_path, True), record_distance)
