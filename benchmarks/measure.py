"""Alternating timings, memory of a child process, and rows that say where they come from."""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["Rows", "alternate", "environment", "summary"]


def alternate(cases: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Run all cases in turn, `rounds` times, after one round that does not count.

    On a shared machine the speed drifts; what is compared has to be measured side by side.

    Returns:
        Milliseconds of every run, by case.
    """
    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(rounds + 1):
        for name, case in cases.items():
            _wait()
            start = time.perf_counter()
            case()
            _wait()
            if turn:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def summary(times: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile, and the number of runs."""
    fifths = (
        statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else [times[0]] * 4
    )
    return {
        "median_ms": round(statistics.median(times), 4),
        "p20_ms": round(fifths[0], 4),
        "p80_ms": round(fifths[3], 4),
        "runs": len(times),
    }


def environment() -> dict[str, Any]:
    """Device, versions, commit and date: what a figure is worth nothing without."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    ).stdout.strip()
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit or "unknown",
        "date": datetime.datetime.now(tz=datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


class Rows:
    """A results file of JSON lines, one row per measured case; new rows are appended."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._environment = environment()

    def add(self, **fields: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({**fields, **self._environment}) + "\n")


def in_child(*arguments: str) -> dict[str, Any]:
    """Run `python -m benchmarks ARGUMENTS` in a process of its own; its last line is JSON."""
    command = [sys.executable, "-m", "benchmarks", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
