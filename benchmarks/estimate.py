"""What a step would send and hold at sizes that no machine here has: computed, not measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.processes import bytes_of_surgery

__all__ = ["estimate"]


def estimate(
    *,
    parameters: float,
    ranks: int,
    tasks: Sequence[int],
    gradient_bytes: int,
    parameter_bytes: int,
    gb_per_s: float,
) -> str:
    """A Markdown table; the formulas are those of docs/scaling.md.

    Args:
        parameters: D, all of them shared by all tasks.
        ranks: R.
        tasks: values of T; the losses share one forward pass.
        gradient_bytes: bytes of an element of a gradient, in memory and on its way.
        parameter_bytes: bytes of an element of a parameter when fully_shard gathers it.
        gb_per_s: what one rank sends in a second, 10^9 bytes.
    """
    lines = [
        "| T | way | GB sent per rank | s on the way | GB of gradients per rank |",
        "|---|---|---|---|---|",
    ]
    for count in tasks:
        for way, sent, held in _ways(parameters, ranks, count, gradient_bytes, parameter_bytes):
            figures = f"{sent / 1e9:.1f} | {sent / 1e9 / gb_per_s:.2f} | {held / 1e9:.2f}"
            lines.append(f"| {count} | {way} | {figures} |")
    return "\n".join(lines)


def _ways(
    width: float, ranks: int, tasks: int, gradient: int, parameter: int
) -> Iterator[tuple[str, float, float]]:
    """Each way to train: bytes that a rank sends in a step, bytes of gradients that it holds."""
    share = (ranks - 1) / ranks
    row = width * gradient
    yield "DDP, one loss", 2 * share * row, 2 * row
    yield "DDP, all-reduce of every row", 2 * tasks * share * row, tasks * row
    rows = min(tasks, 2) * row + tasks * row / ranks
    yield "process_group", bytes_of_surgery(tasks, int(width), ranks, gradient), rows
    gathered = share * width * parameter
    yield "fully_shard, one loss", 2 * gathered + share * row, row / ranks
    matrix = 2 * share * tasks**2 * 8
    sent = (1 + tasks) * gathered + tasks * share * row + matrix
    yield "fully_shard, surgery", sent, tasks * row / ranks
