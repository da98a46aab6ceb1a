"""Batches of images on the device, fetched ahead of the training step."""

import multiprocessing
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import connection

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from slam_ags_example.config import InputError
from slam_ags_example.data.images import ImageSet
from slam_ags_example.data.source import Reader

__all__ = ["batches"]

_AHEAD = 2  # batches fetched before they are asked for, by each worker

Rows = Tensor | Sequence[int]


def batches(
    images: ImageSet,
    rows_of_batches: Iterable[Rows],
    *,
    device: torch.device,
    workers: int = 0,
) -> Iterator[Tensor]:
    """The batches in order, the same whatever the number of workers.

    Images that are held are gathered in a thread; those that are not are decoded there or, with
    ``workers``, in processes. For CUDA, batches are copied from pinned memory without waiting.
    All threads and processes end with the iterator: at its end, its ``close()`` or its loss.

    Args:
        images: an open set.
        rows_of_batches: the rows of ``images`` in each batch; may be an endless iterator.
        device: where the batches go.
        workers: processes that decode images that are not held. As with torch's DataLoader, the
            script that is run then needs ``if __name__ == "__main__":``.

    Yields:
        [n, C, px, px], uint8.

    Raises:
        InputError: a file can no longer be read; names it.
    """
    pin = device.type == "cuda"
    if images.cached or workers < 1:

        def fetch(rows: Rows) -> Tensor:
            batch = images.read(rows)
            return batch.pin_memory() if pin else batch

        fetched = _fetch_ahead(fetch, rows_of_batches)
    else:
        fetched = _from_processes(images, rows_of_batches, workers=workers, pin=pin)
    for batch in fetched:
        yield batch.to(device, non_blocking=pin)


def _fetch_ahead(
    fetch: Callable[[Rows], Tensor], rows_of_batches: Iterable[Rows]
) -> Iterator[Tensor]:
    waiting: deque[Future[Tensor]] = deque()
    with ThreadPoolExecutor(1, "batches") as thread:
        try:
            for rows in rows_of_batches:
                waiting.append(thread.submit(fetch, rows))
                if len(waiting) > _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            thread.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class _Batches(Dataset[Tensor | InputError]):
    """Batches by the list of their rows; what a worker process is sent."""

    reader: Reader
    references: Sequence[str]
    image_px: int

    def __getitem__(self, rows: list[int]) -> Tensor | InputError:
        """Errors are handed over as values: the loader would add a worker's traceback to them."""
        try:
            return self.reader([self.references[row] for row in rows], self.image_px)
        except InputError as error:
            return InputError(str(error))


def _from_processes(
    images: ImageSet, rows_of_batches: Iterable[Rows], *, workers: int, pin: bool
) -> Iterator[Tensor]:
    # Not forked from this process, which has threads. Where there is a server to fork from, it
    # imports once, for the workers of all epochs, what each would import (torch: 2 s).
    context = multiprocessing.get_context(
        "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    )
    package, _, _ = __name__.partition(".")
    context.set_forkserver_preload([name for name in sys.modules if name.startswith(package)])
    loader = DataLoader(
        _Batches(images.reader, images.references, images.image_px),
        batch_size=None,
        sampler=(torch.as_tensor(rows).tolist() for rows in rows_of_batches),
        num_workers=workers,
        prefetch_factor=_AHEAD,
        pin_memory=pin,
        multiprocessing_context=context,
        worker_init_fn=_end_with_parent,
        generator=torch.Generator(),  # else the loader draws from the global one
    )
    for batch in loader:
        if isinstance(batch, InputError):
            raise batch
        yield batch


def _end_with_parent(worker: int) -> None:
    """End this worker with the training process, even a killed one.

    The loader's own watch looks at who started the worker, and that is the server.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_after, args=(parent.sentinel,), daemon=True).start()


def _exit_after(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)
