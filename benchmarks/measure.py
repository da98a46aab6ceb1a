"""Timings of cases that take turns, what they are compared with, and the memory they may have."""

from __future__ import annotations

import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "Case",
    "Measured",
    "alternate",
    "describe",
    "in_child",
    "lazily",
    "require_memory",
    "summary",
]

Case = Callable[[], object]

_LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Measured:
    """What `alternate` found. Case by case the i-th time is of the i-th round."""

    times_ms: dict[str, list[float]]
    errors: dict[str, str]
    """Why a case has no times."""
    peak_rise_mib: dict[str, float]
    """CUDA only: the highest allocation during a run over that at its start."""

    def ratio(self, case: str, base: str) -> float | None:
        """Median over rounds of one time over the other of the same round."""
        pairs = zip(self.times_ms.get(case, []), self.times_ms.get(base, []), strict=False)
        ratios = [a / b for a, b in pairs]
        return round(statistics.median(ratios), 3) if ratios else None

    def added_ms(self, case: str, base: str) -> float | None:
        """Median over rounds of the difference."""
        pairs = zip(self.times_ms.get(case, []), self.times_ms.get(base, []), strict=False)
        differences = [a - b for a, b in pairs]
        return round(statistics.median(differences), 4) if differences else None

    def row(self, case: str, **bases: str) -> dict[str, Any]:
        """Fields of a results row: times, and one ratio for each `field="base case"`."""
        if case in self.errors:
            return {"case": case, "error": self.errors[case]}
        fields = {"case": case, **summary(self.times_ms[case])}
        if case in self.peak_rise_mib:
            fields["peak_rise_mib"] = round(self.peak_rise_mib[case], 1)
        return fields | {field: self.ratio(case, base) for field, base in bases.items()}


def alternate(
    cases: Mapping[str, Case], rounds: int, device: torch.device, *, limit_s: float = 60.0
) -> Measured:
    """Run all cases in turn, `rounds` times, after one round that does not count.

    On a shared machine the speed drifts; what is compared has to be measured side by side. A case
    that raises is out, with its error; the others go on. Past `limit_s` no round is begun beyond
    the third.
    """
    found = Measured({name: [] for name in cases}, {}, {})
    begin = time.perf_counter()
    for turn in range(rounds + 1):
        if turn > _LEAST_ROUNDS and time.perf_counter() - begin > limit_s:
            break
        for name, case in cases.items():
            if name in found.errors:
                continue
            try:
                taken_ms, rise_mib = _run_once(case, device)
            except Exception as error:
                found.errors[name] = describe(error)
                del found.times_ms[name]
                continue
            if turn:
                found.times_ms[name].append(taken_ms)
            if turn and rise_mib is not None:
                found.peak_rise_mib[name] = max(rise_mib, found.peak_rise_mib.get(name, 0.0))
    return found


def _run_once(case: Case, device: torch.device) -> tuple[float, float | None]:
    """Milliseconds, and MiB on CUDA."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    start = time.perf_counter()
    case()
    if cuda:
        torch.cuda.synchronize(device)
    taken_ms = (time.perf_counter() - start) * 1e3
    return taken_ms, (torch.cuda.max_memory_allocated(device) - before) / 2**20 if cuda else None


def lazily(make: Callable[[], Case]) -> Case:
    """A case that is made by its first call: one that cannot be made is then a case that fails."""
    made = functools.cache(make)
    return lambda: made()()


def summary(times_ms: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile, and the number of runs."""
    fifths = (
        statistics.quantiles(times_ms, n=5, method="inclusive")
        if len(times_ms) > 1
        else times_ms * 4
    )
    return {
        "median_ms": round(statistics.median(times_ms), 4),
        "p20_ms": round(fifths[0], 4),
        "p80_ms": round(fifths[3], 4),
        "runs": len(times_ms),
    }


def describe(error: Exception) -> str:
    """The error's type and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"


def require_memory(size: int, device: torch.device) -> None:
    """Raise MemoryError where `size` bytes are more than half of what is free on the device."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free_host_memory()
    if free is not None and size > free / 2:
        raise MemoryError(f"{size / 2**30:.1f} GiB is over half of the {free / 2**30:.1f} GiB free")


def _free_host_memory() -> int | None:
    info = Path("/proc/meminfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def in_child(*arguments: str) -> dict[str, Any]:
    """Run `python -m benchmarks ARGUMENTS` in a process of its own; its last line is JSON."""
    command = [sys.executable, "-m", "benchmarks", *arguments]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(f"child process: {said[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
