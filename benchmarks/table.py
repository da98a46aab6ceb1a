"""Turns a results file into tables, one for each benchmark in it."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["tables"]

_HIDDEN = ("benchmark", "device", "threads", "torch", "python", "commit", "date")


def tables(path: Path) -> str:
    """Markdown, with the environment of each block under it."""
    blocks: dict[tuple[str, str, str], list[dict[str, object]]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        blocks.setdefault((row["benchmark"], row["commit"], row["date"]), []).append(row)
    parts = []
    for (benchmark, commit, date), rows in blocks.items():
        fields = [key for key in rows[0] if key not in _HIDDEN]
        lines = [
            "| " + " | ".join(fields) + " |",
            "|" + "---|" * len(fields),
            *("| " + " | ".join(str(row.get(key, "")) for key in fields) + " |" for row in rows),
        ]
        first = rows[0]
        where = f"{first['device']}, {first['threads']} threads, torch {first['torch']}"
        parts.append(
            f"### {benchmark}\n\n" + "\n".join(lines) + f"\n\n{where}, commit {commit}, {date}"
        )
    return "\n\n".join(parts)
