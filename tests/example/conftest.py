"""Processes that the tests here share, so that a start is paid once."""

import pytest

from tests.distributed.launch import Processes


@pytest.fixture(scope="session")
def two():
    processes = Processes(2)
    yield processes
    processes.close()


@pytest.fixture(scope="session")
def three():
    processes = Processes(3)
    yield processes
    processes.close()
