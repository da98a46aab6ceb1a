"""Work on many images, spread over the cores."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from joblib import cpu_count
from joblib.externals.loky import (
    ProcessPoolExecutor,
)

__all__ = ["PART", "processes", "spread", "threads"]

PART = 32  # images a task: seconds between two reports of progress at most

Result = TypeVar("Result")


@contextmanager
def threads(workers: int) -> Iterator[Executor | None]:
    """``workers`` threads, the calling one among them; None stands for no other."""
    if workers < 2:
        yield None
        return
    executor = ThreadPoolExecutor(workers - 1)
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


@contextmanager
def processes() -> Iterator[Executor | None]:
    """A process for each core, the calling one among them; None stands for no other.

    New interpreters, since a fork is unsafe beside torch's threads. Loky's and not the standard
    library's, which would run the caller's script again in each.
    """
    workers = cpu_count()
    if workers < 2:
        yield None
        return
    executor = ProcessPoolExecutor(workers - 1)
    try:
        yield executor
    finally:
        executor.shutdown(kill_workers=True)


def spread(
    work: Callable[[Sequence[str]], Result],
    references: Sequence[str],
    executor: Executor | None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[slice, Result]]:
    """Do ``work`` on parts of ``references``, in the calling thread and in the executor.

    The executor takes parts from the front, the caller from the back: it does not wait for
    processes that are still starting, and what is not worth starting them for it does alone.

    Yields:
        The place of a part among the references and its result, in no particular order.
    """
    total, done = len(references), 0
    places = [slice(start, min(start + PART, total)) for start in range(0, total, PART)]
    waiting: deque[tuple[slice, Future[Result] | None]] = deque(
        (place, executor.submit(work, references[place]) if executor else None) for place in places
    )
    while waiting:
        _, front = waiting[0]
        _, back = waiting[-1]
        if back is None or front is None:
            place, _ = waiting.popleft()
            result = work(references[place])
        elif not front.done() and back.cancel():
            place, _ = waiting.pop()
            result = work(references[place])
        else:
            place, _ = waiting.popleft()
            result = front.result()
        done += place.stop - place.start
        yield place, result
        if on_progress is not None:
            on_progress(done, total)
