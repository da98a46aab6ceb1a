"""`python -m benchmarks projection | step | overhead | memory | table`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks import memory, overhead, projection, step, table
from benchmarks.measure import Rows


def main() -> None:
    """Read the command line and run one benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("projection", "gram + combine over the memory floor"),
        ("step", "a ResNet18 step with surgery over the plain step"),
        ("overhead", "many small parameters: what the host pays"),
        ("memory", "peak memory over plain training"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("--output", type=Path, default=Path("runs/benchmarks.jsonl"))
        command.add_argument("--quick", action="store_true", help="small sizes, a few seconds")
        if name == "projection":
            dtypes = ("float32", "float64", "bfloat16", "float16")
            command.add_argument("--dtype", default="float32", choices=dtypes)
    show = commands.add_parser("table", help="tables from a results file")
    show.add_argument("path", type=Path, nargs="?", default=Path("runs/benchmarks.jsonl"))
    child = commands.add_parser("memory-child", help="one measured process of `memory`")
    child.add_argument("kind")
    child.add_argument("graph")
    child.add_argument("numbers", type=int, nargs=4)
    options = parser.parse_args()
    if options.command == "table":
        print(table.tables(options.path))
    elif options.command == "memory-child":
        memory.child(options.kind, options.graph, *options.numbers)
    else:
        measure(options)


def measure(options: argparse.Namespace) -> None:
    """Append rows, then print the tables of what was appended."""
    quick = options.quick
    start = options.output.stat().st_size if options.output.exists() else 0
    rows = Rows(options.output)
    if options.command == "projection":
        projection.run(
            rows,
            rounds=5 if quick else 25,
            width=1_000_000 if quick else 11_700_000,
            tasks=[2, 4, 8],
            dtype=getattr(torch, options.dtype),
        )
    elif options.command == "step":
        step.run(rows, pairs=2 if quick else 21, tasks=2, batch=4 if quick else 32, pixels=64)
    elif options.command == "overhead":
        overhead.run(rows, rounds=5 if quick else 101, counts=[10, 100, 1000], tasks=2)
    else:
        memory.run(
            rows,
            tasks=[2] if quick else [2, 4],
            batch=4 if quick else 16,
            pixels=64,
            steps=2 if quick else 4,
        )
    new = options.output.with_suffix(".new")
    with options.output.open() as file:
        file.seek(start)
        new.write_text(file.read())
    print(table.tables(new))
    new.unlink()


if __name__ == "__main__":
    main()
