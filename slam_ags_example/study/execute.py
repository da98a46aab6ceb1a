"""Runs a study's cells, each in its own process: skips finished ones, resumes those begun."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from slam_ags_example.config import InputError
from slam_ags_example.output import write_json
from slam_ags_example.study.grid import VARIED, Cell, Study, first_difference, plain_settings
from slam_ags_example.study.results import write_results
from slam_ags_example.study.rows import Row, failed_row, finished_row, read_json

__all__ = ["run_study"]

_POLL_S = 0.05
_FINISHED = ("metrics.json", "report.html")  # a run writes these two last
# What a cell's process runs: a module as `python -m` would, until its standard input ends. The
# study holds the other end, so that no cell outlives the study, in whatever way that is killed.
_LEASHED = """\
import os, runpy, sys, threading
def end_with_the_study():
    os.read(0, 1)
    os._exit(1)
threading.Thread(target=end_with_the_study, daemon=True).start()
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def run_study(
    study: Study,
    output: Path,
    *,
    jobs: int,
    runner: str = "slam_ags_example",
    reference: str | None = None,
    on_cell: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Run what is not finished yet, then write the rows, their summary, and a figure.

    In ``output``: study.json (what was asked), a folder for each run with its settings and its
    standard error beside it (cells/wr0.1/slam-ags/seed0, seed0.json, seed0.log), cache (images
    that runs share), and at the end rows.csv, summary.csv, table.md, figure.png and figure.svg.
    The same call goes on where an earlier one was stopped or where runs failed; methods, witness
    rates and seeds may be added or left out. A run that fails does not stop the others.

    Args:
        study: the grid.
        output: the study's folder; made where it is not there.
        jobs: runs at a time. Each gets as many threads as there are CPUs for it, unless
            OMP_NUM_THREADS is set already.
        runner: the module that ``python -m`` starts for each run, with ``run --config FILE
            --output DIR --resume --cache DIR``.
        reference: the method that others are compared to; None: slam-ags, or else the first.
        on_cell: gets each row as soon as it is there, those of finished runs first.

    Returns:
        One row a cell, in the order of ``study.cells()``.

    Raises:
        InputError: ``output`` cannot be used, or holds something else than (a part of) this study.
        KeyboardInterrupt: with a message that says how far it came; no run is left behind.
    """
    if jobs < 1:
        raise InputError(f"--jobs must be at least 1, got {jobs}")
    reference = study.reference(reference)
    report = on_cell or (lambda row: None)
    with _claimed(output):
        _check_settings(study, output)
        rows: dict[Cell, Row] = {}
        for cell in study.cells():
            if _is_finished(cell, output):
                rows[cell] = finished_row(cell, output / cell.folder)
                report(rows[cell])
        waiting = [cell for cell in study.cells() if cell not in rows]
        try:
            with closing(_run_cells(waiting, output, jobs, runner)) as ended:
                for cell, row in ended:
                    rows[cell] = row
                    report(row)
        except KeyboardInterrupt:
            done = sum(row.error is None for row in rows.values())
            raise KeyboardInterrupt(
                f"interrupted with {done} of {len(study.cells())} runs finished: the same command "
                "goes on from here"
            ) from None
        ordered = [rows[cell] for cell in study.cells()]
        write_results(output, ordered, reference)
    return ordered


@contextmanager
def _claimed(output: Path) -> Iterator[None]:
    """Make the folder, and keep a second study out of it while this one works there.

    Raises:
        InputError: it is no folder, cannot be written, or another study works in it.
    """
    import fcntl  # POSIX alone has it, and the rest of the command line should load anywhere

    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output} is a file: name a folder")
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = (output / "study.lock").open("w")
    except OSError as error:
        raise InputError(f"--output {output} cannot be written: {error.strerror}") from error
    with lock:  # held until the file is closed, at the latest by the end of the process
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"--output {output}: a study is at work there; wait for its end, or name another "
                "folder"
            ) from error
        yield


def _check_settings(study: Study, output: Path) -> None:
    """Refuse to mix runs of different settings; then store what was asked.

    Raises:
        InputError: the study or a cell that is there has other settings.
    """
    stored, settings = output / "study.json", plain_settings(study.base)
    if stored.exists():
        difference = first_difference(read_json(stored).get("config", {}), settings, besides=VARIED)
        if difference:
            raise InputError(
                f"--output {output} holds a study with other settings: {difference}; name another "
                "folder or give the settings it has"
            )
    for cell in study.cells():
        there = output / cell.folder / "config.json"
        if not there.exists():
            continue
        difference = first_difference(
            read_json(there).get("config", {}), plain_settings(cell.config)
        )
        if difference:
            raise InputError(
                f"{there.parent} holds a run with other settings: {difference}; remove it to do "
                "it again"
            )
    content = {
        "config": {name: value for name, value in settings.items() if name not in VARIED},
        "methods": study.methods,
        "witness_rates": study.witness_rates,
        "seeds": study.seeds,
    }
    write_json(stored, content)


def _is_finished(cell: Cell, output: Path) -> bool:
    return all((output / cell.folder / name).exists() for name in _FINISHED)


def _run_cells(
    cells: list[Cell], output: Path, jobs: int, runner: str
) -> Generator[tuple[Cell, Row], None, None]:
    """Run the cells in their order, ``jobs`` at a time; give each with its row when it ends."""
    waiting = list(reversed(cells))
    running: dict[Cell, subprocess.Popen[bytes]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                cell = waiting.pop()
                running[cell] = _start(cell, output, jobs, runner)
            time.sleep(_POLL_S)
            for cell, process in list(running.items()):
                if process.poll() is not None:
                    del running[cell]
                    _let_go(process)
                    yield cell, _row(cell, output, process.returncode)
    finally:
        for process in running.values():
            _let_go(process)
        for process in running.values():
            process.wait()


def _start(cell: Cell, output: Path, jobs: int, runner: str) -> "subprocess.Popen[bytes]":
    folder = output / cell.folder
    folder.mkdir(parents=True, exist_ok=True)
    settings = folder.with_suffix(".json")
    write_json(settings, {"config": plain_settings(cell.config)})
    options = {"--config": settings, "--output": folder, "--cache": output / "cache"}
    arguments = [str(part) for pair in options.items() for part in pair]
    threads = max(1, _n_cpus() // jobs)
    with folder.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-c", _LEASHED, runner, "run", *arguments, "--resume"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=log,
            env={"OMP_NUM_THREADS": str(threads), **os.environ},
        )


def _let_go(process: "subprocess.Popen[bytes]") -> None:
    """Close the pipe, which ends a process that has not ended."""
    if process.stdin is not None:
        process.stdin.close()


def _n_cpus() -> int:
    """CPUs that this process may use: in a container, fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _row(cell: Cell, output: Path, exit_code: int) -> Row:
    """The row of a cell whose process has ended: what it left counts, not how it ended."""
    folder = output / cell.folder
    if _is_finished(cell, output):
        return finished_row(cell, folder)
    if exit_code < 0:
        return failed_row(cell, f"killed by signal {-exit_code} ({signal.strsignal(-exit_code)})")
    lines = folder.with_suffix(".log").read_text(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    said = last.removeprefix("slam-ags: error: ")
    return failed_row(cell, said or f"ended with exit code {exit_code} before it was finished")
