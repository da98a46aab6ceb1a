"""A table of what pytest found, from its JUnit file: one line for each test function.

    python -m benchmarks.checks RESULTS.xml [--errors N] [--lines N]

Above the table stands each distinct failure once, shortened, with the cases that it came in.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

__all__ = ["main"]

_CASES_NAMED = 30


@dataclass
class Check:
    """The cases of one test function."""

    counts: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)


@dataclass
class Failure:
    """What several cases failed with."""

    text: str
    cases: list[tuple[str, str]] = field(default_factory=list)
    """Names and messages."""


def read(path: Path) -> tuple[dict[str, Check], list[Failure]]:
    """Checks by name and distinct failures, both in the order of the file."""
    checks: dict[str, Check] = {}
    failures: dict[tuple[str, str], Failure] = {}
    for case in ElementTree.parse(path).iter("testcase"):
        file = case.get("classname", "").rpartition(".")[2]
        name = case.get("name", "")
        if not name:
            continue  # what an interrupted run leaves
        function = f"{file}::{name.partition('[')[0]}"
        check = checks.setdefault(function, Check())
        check.seconds += float(case.get("time", 0))
        bad = [found for tag in ("failure", "error") for found in case.findall(tag)]
        skipped = case.find("skipped")
        if skipped is not None:
            expected = "xfail" in skipped.get("type", "")
            check.counts["xfailed" if expected else "skipped"] += 1
            check.reasons[skipped.get("message", "")] += 1
        else:
            check.counts["failed" if bad else "passed"] += 1
        for found in bad:
            message = found.get("message", "").partition("\n")[0]
            text = found.text or message
            key = function, _without_numbers(message)
            failures.setdefault(key, Failure(text)).cases.append((name, message))
    return checks, list(failures.values())


def _without_numbers(message: str) -> str:
    """What two failures for one reason share."""
    return re.sub(r"0x[0-9a-f]+|[-+]?\d[\d.e+-]*", "#", message)


def shortened(text: str, lines: int) -> str:
    """The first and the last lines, where there are too many."""
    rows = [row[:400] for row in text.strip().splitlines()]
    if len(rows) <= lines:
        return "\n".join(rows)
    head = lines // 3
    left_out = f"    ... {len(rows) - lines} lines left out"
    return "\n".join([*rows[:head], left_out, *rows[head - lines :]])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print failures and the table; 1 where something failed, 2 where there is nothing to read."""
    parser = argparse.ArgumentParser(prog="benchmarks.checks", description=__doc__)
    parser.add_argument("results", type=Path, help="what pytest --junitxml wrote")
    parser.add_argument("--errors", type=int, default=12, help="most failures shown at length")
    parser.add_argument("--lines", type=int, default=28, help="most lines of each")
    options = parser.parse_args(arguments)
    try:
        checks, failures = read(options.results)
    except (OSError, ElementTree.ParseError) as error:
        print(f"{options.results} cannot be read: {error}", file=sys.stderr)
        return 2
    for number, failure in enumerate(failures):
        (first, _), *others = failure.cases
        print(f"--- {len(failure.cases)} failed: {first}")
        print(shortened(failure.text, options.lines if number < options.errors else 2))
        for name, message in others[:_CASES_NAMED]:
            print(f"also {name}: {message[:160]}")
        if len(others) > _CASES_NAMED:
            print(f"and {len(others) - _CASES_NAMED} more")
    columns = ("passed", "failed", "skipped", "xfailed")
    width = max((len(name) for name in checks), default=5)
    print(f"\n{'check':{width}} {' '.join(f'{name:>7}' for name in columns)} seconds")
    for name, check in checks.items():
        row = " ".join(f"{check.counts[column]:7}" for column in columns)
        why = f"  {check.reasons.most_common(1)[0][0][:60]}" if check.reasons else ""
        print(f"{name:{width}} {row} {check.seconds:7.1f}{why}")
    total: Counter[str] = Counter()
    for check in checks.values():
        total += check.counts
    row = " ".join(f"{total[column]:7}" for column in columns)
    print(f"{'all':{width}} {row} {sum(check.seconds for check in checks.values()):7.1f}")
    return 1 if total["failed"] or not checks else 0


if __name__ == "__main__":
    sys.exit(main())
