"""Processes that work for this one over pipes, and end when it does."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

__all__ = ["Submit", "helper_processes", "serve"]

Work = Callable[[Sequence[str]], Any]
Submit = Callable[..., Future[Any]]  # of work and the references to do it on


@contextmanager
def helper_processes(n: int) -> Iterator[Submit]:
    """Start ``n`` new interpreters, and end them with the context.

    Neither forks (unsafe beside torch's threads) nor ``multiprocessing``'s other ways (which run
    the caller's script again in each process). A process whose input is closed ends, so none
    outlives this one, however that ends.

    Yields:
        A function that hands work, which is pickled, and its references to a free process.
    """
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # an interrupt from the keyboard is for this process to handle
        )
        for _ in range(n)
    ]
    free: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
    for process in processes:
        free.put(process)

    def call(work: Work, references: Sequence[str]) -> Any:
        process = free.get()
        try:
            return _ask(process, work, references)
        finally:
            free.put(process)

    threads = ThreadPoolExecutor(n, "helper")  # they wait for answers
    try:
        yield lambda work, references: threads.submit(call, work, references)
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()
        threads.shutdown()
        for process in processes:
            process.communicate()


def _ask(process: subprocess.Popen[bytes], work: Work, references: Sequence[str]) -> Any:
    assert process.stdin is not None  # a pipe, as is stdout
    assert process.stdout is not None
    try:
        pickle.dump((work, references), process.stdin)
        process.stdin.flush()
        return pickle.load(process.stdout)
    except (EOFError, OSError, pickle.UnpicklingError):
        # It has ended. Done here instead, the work raises its own error, if that was the reason.
        return work(references)


def serve() -> None:
    """Do work from standard input until that is closed; results go to standard output."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    sys.stdout = sys.stderr  # what the work prints is no answer
    while True:
        try:
            work, references = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(work(references), answers)
        answers.flush()
