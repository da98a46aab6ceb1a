"""A rank that is killed in the middle of a step: the others raise, they do not hang."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch.distributed as dist
from launch import Processes
from torch import Tensor
from training import Setting, attempt, batches, make

TIMEOUT = 10.0


def die_in_the_second_backward(how: str, number: int) -> tuple[str, float, bool, str]:
    """The last rank gets a signal between its first and its second task's backward."""
    network, model, optimizer = make(Setting(how))
    optimizer.backward(model(batches(1)[0]))
    before = [None if p.grad is None else p.grad for p in network.parameters()]
    losses = list(model(batches(1)[0]))
    if dist.get_rank() == dist.get_world_size() - 1:

        def die(gradient: Tensor) -> None:
            os.kill(os.getpid(), number)

        losses[1].register_hook(die)
    start = time.monotonic()
    message = attempt(lambda: optimizer.backward(losses))
    seconds = time.monotonic() - start
    kept = all(p.grad is earlier for p, earlier in zip(network.parameters(), before, strict=True))
    again = attempt(lambda: optimizer.backward(model(batches(1)[0])))
    return message, seconds, kept, again


def check(size: int, how: str, number: int) -> list[float]:
    processes = Processes(size, seconds=TIMEOUT)
    waited: list[float] = []
    try:
        processes.send(die_in_the_second_backward, how, number)
        for rank in range(size - 1):
            succeeded, answer = processes.receive(rank)
            assert succeeded, answer
            message, seconds, kept, again = answer
            print(f"{how}, rank {rank} of {size}, after {seconds:.2f} s: {message}")
            waited.append(seconds)
            if "shard" in how:
                # fully_shard's own collectives fail, with their own words.
                assert message.startswith(("RuntimeError", "Dist"))
            else:
                assert message.startswith(f"RuntimeError: rank {rank} cannot reach the other ranks")
                assert kept
                assert "out of step: start again from a checkpoint" in again
    finally:
        processes.close()
    return waited


def test_a_killed_rank() -> None:
    assert max(check(2, "ddp", signal.SIGKILL)) < TIMEOUT


@pytest.mark.slow
@pytest.mark.parametrize("how", ["bare", "fully_shard blocks"])
def test_a_killed_rank_of_three(how: str) -> None:
    assert max(check(3, how, signal.SIGKILL)) < TIMEOUT


@pytest.mark.slow
@pytest.mark.parametrize("how", ["bare", "fully_shard blocks"])
def test_a_rank_that_stands_still(how: str) -> None:
    assert max(check(2, how, signal.SIGSTOP)) < TIMEOUT + 5
