"""Does it help? Every method beside a tuned sum, tuned weights and a norm-matched control."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.measure import Case, alternate, describe
from benchmarks.problems import PROBLEMS, Problem
from benchmarks.rows import Row, Rows
from gradsurgery import AdaptiveGradientSurgery, methods

__all__ = ["GRID", "KEEP_THE_SUM", "STATIC", "SUM", "NormMatched", "run"]

SUM, STATIC, GRID = "tuned sum", "static weights", "static weights, whole grid"
KEEP_THE_SUM = ("ags", "constant", "sum")
"""Methods whose norm-matched control is the sum itself: their g has the sum's length."""

_FIRST_VALIDATION_SEED = 1000
# Where processes share a core, one step is either over before the switch or waits for it.
_STEPS_TIMED = 20


class NormMatched(methods.Method):
    """The plain sum's direction with the length that another method's g would have had here.

    w = 1 · sqrt(vᵀMv / 1ᵀM1) with v of the other method: what is left of its gain is due to
    the direction.
    """

    name: ClassVar[str] = "norm_matched"

    def __init__(self, method: str) -> None:
        self.method = methods.resolve(method)
        self.reads_losses = self.method.reads_losses

    def solve(
        self,
        gram: Tensor,
        losses: Tensor | None,
        generator: torch.Generator | None,
        relative_error: float,
    ) -> Tensor:
        other = self.method.solve(gram, losses, generator, relative_error)
        wanted = torch.einsum("...i,...ij,...j->...", other, gram, other).clamp(min=0)
        # Where the gradients cancel, the sum has no direction.
        own = gram.sum((-2, -1)).clamp(min=torch.finfo(gram.dtype).tiny)
        return (wanted / own).sqrt()[..., None].expand_as(other).clone()


# ----------------------------------------------------------------------------------- contenders

Setting = tuple[float, tuple[float, ...] | None]
"""Learning rate and static weights."""
Start = Callable[[Problem, Setting], Case]
"""What makes a training step."""


def _weighted(problem: Problem, setting: Setting) -> Case:
    """Plain training on the weighted sum of the losses: the optimizer alone, one backward."""
    rate, given = setting
    weights = torch.tensor(given or [1.0] * len(problem.objectives))
    optimizer = problem.optimizer(problem.model.parameters(), lr=rate)  # type: ignore[call-arg]

    def step() -> None:
        optimizer.zero_grad()
        (torch.stack(list(problem.losses().values())) * weights).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _surgery(problem: Problem, setting: Setting, method: str, *, control: bool = False) -> Case:
    base = problem.optimizer(problem.model.parameters(), lr=setting[0])  # type: ignore[call-arg]
    rule = NormMatched(method) if control else method
    optimizer = AdaptiveGradientSurgery(base, rule, seed=problem.seed)

    def step() -> None:
        optimizer.zero_grad()
        optimizer.backward(problem.losses())
        optimizer.step()

    return step


# --------------------------------------------------------------------------- training and tuning


@dataclass(frozen=True)
class _Plan:
    """What all contenders of one problem have in common."""

    problem: str
    steps: int
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    validation_seeds: tuple[int, ...]
    rounds: int
    """Of timing a step beside the plain sum's."""

    @property
    def kind(self) -> type[Problem]:
        return PROBLEMS[self.problem]

    def row(self, case: str, setting: Setting | None, split: str, seed: int, steps: int) -> Row:
        rate, weights = (None, None) if setting is None else setting
        return {
            "benchmark": "compare",
            "problem": self.problem,
            "case": case,
            "split": split,
            "lr": rate,
            "weights": weights,
            "seed": seed,
            "budget": "steps",
            "steps": steps,
        }

    def train(
        self, start: Start, setting: Setting, seed: int, split: str, marks: Sequence[int]
    ) -> dict[int, Row]:
        """Metrics after each number of steps in `marks`, or the error that stood in the way."""
        found: dict[int, Row] = {}
        try:
            problem = self.kind(seed)
            step = start(problem, setting)
            for done in range(1, max(marks) + 1):
                step()
                if done in marks:
                    if not all(p.isfinite().all() for p in problem.model.parameters()):
                        raise FloatingPointError(f"diverged within {done} steps")
                    found[done] = dict(problem.evaluate(split))
        except Exception as error:
            failed = {"error": describe(error)}
            found |= {mark: failed for mark in marks if mark not in found}
        return found

    def tune(
        self, case: str, start: Start, settings: Sequence[Setting], marks: Sequence[int]
    ) -> tuple[list[Row], dict[tuple[Setting, int], float]]:
        """Rows, and (setting, steps) -> mean score over validation seeds where none failed."""
        rows: list[Row] = []
        scores: dict[tuple[Setting, int], float] = {}
        for setting in settings:
            runs = []
            for seed in self.validation_seeds:
                runs.append(self.train(start, setting, seed, "validation", marks))
                rows += [
                    self.row(case, setting, "validation", seed, mark) | outcome
                    for mark, outcome in runs[-1].items()
                ]
            for mark in marks:
                outcomes = [outcome[mark] for outcome in runs]
                if not any("error" in outcome for outcome in outcomes):
                    values = [outcome[self.kind.metrics[0]] for outcome in outcomes]
                    scores[setting, mark] = sum(values) / len(values)
        return rows, scores

    def best(
        self, scores: Mapping[tuple[Setting, int], float], settings: Sequence[Setting], mark: int
    ) -> Setting | None:
        """The setting that validation prefers."""
        left = [setting for setting in settings if (setting, mark) in scores]
        choose = max if self.kind.higher_is_better else min
        return choose(left, key=lambda setting: scores[setting, mark], default=None)

    def test(
        self, case: str, start: Start, chosen: Mapping[int, Setting | None]
    ) -> dict[int, list[Row]]:
        """Number of steps -> one row per seed, with the setting that was chosen for it."""
        found: dict[int, list[Row]] = {steps: [] for steps in chosen}
        ends = (self.rates[0], self.rates[-1])
        for setting in dict.fromkeys(chosen.values()):
            marks = [steps for steps, own in chosen.items() if own == setting]
            for seed in self.seeds:
                if setting is None:
                    outcomes = {mark: {"error": "no setting is left"} for mark in marks}
                else:
                    outcomes = self.train(start, setting, seed, "test", marks)
                for steps, outcome in outcomes.items():
                    row = self.row(case, setting, "test", seed, steps) | outcome
                    row["edge"] = (setting is not None and setting[0] in ends) or None
                    found[steps].append(row)
        return found

    def rates_alone(self) -> list[Setting]:
        """What every contender but the static weights is tuned over."""
        return [(rate, None) for rate in self.rates]

    def time(self, start: Start) -> Row:
        """Median time of a step, and the median over rounds of its ratio to the sum's."""
        setting = self.rates[0], None
        cases = {
            "sum": partial(_repeat, _weighted(self.kind(self.seeds[0]), setting)),
            "own": partial(_repeat, start(self.kind(self.seeds[0]), setting)),
        }
        row = alternate(cases, self.rounds, torch.device("cpu")).row("own", over_sum="sum")
        if "error" in row:
            return {}
        return {"step_ms": row["median_ms"] / _STEPS_TIMED, "over_sum": row["over_sum"]}


def _repeat(step: Case) -> None:
    for _ in range(_STEPS_TIMED):
        step()


# ------------------------------------------------------------- jobs, each for one worker process


def _static(plan: _Plan) -> list[Row]:
    """Static weights, chosen from as many trials as a method gets, and from the whole grid."""
    grid: list[Setting] = [(rate, own) for own in plan.kind.weights for rate in plan.rates]
    trials = random.Random(0).sample(grid, len(plan.rates))
    rows, scores = plan.tune(GRID, _weighted, grid, [plan.steps])
    for case, settings in ((STATIC, trials), (GRID, grid)):
        best = plan.best(scores, settings, plan.steps)
        rows += plan.test(case, _weighted, {plan.steps: best})[plan.steps]
    return rows


def _method(plan: _Plan, name: str, *, control: bool) -> list[Row]:
    """A method, or its norm-matched control, at the same number of steps as the sum."""
    case = f"{name}: norm-matched sum" if control else name
    start = partial(_surgery, method=name, control=control)
    rows, scores = plan.tune(case, start, plan.rates_alone(), [plan.steps])
    chosen = plan.best(scores, plan.rates_alone(), plan.steps)
    tested = plan.test(case, start, {plan.steps: chosen})[plan.steps]
    if not control and chosen is not None:
        times = plan.time(start)
        tested = [row | times for row in tested]
    about = {"method": name, "control": control or None}
    return [row | about for row in (*rows, *tested)]


def _sum(plan: _Plan, over_sum: Mapping[str, float]) -> list[Row]:
    """The sum at the common number of steps, and for each method in that method's time."""
    steps_of = {name: max(1, round(plan.steps * ratio)) for name, ratio in over_sum.items()}
    marks = sorted({plan.steps, *steps_of.values()})
    rows, scores = plan.tune(SUM, _weighted, plan.rates_alone(), marks)
    best = {mark: plan.best(scores, plan.rates_alone(), mark) for mark in marks}
    tested = plan.test(SUM, _weighted, best)
    rows += tested[plan.steps]
    for name, steps in steps_of.items():
        about = {"budget": "time", "time_of": name, "over_sum": over_sum[name]}
        rows += [row | about for row in tested[steps]]
    return rows


Job = Callable[[], list[Row]]


def _work(jobs: Sequence[Job], workers: int) -> Iterator[Callable[[], list[Row]]]:
    """What gives each job's rows, in order; with one worker in this process."""
    if workers == 1:
        yield from jobs
        return
    with ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(torch.get_num_threads(),),
    ) as pool:
        futures: list[Future[list[Row]]] = [pool.submit(job) for job in jobs]
        for future in futures:
            yield future.result


def run(
    rows: Rows,
    *,
    problems: Sequence[str],
    methods: Sequence[str],
    steps: int | None,
    rates: int | None,
    seeds: int,
    validation_seeds: int,
    rounds: int,
    jobs: int,
    device: torch.device,
) -> None:
    """One row per problem, contender, learning rate, seed and budget.

    Args:
        rows: where they go.
        problems: names out of `PROBLEMS`.
        methods: names out of `gradsurgery.methods.available()`.
        steps: of each training. None: the problem's own number.
        rates: how many of the problem's learning rates are tried, the middle ones. None: all.
        seeds: number of test seeds, 0 and up.
        validation_seeds: number of seeds that settings are tuned with, 1000 and up.
        rounds: of timing each method's step beside the plain sum's.
        jobs: worker processes, each with as many threads as this one.
        device: the CPU.

    Raises:
        ValueError: another device, or an unknown problem.
    """
    if device.type != "cpu":
        raise ValueError(f"compare trains networks too small for {device}; use --device cpu")
    for name in problems:
        if name not in PROBLEMS:
            raise ValueError(f"problems are {', '.join(PROBLEMS)}; got {name!r}")
    plans = [_plan(name, steps, rates, seeds, validation_seeds, rounds) for name in problems]
    todo: list[tuple[dict[str, Any], Job]] = []
    for plan in plans:
        about = {"benchmark": "compare", "problem": plan.problem}
        todo.append((about | {"case": GRID}, partial(_static, plan)))
        for name in methods:
            todo.append((about | {"case": name}, partial(_method, plan, name, control=False)))
            if name not in KEEP_THE_SUM:
                control = partial(_method, plan, name, control=True)
                todo.append((about | {"case": f"{name}: norm-matched sum"}, control))
    _collect(rows, todo, jobs)
    todo = []
    for plan in plans:
        ratios = {
            row["method"]: row["over_sum"]
            for row in rows.written
            if row["problem"] == plan.problem and "method" in row and "over_sum" in row
        }
        about = {"benchmark": "compare", "problem": plan.problem, "case": SUM}
        todo.append((about, partial(_sum, plan, ratios)))
    _collect(rows, todo, jobs)


def _collect(rows: Rows, todo: Sequence[tuple[dict[str, Any], Job]], workers: int) -> None:
    results = _work([job for _, job in todo], workers)
    for (about, _), result in zip(todo, results, strict=True):
        with rows.failures(**about, split="test"):
            for fields in result():
                rows.add(**fields)


def _plan(
    name: str, steps: int | None, rates: int | None, seeds: int, validation_seeds: int, rounds: int
) -> _Plan:
    grid = PROBLEMS[name].rates
    count = len(grid) if rates is None else min(rates, len(grid))
    first = (len(grid) - count) // 2
    return _Plan(
        name,
        PROBLEMS[name].steps if steps is None else steps,
        grid[first : first + count],
        tuple(range(seeds)),
        tuple(range(_FIRST_VALIDATION_SEED, _FIRST_VALIDATION_SEED + validation_seeds)),
        rounds,
    )
