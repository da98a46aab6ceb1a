"""Turns rows into Markdown tables, one for each run of each benchmark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.rows import ENVIRONMENT, Row

__all__ = ["tables"]


def tables(rows: Iterable[Row]) -> str:
    """Markdown. What is the same in all rows of a table, and where they are from, is under it."""
    blocks: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        # Runs of other settings may begin in the same second.
        key = (row["benchmark"], row["date"], row["commit"], row["device"])
        blocks.setdefault(key, []).append(row)
    return "\n\n".join(_table(key[0], block) for key, block in blocks.items())


def _table(title: str, rows: Sequence[Row]) -> str:
    hidden = ("benchmark", *ENVIRONMENT)
    fields = list(dict.fromkeys(key for row in rows for key in row if key not in hidden))
    if "error" in fields:
        fields.append(fields.pop(fields.index("error")))
    # A failed row lacks figures; what it is about, it shares.
    whole = [row for row in rows if "error" not in row] or rows
    same = [key for key in fields if len(rows) > 1 and _constant(key, whole)]
    columns = [key for key in fields if key not in same]
    lines = [_line(columns), "|" + "---|" * len(columns)]
    lines += [_line([row.get(key, "") for key in columns]) for row in rows]
    notes = [f"{key} {rows[0].get(key, whole[0][key])}" for key in same]
    notes += [_environment(rows[0])]
    return f"### {title}\n\n" + "\n".join(lines) + "\n\n" + ", ".join(notes)


def _constant(key: str, rows: Sequence[Row]) -> bool:
    if key in ("case", "error"):
        return False
    return all(key in row and row[key] == rows[0][key] for row in rows)


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _environment(row: Row) -> str:
    versions = [
        f"{name} {row[name]}"
        for name in ("torch", "triton", "gradsurgery", "python")
        if name in row
    ]
    where = [row["device"], f"{row['threads']} threads", *versions]
    return ", ".join([*where, f"commit {row['commit']}", row["date"]])
