"""Real processes for tests: they wait for jobs, so that a start is paid once."""

from __future__ import annotations

import datetime
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 60.0
"""What a collective waits for at most; a job that hangs then fails instead."""


class Processes:
    """`size` ranks of one gloo group on this machine.

    Example: `Processes(2)(function, 3)` gives `[function(3) on rank 0, function(3) on rank 1]`.
    After a job that failed the ranks may be out of step, so they start anew.
    """

    def __init__(
        self, size: int, seconds: float = SECONDS, *, warnings_are_errors: bool = True
    ) -> None:
        self.size, self.seconds, self.strict = size, seconds, warnings_are_errors
        self.processes: list[Any] = []
        self._connections: list[Connection] = []

    def __call__(self, job: Callable[..., Any], *args: Any) -> list[Any]:
        """Run a module's function on every rank; their results, or all errors in one."""
        self.send(job, *args)
        answers = [self.receive(rank) for rank in range(self.size)]
        errors = [text for succeeded, text in answers if not succeeded]
        if errors:
            self.close()
        assert not errors, "\n".join(errors)
        return [result for _, result in answers]

    def send(self, job: Callable[..., Any], *args: Any) -> None:
        """Begin a job on every rank."""
        if not self.processes:
            self._start()
        for connection in self._connections:
            connection.send((job, args))

    def receive(self, rank: int) -> tuple[bool, Any]:
        """Whether the job succeeded there, and its result or the text of its error."""
        if not self._connections[rank].poll(2 * self.seconds):
            return False, f"rank {rank} did not answer within {2 * self.seconds} s"
        try:
            answer: tuple[bool, Any] = self._connections[rank].recv()
        except EOFError:
            return False, f"rank {rank} ended"
        return answer

    def close(self) -> None:
        """End all of them."""
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self._connections = [], []

    def _start(self) -> None:
        context = mp.get_context("spawn")
        store = str(Path(tempfile.mkdtemp()) / "store")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work,
                args=(rank, self.size, store, self.seconds, self.strict, theirs),
                daemon=True,
                name=f"rank {rank}",
            )
            process.start()
            theirs.close()
            self.processes.append(process)
            self._connections.append(ours)


def _work(
    rank: int, size: int, store: str, seconds: float, strict: bool, connection: Connection
) -> None:
    torch.set_num_threads(1)
    if strict:
        warnings.simplefilter("error")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=seconds),
    )
    while True:
        try:
            job, args = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, job(*args)))
        except BaseException:
            connection.send((False, f"rank {rank}: {traceback.format_exc()}"))
