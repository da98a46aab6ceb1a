"""The results file: one JSON line per case, each with all that its figures depend on."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import gradsurgery
from benchmarks.measure import describe

__all__ = ["ENVIRONMENT", "Row", "Rows", "read"]

Row = dict[str, Any]

ENVIRONMENT = (
    "device", "threads", "torch", "triton", "gradsurgery", "python", "commit", "date",
)  # fmt: skip


class Rows:
    """Appends rows to a results file; every row of one object carries the same date."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path = path
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.written: list[Row] = []
        self._environment = _environment(device)

    def add(self, *, peer: str | None = None, **fields: Any) -> None:
        """Write a row. Fields that are None are left out; a peer gets its version."""
        if peer is not None:
            fields["peer"] = f"{peer} {_version(peer) or '(not installed)'}"
        row = {key: value for key, value in fields.items() if value is not None}
        row |= self._environment
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.written.append(row)

    @contextmanager
    def failures(self, **fields: Any) -> Iterator[None]:
        """Turn an exception of the block into a row with `fields` and the error."""
        try:
            yield
        except Exception as error:
            self.add(**fields, error=describe(error))


def read(path: Path) -> list[Row]:
    """All rows of a results file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def _environment(device: torch.device) -> Row:
    found = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "gradsurgery": gradsurgery.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.datetime.now(tz=datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    return {key: value for key, value in found.items() if value is not None}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """The checkout's commit; BENCHMARK_COMMIT names it where a copy has no repository."""
    named = os.environ.get("BENCHMARK_COMMIT")
    if named:
        return named
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False
        )
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
