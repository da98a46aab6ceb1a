"""Which tile sizes the two kernels on rows should use: `python -m benchmarks.tune`.

Every candidate is timed on the same rows, checked against the one in use, and written as a row; at
the end the best of each case beside the one in use. On a CPU (`TRITON_INTERPRET=1 ... --quick`) the
same code runs at sizes that say nothing about speed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import describe
from benchmarks.rows import Row, Rows

TASKS = (2, 4, 8, 16, 32)
WIDTHS = (1_000_000, 11_000_000, 100_000_000)
_SAMPLES, _SAMPLE_MS = 5, 2.0


def gram_candidates(padded: int, *, quick: bool) -> list[Any]:
    """Tiles to try for so many rows; that in use is the first."""
    from gradsurgery.kernels.triton_rows import GRAM_TILES, Tile

    found = [GRAM_TILES[padded]]
    if quick:
        return [*found, found[0]._replace(columns=found[0].columns * 2)]
    if padded <= 8:
        # Sums that a thread keeps: P² for each of its columns.
        for each in {2: (2, 4, 8), 4: (1, 2, 4), 8: (1, 2)}[padded]:
            for warps in (4, 8):
                found += [Tile(32 * warps * each, warps, n) for n in (528, 1056, 2112, 4224)]
    else:
        for columns in (32, 64, 128, 256):
            for warps in (1, 2, 4, 8):
                if not 512 * warps <= columns * padded <= 4096 * warps:
                    continue
                found += [
                    Tile(columns, warps, programs, stages=stages)
                    for programs in (264, 528, 1056, 2112)
                    for stages in (2, 4)
                ]
    return list(dict.fromkeys(found))


def combine_candidates(*, quick: bool) -> list[tuple[int, int]]:
    """Columns and warps to try; those in use are the first."""
    from gradsurgery.kernels import triton_rows

    found = [(triton_rows.COMBINE_COLUMNS, triton_rows.COMBINE_WARPS)]
    if not quick:
        found += [(n, w) for n in (256, 512, 1024, 2048, 4096) for w in (2, 4, 8) if n >= 64 * w]
    return list(dict.fromkeys(found))


@contextmanager
def in_use(padded: int | None, candidate: Any) -> Iterator[None]:
    """A tile for gram of so many padded rows, or columns and warps for combine."""
    from gradsurgery.kernels import triton_rows

    before = (
        dict(triton_rows.GRAM_TILES),
        (
            triton_rows.COMBINE_COLUMNS,
            triton_rows.COMBINE_WARPS,
        ),
    )
    try:
        if padded is None:
            triton_rows.COMBINE_COLUMNS, triton_rows.COMBINE_WARPS = candidate
        else:
            triton_rows.GRAM_TILES[padded] = candidate
        yield
    finally:
        triton_rows.GRAM_TILES.update(before[0])
        triton_rows.COMBINE_COLUMNS, triton_rows.COMBINE_WARPS = before[1]


def time_ms(case: Callable[[], object], device: torch.device) -> float:
    """Median time of a call; on CUDA of calls in a row between two events."""
    case()
    if device.type != "cuda":
        start = time.perf_counter()
        case()
        return (time.perf_counter() - start) * 1e3
    first: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    last: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def sample(calls: int) -> float:
        first.record()
        for _ in range(calls):
            case()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / calls

    calls = min(max(int(_SAMPLE_MS / max(sample(2), 1e-4)), 1), 200)
    return statistics.median(sample(calls) for _ in range(_SAMPLES))


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of a copy within the device, bytes read and written counted."""
    size = 2**30 if device.type == "cuda" else 2**20
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / time_ms(lambda: target.copy_(source), device) / 1e6


def build(task: tuple[int | None, int, Sequence[Any]]) -> None:
    """Compile candidates in a process of its own: Triton keeps what it compiled in a folder."""
    padded, count, candidates = task
    from gradsurgery.kernels import triton_rows

    rows = torch.zeros(count, 2**17, device="cuda")
    weights = torch.zeros(count, device="cuda", dtype=torch.float64)
    for candidate in candidates:
        with in_use(padded, candidate):
            try:
                if padded is None:
                    triton_rows.combine_into(rows, weights, rows[0])
                else:
                    triton_rows.gram(rows)
            except Exception:  # the sweep meets it again, and writes it down
                continue


def build_all(quick: bool, workers: int) -> None:
    """Fill Triton's cache with every candidate, in several processes."""
    tasks: list[tuple[int | None, int, Sequence[Any]]] = []
    for count in TASKS:
        candidates = gram_candidates(count, quick=quick)
        tasks += [(count, count, candidates[i::6]) for i in range(6)]
    tasks.append((None, 2, combine_candidates(quick=quick)))
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(build, tasks, chunksize=1)


def sweep(
    rows: Rows, gradients: Tensor, copy_gb_per_s: float, *, quick: bool
) -> tuple[list[Row], list[Row]]:
    """All candidates on these rows; what was found for gram, and for combine."""
    from gradsurgery.kernels import triton_rows

    count, width = gradients.shape
    device, size = gradients.device, gradients.element_size()
    out = torch.empty_like(gradients[0])
    weights = torch.linspace(-1, 1, count, dtype=torch.float64, device=device)

    def combined() -> Tensor:
        triton_rows.combine_into(gradients, weights, out)
        return out

    cases: list[tuple[str, int | None, list[Any], Callable[[], Tensor], int]] = [
        (
            "gram",
            count,
            gram_candidates(count, quick=quick),
            lambda: triton_rows.gram(gradients),
            count * width * size,
        ),
        ("combine", None, combine_candidates(quick=quick), combined, (count + 1) * width * size),
    ]
    results: dict[str, list[Row]] = {}
    for name, padded, candidates, run, moved in cases:
        wanted: Tensor | None = None
        results[name] = []
        for position, candidate in enumerate(candidates):
            fields: Row = {
                "benchmark": "tune",
                "case": name,
                "T": count,
                "D": width,
                "dtype": str(gradients.dtype).removeprefix("torch."),
                "tile": str(tuple(candidate)),
                "in_use": position == 0,
            }
            with in_use(padded, candidate):
                try:
                    found = run().clone()
                    wanted = found if wanted is None else wanted
                    fields["difference"] = float(
                        ((found - wanted).norm() / wanted.norm().clamp(min=1e-300)).double()
                    )
                    fields["median_ms"] = round(time_ms(run, device), 5)
                    rate = moved / fields["median_ms"] / 1e6
                    fields["of_copy_bandwidth"] = round(rate / copy_gb_per_s, 3)
                except Exception as error:
                    fields["error"] = describe(error)
            rows.add(**fields)
            results[name].append(fields)
    return results["gram"], results["combine"]


def main() -> None:
    """Read the arguments, sweep, print the best."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/tune.jsonl"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--workers", type=int, default=12)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = time.perf_counter()
    if device.type == "cuda":
        build_all(options.quick, options.workers)
    print(f"compiled in {time.perf_counter() - start:.0f} s")
    rows = Rows(options.output, device)
    copy = copy_bandwidth(device)
    rows.add(benchmark="tune", case="copy", gb_per_s=round(copy, 1))
    print(f"copy: {copy:.0f} GB/s")
    tasks, widths = ((2, 16), (5000,)) if options.quick else (TASKS, WIDTHS)
    for width in widths:
        for count in tasks:
            torch.manual_seed(0)
            gradients = torch.randn(count, width, device=device)
            for found in sweep(rows, gradients, copy, quick=options.quick):
                report(found)
            del gradients
    print(f"done in {time.perf_counter() - start:.0f} s")


def report(found: list[Row]) -> None:
    """One line: the tile in use, and the three fastest."""
    first = found[0]
    good = sorted((row for row in found if "error" not in row), key=lambda row: row["median_ms"])
    shown = [
        f"{row['tile']} {row['median_ms']:.4f} ms {row['of_copy_bandwidth']:.2f}"
        for row in [first, *good[:3]]
        if "median_ms" in row
    ]
    errors = {row["error"] for row in found if "error" in row}
    off = max((row["difference"] for row in good), default=0.0)
    print(f"{first['case']:8} T={first['T']:<3} D={first['D']:<10} in use " + " | ".join(shown))
    print(f"         largest difference {off:.1e}" + "".join(f"; {e}" for e in sorted(errors)))


if __name__ == "__main__":
    main()
