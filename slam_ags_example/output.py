"""How the files of a run are written: whole or not at all, whatever happens meanwhile."""

import csv
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

__all__ = ["read_csv", "read_json", "remove_partial", "write_csv", "write_json", "write_whole"]

_PARTIAL = ".partial"


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a file beside ``path``, put it on the disk, and rename it.

    Who reads ``path`` finds the old content or the new one, and no part of either. What a killed
    process leaves beside it, :func:`remove_partial` removes.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}{_PARTIAL}")
    try:
        with beside.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def remove_partial(folder: Path) -> None:
    """Remove what :func:`write_whole` left in a folder when it was killed."""
    for path in folder.glob(f".*{_PARTIAL}"):
        path.unlink(missing_ok=True)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows under the names of the first; an empty file where there are none."""
    text = io.StringIO(newline="")
    if rows:
        writer = csv.DictWriter(text, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    write_whole(path, lambda file: file.write(text.getvalue().encode()))


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a file that :func:`write_csv` wrote."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object; NaN and infinity, which JSON has not, are refused by ValueError."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file that :func:`write_json` wrote; empty where there is no file."""
    if not path.exists():
        return {}
    content: dict[str, Any] = json.loads(path.read_text())
    return content
