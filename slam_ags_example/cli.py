"""The command line: ``slam-ags run``."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table

from gradsurgery import __version__, methods
from slam_ags_example.config import METHODS, InputError, RunConfig
from slam_ags_example.data import SOURCES
from slam_ags_example.pretrain import TrainingFailedError
from slam_ags_example.run import run

__all__ = ["main"]

EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 130

_DESCRIPTION = """\
Find rare abnormal cells from slide labels alone.

A bag (slide) is labelled positive or negative; a positive one holds a few abnormal patches (cells),
and nothing says which. `run` makes bags, pretrains an encoder (under gradient surgery, or by a
baseline's method), trains a gated-attention aggregator on bags, predicts test bags, and ranks the
cells of the positive ones.
"""

_RUN_EPILOG = """\
Files in --output: metrics.json (the numbers), report.html (numbers, curves, top-ranked cells),
config.json (settings and versions), bags.json (which image is in which bag), test_bags.csv and
test_cells.csv (every prediction), pretraining.csv and mil.csv (curves), embeddings.npz and
timing.json.

Methods:
  slam-ags    NT-Xent on patches of positive bags, similarity loss on those of negative bags, and
              --surgery on the two gradients
  weaksupcon  the same two losses, plain sum
  simclr      NT-Xent on all patches, no labels
  ws-sil      cross entropy, each patch under its bag's label
  supervised  cross entropy under true patch labels: an upper bound
  one-class   Deep SVDD on patches of negative bags
  random      an untrained encoder

The same --seed gives the same bags, initial weights, batches and views whatever the method, so
methods can be compared in pairs:
  slam-ags run --seed 0 --output runs/ags
  slam-ags run --seed 0 --method weaksupcon --output runs/weaksupcon
  slam-ags run --seed 0 --method random --output runs/random

Exit codes: 0 done, 1 training failed, 2 wrong option or input, 130 interrupted.
"""


class _OneLineParser(argparse.ArgumentParser):
    """Reports a wrong option as one line, without the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of description and epilog, and shows defaults."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments after the program's name; None takes them from the process.

    Returns:
        The exit code: 0 done, 1 training failed, 2 wrong option or input, 130 interrupted.
    """
    try:
        options = vars(_parser().parse_args(argv))
        output, overwrite = options.pop("output"), options.pop("overwrite")
        options.pop("command")
        config = RunConfig(**options)
        metrics = run(config, output, overwrite=overwrite)
    except SystemExit as stop:  # --help and --version
        return int(stop.code or 0)
    except InputError as error:
        return _fail(str(error), EXIT_BAD_INPUT)
    except TrainingFailedError as error:
        return _fail(str(error), EXIT_FAILED)
    except KeyboardInterrupt:
        return _fail("interrupted; nothing of this run can be used", EXIT_INTERRUPTED)
    Console().print(_table(config, metrics))
    print(f"Report: {output / 'report.html'}")
    return EXIT_DONE


def _fail(message: str, code: int) -> int:
    print(f"slam-ags: error: {message}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(prog="slam-ags", description=_DESCRIPTION, formatter_class=_Help)
    parser.add_argument("--version", action="version", version=f"gradsurgery {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    command = commands.add_parser(
        "run",
        help="all stages, from images to report",
        description=_DESCRIPTION,
        epilog=_RUN_EPILOG,
        formatter_class=_Help,
    )
    default = {field.name: field.default for field in fields(RunConfig)}

    def option(name: str, field: str, kind: type, text: str, **more: Any) -> None:
        group = more.pop("group")
        group.add_argument(name, dest=field, type=kind, default=default[field], help=text, **more)

    command.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder for the results"
    )
    command.add_argument(
        "--overwrite", action="store_true", help="replace a finished run in --output"
    )
    bags = command.add_argument_group("data and bags")
    option("--data", "data", str, "where patches come from", choices=SOURCES, group=bags)
    option("--abnormal", "abnormal", str, "class to find: a digit", metavar="CLASS", group=bags)
    text = "share of abnormal patches in a positive bag, in (0, 1]"
    option("--witness-rate", "witness_rate", float, text, metavar="WR", group=bags)
    option("--bag-size", "bag_size", int, "patches per bag", metavar="N", group=bags)
    text = "number of bags, half of them positive; None: all that the images allow"
    option("--bags", "n_bags", int, text, metavar="N", group=bags)
    option("--seed", "seed", int, "decides bags, weights, batches, views", metavar="N", group=bags)

    train = command.add_argument_group("pretraining")
    text = "what trains the encoder; see below"
    option("--method", "method", str, text, choices=METHODS, group=train)
    text = "how slam-ags combines its two task gradients (sum: no surgery); None: ags"
    option("--surgery", "surgery", str, text, choices=tuple(methods.available()), group=train)
    option("--epochs", "epochs", int, "passes over the training patches", metavar="N", group=train)
    text = "patches of both kinds of bag"
    option("--batch-size", "batch_size", int, text, metavar="N", group=train)
    option("--lr", "learning_rate", float, "AdamW's peak learning rate", metavar="X", group=train)
    option("--weight-decay", "weight_decay", float, "AdamW's", metavar="X", group=train)
    text = "of NT-Xent and similarity"
    option("--temperature", "temperature", float, text, metavar="X", group=train)
    option("--device", "device", str, "auto, cpu, cuda, cuda:1, ...", metavar="NAME", group=train)

    mil = command.add_argument_group("aggregator and evaluation")
    option("--mil-epochs", "mil_epochs", int, "passes over the bags", metavar="N", group=mil)
    option("--mil-lr", "mil_learning_rate", float, "AdamW's rate", metavar="X", group=mil)
    option("--mil-weight-decay", "mil_weight_decay", float, "AdamW's", metavar="X", group=mil)
    text = "K of the top-K measures; None: a quarter of the bag, 400 at most"
    option("--top-k", "top_k", int, text, metavar="K", group=mil)
    return parser


def _table(config: RunConfig, metrics: dict[str, Any]) -> Table:
    bag, cell = metrics["bag"], metrics["cell"]
    top = cell["top_k"]
    how = f"{config.method} ({config.surgery})" if config.surgery else config.method
    table = Table(title=f"{how}, {config.data}, witness rate {config.witness_rate:g}")
    table.add_column("measure on test bags")
    table.add_column("value", justify="right")
    table.add_column("chance", justify="right")
    for label, value, chance in [
        (f"bag F1 ({bag['n_bags']} bags)", bag["f1"], bag["f1_chance"]),
        ("bag AUROC", bag["auroc"], bag["auroc_chance"]),
        ("bag balanced accuracy", bag["balanced_accuracy"], bag["balanced_accuracy_chance"]),
        ("cell average precision", cell["average_precision"], cell["average_precision_chance"]),
        ("cell precision at positives", cell["precision_at_positives"], cell["chance"]),
        (f"cell recall at {top['k']}", cell["recall_at_k"], cell["recall_at_k_chance"]),
        (f"positives in the top {top['k']}", top["positives"], top["chance"]),
    ]:
        table.add_row(label, f"{value:.3f}", f"{chance:.3f}")
    return table
