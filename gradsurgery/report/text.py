"""Numbers and tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["number", "table"]


def number(value: float, spec: str = ".4g") -> str:
    """The value; "-" where nothing was measured."""
    return "-" if math.isnan(value) else format(value, spec)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns under each other, the first one to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if position else cell.ljust(width)
            for position, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
