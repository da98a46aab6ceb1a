"""Which images of a source cannot be read."""

from collections.abc import Callable, Sequence

from slam_ags_example.data.parallel import spread, threads
from slam_ags_example.data.source import PatchSource

__all__ = ["check_images"]


def check_images(
    source: PatchSource,
    references: Sequence[str],
    *,
    workers: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, str]:
    """Decode every image in full, and keep none.

    Args:
        source: images that are not files (drawn smears, digits) need no check and get none.
        references: which images.
        workers: threads that decode; at least one does.
        on_progress: called with how many are done and how many there are.

    Returns:
        The reason for each reference that cannot be read, in the order of ``references``.
    """
    fault = source.fault
    if fault is None:
        return {}

    def faults(part: Sequence[str]) -> list[str | None]:
        return [fault(reference) for reference in part]

    reasons: list[str | None] = [None] * len(references)
    with threads(workers) as submit:
        for place, found in spread(faults, references, submit, on_progress):
            reasons[place] = found
    return {
        reference: reason
        for reference, reason in zip(references, reasons, strict=True)
        if reason is not None
    }
