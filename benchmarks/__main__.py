"""`python -m benchmarks COMMAND`: measure into a results file, or make tables and plots of one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import (
    compare,
    compare_report,
    diagnoses,
    estimate,
    less_work,
    memory,
    metric,
    overhead,
    peers,
    plot,
    processes,
    projection,
    scaling,
    solvers,
    step,
    table,
)
from benchmarks.models import GRAPHS, MODELS
from benchmarks.problems import PROBLEMS
from benchmarks.rows import Row, Rows, read
from gradsurgery.methods import available

RESULTS = Path("runs/benchmarks.jsonl")


@dataclass(frozen=True)
class Command:
    """One benchmark: its function, what it says about itself, and its settings by default."""

    run: Callable[..., None]
    help: str
    full: Mapping[str, Any]
    """The settings that it takes, each an option of the command line."""
    quick: Mapping[str, Any]
    """What `--quick` has instead: a few seconds on two cores."""


COMMANDS = {
    "projection": Command(
        projection.run,
        "gram + combine over the memory floor",
        {
            "tasks": [2, 4, 8, 16, 32],
            "width": 11_700_000,
            "dtype": torch.float32,
            "backend": "auto",
            "rounds": 25,
        },
        {"tasks": [2, 8], "width": 300_000, "rounds": 5},
    ),
    "step": Command(
        step.run,
        "a training step with surgery over the plain step",
        {
            "models": list(MODELS),
            "tasks": [2],
            "batch": 32,
            "pixels": 64,
            "amp": False,
            "rounds": 21,
        },
        {"models": ["mlp", "resnet18"], "batch": 2, "pixels": 32, "rounds": 2},
    ),
    "overhead": Command(
        overhead.run,
        "many small parameters: what the host pays",
        {"counts": [10, 100, 1000], "tasks": [2], "rounds": 101},
        {"counts": [10, 100], "rounds": 5},
    ),
    "memory": Command(
        memory.run,
        "peak memory over plain training",
        {"models": ["resnet18"], "tasks": [2, 4], "batch": 16, "pixels": 64, "steps": 4},
        {"models": ["mlp"], "tasks": [2], "batch": 4, "steps": 2},
    ),
    "peers": Command(
        peers.run,
        "ours beside other libraries and the published loop",
        {
            "tasks": [2, 4, 8, 16],
            "width": 11_700_000,
            "models": ["mlp", "resnet18"],
            "step_tasks": [2, 4],
            "batch": 32,
            "pixels": 64,
            "rounds": 15,
        },
        {
            "tasks": [2, 4],
            "width": 100_000,
            "models": ["mlp"],
            "step_tasks": [2],
            "batch": 4,
            "rounds": 3,
        },
    ),
    "scaling": Command(
        scaling.run,
        "how the cost grows with T, D, parameters and batch",
        {
            "tasks": [2, 4, 8, 16, 32, 40],
            "width": 10_000_000,
            "widths": [10_000, 100_000, 1_000_000, 10_000_000, 100_000_000],
            "counts": [10, 30, 100, 300, 1000, 3000],
            "models": ["mlp", "resnet18"],
            "batches": [1, 2, 4, 8, 16, 32, 64],
            "pixels": 32,
            "rounds": 15,
        },
        {
            "tasks": [2, 8],
            "width": 100_000,
            "widths": [10_000, 100_000],
            "counts": [10, 30],
            "models": ["mlp"],
            "batches": [2, 8],
            "rounds": 3,
        },
    ),
    "solvers": Command(
        solvers.run,
        "the T x T step of every method, beside TorchJD's",
        {"tasks": [2, 8, 16, 40, 64], "rounds": 31},
        {"tasks": [2, 8], "rounds": 3},
    ),
    "metric": Command(
        metric.run,
        "steps that raise a task's loss, by metric and optimizer",
        {"methods": ["upgrad", "ags", "sum"], "steps": 400, "seeds": 5},
        {"methods": ["pcgrad"], "steps": 30, "seeds": 1},
    ),
    "less_work": Command(
        less_work.run,
        "what every=k and features= save on a shared trunk",
        {
            "models": ["resnet18"],
            "tasks": [2, 4, 8],
            "every": [1, 4, 16],
            "batch": 32,
            "pixels": 64,
            "rounds": 7,
        },
        {
            "models": ["mlp"],
            "tasks": [2],
            "every": [1, 2],
            "batch": 8,
            "pixels": 32,
            "rounds": 2,
        },
    ),
    "processes": Command(
        processes.run,
        "bytes and time of a step in many processes",
        {
            "ranks": [2, 4],
            "tasks": [2, 4, 8],
            "side": 1024,
            "batch": 256,
            "wire_ms": 0.0,
            "rounds": 11,
        },
        {"ranks": [2], "tasks": [2], "side": 128, "batch": 8, "rounds": 3},
    ),
    "compare": Command(
        compare.run,
        "does it help? every method beside tuned baselines, on three small problems",
        {
            "problems": [*PROBLEMS],
            "methods": [*available()],
            "steps": None,
            "rates": None,
            "seeds": 5,
            "validation_seeds": 2,
            "rounds": 11,
            "jobs": 2,
        },
        {
            "methods": ["ags", "mgda", "upgrad"],
            "steps": 10,
            "rates": 2,
            "seeds": 2,
            "validation_seeds": 1,
            "rounds": 1,
            "jobs": 1,
        },
    ),
}


def _number(text: str) -> int:
    number = float(text)
    if number != int(number) or number < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1 is needed; got {text}")
    return int(number)


def _numbers(text: str) -> list[int]:
    return [_number(part) for part in text.split(",")]


def _names(what: str, known: Collection[str]) -> Callable[[str], list[str]]:
    """A reader of names, with commas between them."""

    def read_names(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{what} are {', '.join(known)}; got {name!r}")
        return names

    return read_names


def _dtype(text: str) -> torch.dtype:
    dtype = getattr(torch, text, None)
    if not isinstance(dtype, torch.dtype):
        raise argparse.ArgumentTypeError(f"{text!r} is no torch dtype")
    return dtype


OPTIONS: dict[str, Callable[[str], Any]] = {
    "ranks": _numbers,
    "side": _number,
    "tasks": _numbers,
    "every": _numbers,
    "step_tasks": _numbers,
    "width": _number,
    "widths": _numbers,
    "counts": _numbers,
    "models": _names("models", MODELS),
    "methods": _names("methods", available()),
    "problems": _names("problems", PROBLEMS),
    "seeds": _number,
    "validation_seeds": _number,
    "rates": _number,
    "jobs": _number,
    "dtype": _dtype,
    "backend": str,
    "batch": _number,
    "batches": _numbers,
    "pixels": _number,
    "wire_ms": float,
    "rounds": _number,
    "steps": _number,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--output", type=Path, default=RESULTS, help="rows are appended to it")
    quick = "small sizes on one thread, a few seconds: says that it runs, not how fast"
    common.add_argument("--quick", action="store_true", help=quick)
    common.add_argument("--threads", type=_number, help="default: torch's own number")
    where = "cuda" if torch.cuda.is_available() else "cpu"
    common.add_argument("--device", choices=("cpu", "cuda"), default=where)
    for name, command in COMMANDS.items():
        added = commands.add_parser(name, parents=[common], help=command.help)
        for option, default in command.full.items():
            flag = "--" + option.replace("_", "-")
            if default is False:
                added.add_argument(flag, action="store_const", const=True)
            else:
                added.add_argument(flag, type=OPTIONS[option], help=f"default: {default}")
    show = commands.add_parser("table", help="Markdown tables of a results file")
    show.add_argument("path", type=Path, nargs="?", default=RESULTS)
    draw = commands.add_parser("plot", help="PNG plots of a results file")
    draw.add_argument("path", type=Path, nargs="?", default=RESULTS)
    draw.add_argument("--output-dir", type=Path, default=Path("runs/plots"))
    size = commands.add_parser("estimate", help="what many processes would send, computed")
    size.add_argument("--parameters", type=float, default=7e9)
    size.add_argument("--ranks", type=_number, default=64)
    size.add_argument("--tasks", type=_numbers, default=[2, 4, 8])
    size.add_argument("--gradient-bytes", type=_number, default=4)
    size.add_argument("--parameter-bytes", type=_number, default=2)
    size.add_argument("--gb-per-s", type=float, default=50.0, help="what one rank sends")
    commands.add_parser("diagnose", help="what `diagnose` says about three models made for it")
    child = commands.add_parser("memory-child", help="one measured process of `memory`")
    child.add_argument("kind", choices=tuple(step.STEPS))
    child.add_argument("model", choices=MODELS)
    child.add_argument("graph", choices=GRAPHS)
    child.add_argument("device")
    child.add_argument("numbers", type=int, nargs=4)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 1 where every row is a failure."""
    options = _parser().parse_args(arguments)
    if options.command == "table":
        print(_tables(read(options.path)))
    elif options.command == "plot":
        rows = read(options.path)
        for draw in (plot.plots, compare_report.plots):
            for path in draw(rows, options.output_dir):
                print(path)
    elif options.command == "estimate":
        given = {key: value for key, value in vars(options).items() if key != "command"}
        print(estimate.estimate(**given))
    elif options.command == "diagnose":
        print(diagnoses.report())
    elif options.command == "memory-child":
        memory.child(options.kind, options.model, options.graph, options.device, options.numbers)
    else:
        return _measure(COMMANDS[options.command], options)
    return 0


def _tables(rows: Sequence[Row]) -> str:
    others = [row for row in rows if row["benchmark"] != "compare"]
    return "\n\n".join(filter(None, (table.tables(others), compare_report.tables(rows))))


def _measure(command: Command, options: argparse.Namespace) -> int:
    """Append rows, then print the tables of what was appended."""
    settings = {**command.full, **(command.quick if options.quick else {})}
    given = {name: getattr(options, name) for name in settings}
    settings |= {name: value for name, value in given.items() if value is not None}
    threads = options.threads or (1 if options.quick else torch.get_num_threads())
    torch.set_num_threads(threads)
    device = torch.device(options.device)
    rows = Rows(options.output, device)
    command.run(rows, **settings, device=device)
    print(_tables(rows.written))
    return int(all("error" in row for row in rows.written))


if __name__ == "__main__":
    sys.exit(main())
