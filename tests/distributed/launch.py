"""Real processes for tests: they wait for jobs, so that a start is paid once."""

from __future__ import annotations

import datetime
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# What a collective waits for at most; a job that hangs then fails instead.
TIMEOUT = datetime.timedelta(seconds=30)


class Processes:
    """`size` ranks of one gloo group, on this machine.

    Example: `Processes(2)(function, 3)` gives `[function(3) on rank 0, function(3) on rank 1]`.
    """

    def __init__(self, size: int) -> None:
        context = mp.get_context("spawn")
        folder = tempfile.mkdtemp()
        pairs = [context.Pipe() for _ in range(size)]
        self._connections = [ours for ours, _ in pairs]
        self.processes = [
            context.Process(target=_work, args=(rank, size, f"{folder}/store", theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process in self.processes:
            process.start()

    def __call__(self, job: Callable[..., Any], *args: Any) -> list[Any]:
        """Run a module's function on every rank; their results, or the first error."""
        self.send(job, *args)
        answers = [self.receive(rank) for rank in range(len(self.processes))]
        errors = [answer[1] for answer in answers if not answer[0]]
        assert not errors, "\n".join(errors)
        return [answer[1] for answer in answers]

    def send(self, job: Callable[..., Any], *args: Any) -> None:
        """Begin a job on every rank."""
        for connection in self._connections:
            connection.send((job, args))

    def receive(self, rank: int, seconds: float = 120) -> tuple[bool, Any]:
        """Whether the job succeeded there, and its result or the text of its error."""
        if not self._connections[rank].poll(seconds):
            return False, f"rank {rank} did not answer within {seconds} s"
        answer: tuple[bool, Any] = self._connections[rank].recv()
        return answer

    def close(self) -> None:
        """End all of them."""
        for process in self.processes:
            process.kill()
            process.join()


def _work(rank: int, size: int, store: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=TIMEOUT
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
