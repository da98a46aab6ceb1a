"""Runs in a folder: which stages are done or to do, and what resuming may not change."""

import platform
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import gradsurgery
from slam_ags_example.config import InputError, RunConfig, read_settings, resolve_device
from slam_ags_example.launch import Launch
from slam_ags_example.options import OPTIONS, STAGES
from slam_ags_example.output import read_json, remove_partial, write_json
from slam_ags_example.stages import FILES, STAGE_FUNCTIONS, Job

__all__ = ["help_pretraining", "run", "run_stages", "take_over"]


def run(
    config: RunConfig,
    folder: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    cache: Path | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> dict[str, Any]:
    """Make bags, pretrain, embed, train the aggregator, evaluate, report.

    Args:
        config: all settings.
        folder: for the files of all stages; made where it is not there.
        overwrite: replace the results in ``folder``.
        resume: go on with an interrupted run; one that is finished is left as it is.
        cache: a folder that keeps decoded images for later runs; None keeps none.
        on_stage: called with the name of each stage that is about to run.

    Returns:
        The content of metrics.json. It holds no times: the same config gives the same metrics.

    Raises:
        InputError: ``folder`` holds results, or the images or the device do not allow the run.
        TrainingFailedError: a loss is no longer finite.
    """
    run_stages(
        STAGES,
        config,
        folder,
        overwrite=overwrite,
        resume=resume,
        cache=cache,
        on_stage=on_stage,
    )
    return read_json(folder / "metrics.json")


def run_stages(
    stages: Sequence[str],
    config: RunConfig,
    folder: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    cache: Path | None = None,
    launch: Launch | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> None:
    """Run some stages, in order, on the files of those before them; see :func:`run`.

    With ``launch``, this is rank 0, and the others are called for pretraining.
    """
    device, is_new = resolve_device(config.device), not folder.exists()
    _prepare(stages, config, folder, overwrite, resume)
    write_json(folder / "config.json", _describe(config, device))
    job = Job(config, folder, cache, resume, launch)
    try:
        _run_each(stages, job, on_stage)
    except InputError:
        if is_new and [path.name for path in folder.iterdir()] == ["config.json"]:
            shutil.rmtree(folder)  # as if the wrong setting had not been given
        raise


def _run_each(stages: Sequence[str], job: Job, on_stage: Callable[[str], None]) -> None:
    """Run stages, and keep their times and what they measured in timing.json."""
    folder = job.folder
    for stage in stages:
        if job.resume and _is_done(stage, folder):
            continue
        on_stage(stage)
        start = time.perf_counter()
        if stage == "pretrain" and job.launch is not None:
            measured = _pretrain_together(job, job.launch)
        else:
            measured = STAGE_FUNCTIONS[stage](job)
        seconds = round(time.perf_counter() - start, 3)
        write_json(
            folder / "timing.json",
            read_json(folder / "timing.json") | {f"{stage}_s": seconds} | measured,
        )


def _pretrain_together(job: Job, launch: Launch) -> dict[str, Any]:
    if job.cache is not None:
        _ = job.images  # now they are in the cache, and the others map them
    launch.call(
        {
            "config": asdict(job.config),
            "folder": str(job.folder.resolve()),
            "cache": None if job.cache is None else str(job.cache.resolve()),
            "resume": job.resume,
        }
    )
    with launch.group(job.device):
        return {**STAGE_FUNCTIONS["pretrain"](job), "pretrain_processes": launch.size}


def help_pretraining(launch: Launch) -> None:
    """On all ranks but 0: wait until rank 0 pretrains, if it does, and take part in it."""
    called = launch.wait_for_call()
    if called is None:
        return
    config = RunConfig(**called["config"])
    cache = None if called["cache"] is None else Path(called["cache"])
    launch.take_device(config.device)
    job = Job(config, Path(called["folder"]), cache, called["resume"], launch)
    with launch.group(job.device):
        STAGE_FUNCTIONS["pretrain"](job)


def take_over(
    source: Path, folder: Path, stages: Sequence[str], *, overwrite: bool, resume: bool
) -> None:
    """Copy what the stages before these left in another folder, and the settings.

    Raises:
        InputError: a stage before these was not run there, or ``folder`` holds a run that stays.
    """
    if resume and (folder / "config.json").exists():
        return  # an interrupted call copied them already
    there = [name for names in FILES.values() for name in names if (folder / name).exists()]
    if folder.resolve() == source.resolve() or (there and not overwrite):
        raise InputError(
            f"--from takes files into a new folder, and {folder} holds a run: name another "
            "--output, or pass --overwrite to replace that run"
        )
    before = STAGES[: STAGES.index(stages[0])]
    for stage in before:
        if not _is_done(stage, source):
            raise InputError(f"{source} lacks {FILES[stage][-1]}: run `slam-ags {stage}` there")
    folder.mkdir(parents=True, exist_ok=True)
    for name in there:
        (folder / name).unlink()
    for name in ("config.json", *(name for stage in before for name in FILES[stage])):
        if (source / name).exists():
            shutil.copy2(source / name, folder / name)


def _is_done(stage: str, folder: Path) -> bool:
    return (folder / FILES[stage][-1]).exists()


def _prepare(
    stages: Sequence[str], config: RunConfig, folder: Path, overwrite: bool, resume: bool
) -> None:
    """See that the folder may be written to, and remove what these stages make out of date.

    Raises:
        InputError: it may not, an earlier stage is missing, or the settings are not those of the
            files that are there.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output {folder} is a file: name a folder")
    if config.mil_init is not None and not _is_done("mil", Path(config.mil_init)):
        raise InputError(f"--mil-init {config.mil_init} has no mil.pt: name the folder of a run")
    first = STAGES.index(stages[0])
    for stage in STAGES[:first]:
        if not _is_done(stage, folder):
            raise InputError(f"{folder} lacks {FILES[stage][-1]}: run `slam-ags {stage}` first")
    kept = STAGES if resume else STAGES[:first]
    _check_settings(config, folder, kept)
    stale = [name for stage in STAGES[first:] for name in FILES[stage]]
    there = [name for name in stale if (folder / name).exists()]
    results = [name for name in there if name != "corrupt.txt"]  # a reason to call again
    if results and not (overwrite or resume):
        raise InputError(
            f"{folder} holds {results[0]} of an earlier run: pass --resume to go on with it, "
            "--overwrite to replace it, or name another folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_partial(folder)
        for name in [] if resume else [*there, *(["timing.json"] if first == 0 else [])]:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}") from error


def _check_settings(config: RunConfig, folder: Path, kept: Sequence[str]) -> None:
    """Refuse settings that are not those of the results that stay.

    Raises:
        InputError: names the first setting that differs.
    """
    path = folder / "config.json"
    if not path.exists() or not kept:
        return
    stored = read_settings(path)
    for option in OPTIONS:
        value = getattr(config, option.field)
        if option.stage in kept and stored.get(option.field) != value:
            raise InputError(
                f"{folder} was made with {option.flag} {stored.get(option.field)}, not {value}: "
                "leave the option out, or name another folder"
            )


def _describe(config: RunConfig, device: torch.device) -> dict[str, Any]:
    """What it takes to run this again: settings, versions, device, threads."""
    return {
        "config": asdict(config),
        "top_k": config.resolved_top_k,
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "gradsurgery": gradsurgery.__version__,
            "torch": str(torch.__version__),
            **{name: version(name) for name in ("torchvision", "numpy", "scikit-learn")},
        },
    }
