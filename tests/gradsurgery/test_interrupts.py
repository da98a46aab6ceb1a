"""Interrupts at every line, lack of memory in every op, signals at random: no call is half done."""

from __future__ import annotations

import copy
import functools
import random
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import assert_same, batch
from faults import InterruptError, Run, fresh, values
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import gradsurgery

LIBRARY = str(Path(gradsurgery.__file__).parent)
# The same sums in rows that may be laid out otherwise: some roundings of float32.
TOLERANCE = 1e-5


class AtLine:
    """Raises when the library's line number `at` (counted as they run) is about to run."""

    def __init__(self, error: BaseException | None = None, at: int = -1) -> None:
        self.error, self.at = error, at
        self.places: list[tuple[str, int]] = []

    def _enter(self, frame: Any, event: str, arg: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(LIBRARY) else None

    def _line(self, frame: Any, event: str, arg: Any) -> Any:
        if event == "line":
            self.places.append((frame.f_code.co_filename, frame.f_lineno))
            if len(self.places) == self.at + 1:
                assert self.error is not None
                sys.settrace(self._before)
                raise self.error
        return self._line

    def __enter__(self) -> AtLine:
        self._before = sys.gettrace()
        sys.settrace(self._enter)
        return self

    def __exit__(self, *what: object) -> None:
        sys.settrace(self._before)


class AtOp(TorchDispatchMode):
    """Raises in the place of op number `at`, in the library and in autograd alike."""

    def __init__(self, error: BaseException | None = None, at: int = -1) -> None:
        super().__init__()
        self.error, self.at = error, at
        self.places: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, and fail or go on."""
        self.places.append((str(func), 0))
        if len(self.places) == self.at + 1:
            assert self.error is not None
            raise self.error
        return func(*args, **(kwargs or {}))


INJECTORS: dict[str, tuple[Callable[..., Any], Callable[[], BaseException]]] = {
    "interrupt at a line": (AtLine, lambda: InterruptError("stop")),
    "no memory in an op": (AtOp, lambda: torch.OutOfMemoryError("simulated")),
}
# (gradients there, micro-batches waiting, accumulate, the waiting ones reach less than the call)
SCENARIOS = {
    "fresh": (False, False, False, False),
    "added to": (True, False, False, False),
    "first micro-batch": (True, False, True, False),
    "second micro-batch": (False, True, True, False),
    "last micro-batch": (True, True, False, False),
    "micro-batch that reaches more": (False, True, False, True),
}


def scenario(name: str) -> tuple[Run, Callable[[], None]]:
    """A run, and the call that is going to fail."""
    there, waiting, accumulate, less = SCENARIOS[name]
    run = Run(there=there, waiting=waiting and not less)
    if less:
        for p in run.model.conv.parameters():
            p.requires_grad_(False)
        run.optimizer.backward(run.model.losses(batch(2)), accumulate=True)
        for p in run.model.conv.parameters():
            p.requires_grad_(True)
        run.state = copy.deepcopy(run.optimizer.state_dict())
    losses = run.model.losses(batch(3))
    return run, lambda: run.optimizer.backward(losses, accumulate=accumulate)


def close(found: list[Tensor | None], wanted: list[Tensor | None]) -> bool:
    """Equal but for rounding, and None where None is."""
    size = max(float(w.abs().max()) for w in wanted if w is not None)
    return all(
        (f is None) == (w is None) and (f is None or float((f - w).abs().max()) <= TOLERANCE * size)
        for f, w in zip(found, wanted, strict=True)
    )


@functools.cache
def untroubled(name: str) -> tuple[list[Tensor | None], Any]:
    """Gradients and state after the call, where nothing goes wrong."""
    run, call = scenario(name)
    call()
    return values(run.model), copy.deepcopy(run.optimizer.state_dict())


def trial(name: str, context: AbstractContextManager[Any]) -> list[str]:
    """One fault somewhere in a call: what is wrong afterwards, in words."""
    complaints: list[str] = []
    wanted, wanted_state = untroubled(name)
    run, call = scenario(name)
    try:
        with context:
            call()
    except (InterruptError, torch.OutOfMemoryError):
        pass
    else:
        complaints.append("swallowed")
    # A signal may come while torch itself leaves no_grad.
    torch.set_grad_enabled(True)
    pairs = zip(run.model.parameters(), run.grads, strict=True)
    after = any(p.grad is not g for p, g in pairs) or not _same(values(run.model), run.values)
    if after and not _same(values(run.model), wanted):
        complaints.append("p.grad is neither what it was nor what it was to become")
    if not _same(run.optimizer.state_dict(), wanted_state if after else run.state):
        complaints.append("state: order or method have moved")
    if not after and run.optimizer.last is not run.last:
        complaints.append("state: the report is of a call that did not happen")
    # What may take part in the next call: what waited and was not touched, or nothing of it, and
    # the call itself where it was an accumulating one that had been carried out.
    _, waiting, accumulate, less = SCENARIOS[name]
    possible: list[list[int]] = [[]]
    if waiting and not less and not after:
        possible.append([2])
    if accumulate:
        possible.append([2, 3] if waiting else [3])
    allowed = [fresh(run, each, "gradvac") for each in possible]
    try:
        run.call()
    except Exception as error:
        return [*complaints, f"the next call fails: {error!r}"]
    found = values(run.model)
    right = any(close(found, each) for each in allowed)
    if not right and not (less and not after and _waited(run, found)):
        complaints.append("the next call gives something else than a fresh plugin")
    return complaints


def _waited(run: Run, found: list[Tensor | None]) -> bool:
    """Whether the next call took in the micro-batch that waited, where that one reached less."""
    twin, _ = scenario("micro-batch that reaches more")
    twin.optimizer.load_state_dict(copy.deepcopy(run.state))
    for p in twin.model.conv.parameters():
        p.requires_grad_(False)
    twin.optimizer.backward(twin.model.losses(batch(2)), accumulate=True)
    for p in twin.model.conv.parameters():
        p.requires_grad_(True)
    twin.call()
    return close(found, values(twin.model))


def _same(found: Any, wanted: Any) -> bool:
    try:
        assert_same(found, wanted)
    except AssertionError:
        return False
    return True


@functools.cache
def trials(name: str, injector: str) -> dict[str, list[str]]:
    """Complaint -> places, with a fault at the first and the last run of each line or op."""
    make, error = INJECTORS[injector]
    recorder = make()
    _, call = scenario(name)
    with recorder:
        call()
    first = {place: index for index, place in reversed(list(enumerate(recorder.places)))}
    last = {place: index for index, place in enumerate(recorder.places)}
    found: dict[str, list[str]] = {}
    for at in sorted({*first.values(), *last.values()}):
        file, line = recorder.places[at]
        for complaint in trial(name, make(error(), at)):
            found.setdefault(complaint, []).append(f"{Path(file).name}:{line} (number {at})")
    return found


def about(found: dict[str, list[str]], *, state: bool) -> str:
    """Complaints about order, method and report, or those about results; with their places."""
    return "\n".join(
        f"{complaint}: {len(places)} places, {', '.join(places[:8])}"
        for complaint, places in found.items()
        if complaint.startswith("state: ") == state
    )


every_scenario = pytest.mark.parametrize("name", SCENARIOS)
every_injector = pytest.mark.parametrize(
    "injector",
    [
        pytest.param("interrupt at a line", marks=pytest.mark.slow),
        "no memory in an op",
    ],
)


@every_injector
@every_scenario
def test_a_fault_anywhere_leaves_gradients_and_the_next_call_right(
    name: str, injector: str
) -> None:
    """An interrupt at each line of the library, and each op without memory.

    p.grad is what it was, or, for an interrupt that comes late, what it was to become; the next
    call gives what a fresh plugin would give.
    """
    assert not about(trials(name, injector), state=False)


@every_injector
@every_scenario
def test_a_fault_anywhere_leaves_state_and_report(name: str, injector: str) -> None:
    """Order, method's state and report are those of the calls that happened."""
    assert not about(trials(name, injector), state=True)


# ------------------------------------------------------------------ real signals


class Timer:
    """Raises out of a real signal after a while, unless left before."""

    def __init__(self, delay_s: float) -> None:
        self.delay_s = delay_s

    @staticmethod
    def handler(number: int, frame: Any) -> None:
        """As Python's own for SIGINT."""
        raise InterruptError("a signal")

    def __enter__(self) -> None:
        self.before = signal.signal(signal.SIGALRM, self.handler)
        signal.setitimer(signal.ITIMER_REAL, self.delay_s)

    def __exit__(self, *what: object) -> None:
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)
        finally:
            signal.signal(signal.SIGALRM, self.before)


@functools.cache
def signals(count: int) -> tuple[int, str, dict[str, list[str]]]:
    """Calls that a signal cuts off at random: how many were, a line of figures, complaints."""
    seed = random.SystemRandom().randrange(2**31)
    choose, hits = random.Random(seed), 0
    found: dict[str, list[str]] = {}
    durations_s = {}
    for name in SCENARIOS:
        _, call = scenario(name)
        started = time.perf_counter()
        call()
        durations_s[name] = time.perf_counter() - started
    for number in range(count):
        name = list(SCENARIOS)[number % len(SCENARIOS)]
        delay_s = choose.uniform(1e-5, durations_s[name])
        complaints = trial(name, Timer(delay_s))
        hits += "swallowed" not in complaints
        for complaint in set(complaints) - {"swallowed"}:
            found.setdefault(complaint, []).append(f"{name} after {delay_s:.6f} s")
    return hits, f"signals: seed {seed}, {hits} of {count} calls interrupted", found


# The plugin of pytest that limits a test's time has SIGALRM in use otherwise.
@pytest.mark.slow
@pytest.mark.timeout(600, method="thread")
@pytest.mark.parametrize("state", [False, True])
def test_calls_that_signals_interrupt_at_random(state: bool) -> None:
    """After each one p.grad is one or the other, and the next call is right."""
    hits, line, found = signals(600)
    print(f"\n{line}")
    assert hits >= 200
    assert not about(found, state=state), line
