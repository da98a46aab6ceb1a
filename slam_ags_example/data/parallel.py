"""Work on many images, spread over the cores."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from joblib import cpu_count

from slam_ags_example.data.helper import Submit, helper_processes

__all__ = ["PART", "processes", "spread", "threads"]

PART = 32  # images a task: seconds between two reports of progress at most

Result = TypeVar("Result")


@contextmanager
def threads(workers: int | None = None) -> Iterator[Submit | None]:
    """``workers`` threads, the calling one among them; as many as there are cores for None.

    Yields:
        What submits work to the others; None where there are no others.
    """
    n_others = (cpu_count() if workers is None else workers) - 1
    if n_others < 1:
        yield None
        return
    executor = ThreadPoolExecutor(n_others)
    try:
        yield executor.submit
    finally:
        executor.shutdown(cancel_futures=True)


@contextmanager
def processes() -> Iterator[Submit | None]:
    """As :func:`threads`, but a process for each core."""
    if cpu_count() < 2:
        yield None
        return
    with helper_processes(cpu_count() - 1) as submit:
        yield submit


def spread(
    work: Callable[[Sequence[str]], Result],
    references: Sequence[str],
    submit: Submit | None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[slice, Result]]:
    """Do ``work`` on parts of ``references``, in the calling thread and where ``submit`` does it.

    The others take parts from the front, the caller from the back: it does not wait for processes
    that are still starting.

    Yields:
        The place of a part among the references and its result, in no particular order.
    """
    total, done = len(references), 0
    places = [slice(start, min(start + PART, total)) for start in range(0, total, PART)]
    waiting: deque[tuple[slice, Future[Result] | None]] = deque(
        (place, submit(work, references[place]) if submit else None) for place in places
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
