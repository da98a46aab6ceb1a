"""Checkpoints of pretraining: all that the next step depends on, in files that run no code."""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slam_ags_example.config import InputError
from slam_ags_example.output import write_whole
from slam_ags_example.ranks import rank

__all__ = ["BEST", "LAST", "Checkpoints", "read_checkpoint", "read_torch"]

LAST, BEST = "checkpoint-last.pt", "checkpoint-best.pt"
_FORMAT = "slam-ags checkpoint, version 1"


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a pretraining checkpoint, on the CPU; errors as of :func:`read_torch`."""
    return read_torch(path, _FORMAT, "pretrain again")


def read_torch(path: Path, file_format: str, fix: str) -> dict[str, Any]:
    """The content of a file that torch.save wrote, on the CPU; nothing in it is executed.

    Args:
        path: the file.
        file_format: what its ``"format"`` has to be.
        fix: what to do if it cannot be used, for the message.

    Raises:
        InputError: the file is not there, is damaged, or is of another format.
    """
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"there is no {path}: {fix}") from error
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {fix}") from error
    if not isinstance(content, dict) or content.get("format") != file_format:
        raise InputError(f"{path} is not of this version: {fix}")
    return content


@dataclass(frozen=True)
class Checkpoints:
    """The two checkpoints of a run: the last, and the one with the lowest validation loss.

    Attributes:
        folder: of the run.
        settings: those that pretraining depends on; a checkpoint made under others is refused.
        resume: whether to go on from the last checkpoint, if there is one.
    """

    folder: Path
    settings: Mapping[str, Any]
    resume: bool = False

    def write(self, content: Mapping[str, Any], *, best: bool = False) -> None:
        """Write the last checkpoint, or the best one, atomically; of several processes one does."""
        if rank() > 0:
            return
        whole = {"format": _FORMAT, "settings": dict(self.settings), **content}
        write_whole(self.folder / (BEST if best else LAST), lambda file: torch.save(whole, file))

    def restore(self) -> dict[str, Any] | None:
        """The last checkpoint where one is wanted and there.

        Raises:
            InputError: it was made under other settings, or cannot be read.
        """
        path = self.folder / LAST
        if not (self.resume and path.exists()):
            return None
        content = read_checkpoint(path)
        for name, value in self.settings.items():
            stored = content["settings"].get(name)
            if stored != value:
                raise InputError(
                    f"{path} was made with {name} = {stored}, not {value}: resume with the same "
                    "settings, or pretrain into another folder"
                )
        return content
