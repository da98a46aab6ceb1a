"""Processes that all tests here share, and the table of distances (`pytest -v` prints it)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from launch import Processes

_measured: list[tuple[str, float]] = []


@pytest.fixture(scope="session")
def two() -> Iterator[Processes]:
    processes = Processes(2)
    yield processes
    processes.close()


@pytest.fixture(scope="session")
def four() -> Iterator[Processes]:
    processes = Processes(4)
    yield processes
    processes.close()


@pytest.fixture
def record_distance(request: pytest.FixtureRequest) -> Callable[[float], None]:
    return lambda distance: _measured.append((request.node.name, distance))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _measured and terminalreporter.verbosity > 0:
        terminalreporter.section("relative distance to one process on the joined batch")
        for name, distance in _measured:
            terminalreporter.write_line(f"{distance:8.1e}  {name}")
