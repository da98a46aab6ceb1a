"""The command line: ``slam-ags run``, each of its stages, and ``slam-ags study``."""

import argparse
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table

from gradsurgery import __version__
from slam_ags_example.config import (
    METHODS,
    InputError,
    RunConfig,
    TrainingFailedError,
    read_settings,
    settle,
)
from slam_ags_example.help import DESCRIPTION, EPILOGS, SUMMARIES
from slam_ags_example.launch import Launch
from slam_ags_example.options import OPTIONS, STAGES, Option
from slam_ags_example.output import read_json
from slam_ags_example.run import help_pretraining, run_stages, take_over
from slam_ags_example.stages import FILES

__all__ = ["main"]

_STUDY_COLUMNS = 100  # a pipe is taken for 80, and cells of the tables would be cut
EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 130


class _OneLineParser(argparse.ArgumentParser):
    """Reports a wrong option as one line, without the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments after the program's name; None takes them from the process.

    Returns:
        The exit code: 0 done, 1 training failed, 2 wrong option or input, 130 interrupted.
    """
    launch: Launch | None = None
    try:
        launch = Launch.of_environment()
        if launch is not None and launch.rank > 0:
            help_pretraining(launch)
            return EXIT_DONE
        return _command(argv, launch)
    except SystemExit as stop:  # --help and --version
        return int(stop.code or 0)
    except InputError as error:
        return _fail(str(error), EXIT_BAD_INPUT, launch)
    except TrainingFailedError as error:
        return _fail(str(error), EXIT_FAILED, launch)
    except KeyboardInterrupt as interrupt:
        message = str(interrupt) or "interrupted: the same command with --resume goes on from here"
        return _fail(message, EXIT_INTERRUPTED, launch)
    except Exception:
        if launch is None:
            raise
        launch.say_once(traceback.format_exc())
        return EXIT_FAILED
    finally:
        if launch is not None and launch.rank == 0:
            launch.dismiss()


def _command(argv: Sequence[str] | None, launch: Launch | None) -> int:
    given = vars(_parser().parse_args(argv))
    command = given.pop("command")
    if launch is not None and command not in ("run", "pretrain"):
        raise InputError(f"`slam-ags {command}` runs in one process: start it without torchrun")
    return _study(given) if command == "study" else _run(command, given, launch)


def _run(command: str, given: dict[str, Any], launch: Launch | None) -> int:
    """All stages, or one."""
    stages = STAGES if command == "run" else (command,)
    output, source, file = given.pop("output"), given.pop("source", None), given.pop("config")
    overwrite, resume, cache = (given.pop(name) for name in ("overwrite", "resume", "cache"))
    if output is None and (resume or stages[0] != STAGES[0]):
        raise InputError(f"`slam-ags {command}` needs --output: the folder of the run")
    if source is not None:
        take_over(source, output, stages, overwrite=overwrite, resume=resume)
    # A run that goes on has its settings already.
    goes_on = resume or stages[0] != STAGES[0]
    stored: dict[str, Any] = {}
    if file is not None:
        stored = read_settings(file)
    elif goes_on and (output / "config.json").exists():
        stored = read_settings(output / "config.json")
    config = settle(stored, given)
    if launch is not None:
        launch.take_device(config.device)
    folder = _default_folder(config) if output is None else output
    console = Console(stderr=True, highlight=False)

    def on_stage(stage: str) -> None:
        if console.is_terminal:
            console.print(f"{stage}: {SUMMARIES[stage]}")

    run_stages(
        stages,
        config,
        folder,
        overwrite=overwrite,
        resume=resume,
        cache=cache,
        launch=launch,
        on_stage=on_stage,
    )
    _print_outcome(stages, config, folder)
    return EXIT_DONE


def _study(given: dict[str, Any]) -> int:
    """The grid of runs."""
    from slam_ags_example.study import Study, failures, run_study, tables

    output, jobs, reference = (given.pop(name) for name in ("output", "jobs", "reference"))
    file, names = given.pop("config"), given.pop("methods")
    rates, seeds = given.pop("witness_rates"), given.pop("seeds")
    base = settle({} if file is None else read_settings(file), given)
    study = Study(base, names, rates, seeds)
    console = Console(stderr=True, highlight=False)

    def on_cell(row: Any) -> None:
        outcome = "done" if row.error is None else f"failed: {row.error}"
        console.print(f"{row.label} wr {row.witness_rate:g} seed {row.seed}: {outcome}")

    rows = run_study(study, output, jobs=jobs, reference=reference, on_cell=on_cell)
    wide = Console() if console.width >= _STUDY_COLUMNS else Console(width=_STUDY_COLUMNS)
    for table in tables(rows, study.reference(reference)):
        wide.print(table)
    print(f"Tables and figure: {output / 'table.md'}, {output / 'figure.png'}")
    if failed := failures(rows):
        return _fail("; ".join(failed), EXIT_FAILED)
    return EXIT_DONE


def _fail(message: str, code: int, launch: Launch | None = None) -> int:
    line = f"slam-ags: error: {message}"
    if launch is None:
        print(line, file=sys.stderr)
    else:
        launch.say_once(line)
    return code


def _default_folder(config: RunConfig) -> Path:
    data = Path(config.data).name
    rate = f"wr{config.witness_rate:g}"
    return Path("runs", f"{data}-{rate}-{config.method}-seed{config.seed}")


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(prog="slam-ags", description=DESCRIPTION, formatter_class=_RAW)
    parser.add_argument("--version", action="version", version=f"gradsurgery {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in SUMMARIES.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=DESCRIPTION if name == "run" else summary[0].upper() + summary[1:] + ".",
            epilog=EPILOGS[name],
            formatter_class=_RAW,
        )
        if name == "study":
            _add_study_arguments(command)
        else:
            _add_run_arguments(command, name)
    return parser


_RAW = argparse.RawDescriptionHelpFormatter


def _add_run_arguments(command: argparse.ArgumentParser, name: str) -> None:
    text = "folder for the results"
    if name in ("run", "bags"):
        text += " (default: runs/ and a name made of the settings)"
    command.add_argument("--output", type=Path, metavar="DIR", help=text)
    if name not in ("run", "bags"):
        command.add_argument(
            "--from", dest="source", type=Path, metavar="DIR", help="take earlier files from here"
        )
    command.add_argument("--overwrite", action="store_true", help="replace results in --output")
    command.add_argument("--resume", action="store_true", help="go on with what is in --output")
    _add_shared_arguments(command)
    command.add_argument(
        "--cache", type=Path, metavar="DIR", help="keep decoded images here for other runs"
    )
    stages = STAGES if name == "run" else (name,)
    for stage in (*stages, "machine"):
        _add_settings(command, stage, [option for option in OPTIONS if option.stage == stage])


def _add_study_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--output", type=Path, default=Path("runs/study"), metavar="DIR")
    command.add_argument(
        "--methods",
        type=_names,
        default=list(METHODS),
        metavar="NAMES",
        help="with commas between (default: all)",
    )
    command.add_argument(
        "--witness-rates",
        type=_rates,
        default=[0.1, 0.01],
        metavar="RATES",
        help="with commas between (default: 0.1,0.01)",
    )
    command.add_argument(
        "--seeds",
        type=_seeds,
        default=[0, 1, 2],
        metavar="SEEDS",
        help="0,3,7 or 0-4 (default: 0-2)",
    )
    command.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)"
    )
    command.add_argument(
        "--reference", metavar="METHOD", help="what others are compared to (default: slam-ags)"
    )
    _add_shared_arguments(command)
    varied = ("method", "surgery", "witness_rate", "seed")
    for stage in (*STAGES, "machine"):
        options = [option for option in OPTIONS if option.stage == stage]
        _add_settings(command, stage, [o for o in options if o.field not in varied])


def _add_shared_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="JSON with settings, such as a run's config.json; options set on top of it",
    )


def _add_settings(command: argparse.ArgumentParser, stage: str, options: Sequence[Option]) -> None:
    if not options:
        return
    title = "machine and preset" if stage == "machine" else f"stage {stage}"
    group = command.add_argument_group(title)
    default = {field.name: field.default for field in fields(RunConfig)}
    for option in options:
        more: dict[str, Any] = {"dest": option.field, "default": argparse.SUPPRESS}
        if option.kind is bool:
            group.add_argument(option.flag, action="store_true", help=option.text, **more)
            continue
        shown = json.dumps(default[option.field]).strip('"')
        group.add_argument(
            option.flag,
            type=_or_null(option.kind) if default[option.field] is None else option.kind,
            choices=option.choices,
            metavar=option.metavar,
            help=f"{option.text} (quick: {shown})",
            **more,
        )


def _or_null(kind: type) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        return None if text == "null" else kind(text)

    convert.__name__ = kind.__name__  # argparse says "invalid int value"
    return convert


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _rates(text: str) -> list[float]:
    return [float(name) for name in _names(text)]


def _seeds(text: str) -> list[int]:
    seeds: list[int] = []
    for name in _names(text):
        first, dash, last = name.partition("-")
        seeds += range(int(first), int(last) + 1) if dash else [int(first)]
    return seeds


def _print_outcome(stages: Sequence[str], config: RunConfig, folder: Path) -> None:
    """What a person wants to know at the end."""
    timing = read_json(folder / "timing.json")
    if "bags" in stages and "images_skipped" in timing:
        print(
            f"Images: {timing['images_checked']} checked, {timing['images_skipped']} left out "
            f"(listed in {folder / 'corrupt.txt'})"
        )
    if "pretrain" in stages and "patches_per_s" in timing:
        print(
            f"Pretraining: {timing['patches_per_s']:.0f} patches/s, "
            f"{100 * timing['waiting_share']:.1f}% of the time waiting for data"
        )
    if "evaluate" in stages:
        Console().print(_table(config, read_json(folder / "metrics.json")))
    print(f"{'Report' if 'report' in stages else 'Wrote'}: {folder / FILES[stages[-1]][-1]}")


def _table(config: RunConfig, metrics: dict[str, Any]) -> Table:
    bag, cell = metrics["bag"], metrics["cell"]
    top = cell["top_k"]
    how = f"{config.method} ({config.surgery})" if config.surgery else config.method
    table = Table(title=f"{how}, {config.data}, witness rate {config.witness_rate:g}")
    table.add_column("measure on test bags")
    for name in ("value", "95% interval", "chance"):
        table.add_column(name, justify="right")
    for label, part, name, chance in [
        (f"bag F1 ({bag['n_bags']} bags)", bag, "f1", bag["f1_chance"]),
        ("bag AUROC", bag, "auroc", bag["auroc_chance"]),
        ("bag balanced accuracy", bag, "balanced_accuracy", bag["balanced_accuracy_chance"]),
        ("cell average precision", cell, "average_precision", cell["average_precision_chance"]),
        ("cell precision at positives", cell, "precision_at_positives", cell["chance"]),
        (f"cell recall at {top['k']}", cell, "recall_at_k", cell["recall_at_k_chance"]),
        (f"positives in the top {top['k']}", top, "positives", top["chance"]),
    ]:
        low, high = part[f"{name}_interval"]
        table.add_row(label, f"{part[name]:.3f}", f"{low:.3f} to {high:.3f}", f"{chance:.3f}")
    return table
