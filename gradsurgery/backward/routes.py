"""The four ways from losses to p.grad, and which one a call takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Protocol

import torch
from torch import Tensor

from gradsurgery.backward.features import FeatureGradients
from gradsurgery.backward.selection import Plan
from gradsurgery.backward.tasks import MicroBatches, Request, Settings, Tasks
from gradsurgery.backward.transaction import Transaction
from gradsurgery.options import Options
from gradsurgery.report import SurgeryReport
from gradsurgery.weights.solver import Rows, Solver

__all__ = ["Call", "Outcome", "Route", "Source", "choose_route"]


class Source(Protocol):
    """Where gradients come from: this process alone, or a group of them.

    For each route it makes room (`begin...`), differentiates (`fill...`), and hands over p.grad
    (`publish...`).
    """

    last_reach: dict[int, int]
    keeps_rows: bool
    waits_in_grad: bool
    """Whether micro-batches of known weights, or of one task, wait in p.grad itself."""

    @property
    def rows(self) -> Rows:
        """The task gradients, once they are filled."""

    def held(self) -> list[Tensor]:
        """The parameters that have rows."""

    def read(self, request: Request, waiting: MicroBatches | None, settings: Settings) -> Tasks:
        """Check the request, and agree on it where several processes take part."""

    def single(self, tasks: Tasks, waiting: MicroBatches | None) -> Plan | None:
        """Differentiate one task's loss into p.grad; or a plan of rows that are still to fill."""

    def begin(self, tasks: Tasks, waiting: MicroBatches | None) -> Plan:
        """Room for a row per task."""

    def fill(self, tasks: Tasks, plan: Plan, *, add: bool) -> None:
        """One backward pass per task."""

    def publish(self, plan: Plan, operated: list[bool]) -> None:
        """The combined row becomes p.grad."""

    def can_weigh(self, tasks: Tasks, waiting: MicroBatches | None) -> bool:
        """Whether one backward pass of the weighted sum does."""

    def begin_weighted(self, tasks: Tasks, waiting: MicroBatches | None) -> Plan:
        """Room for the gradient of the weighted sum."""

    def fill_weighted(self, tasks: Tasks, plan: Plan, weights: Tensor, *, add: bool) -> None:
        """One backward pass of the weighted sum."""

    def publish_weighted(self, plan: Plan) -> None:
        """Its gradient becomes p.grad."""

    def begin_features(self, tasks: Tasks) -> tuple[Plan, Callable[[Tensor, Tensor], None]]:
        """Room, and what takes the gradient of a leaf beside the features."""

    def fill_features(self, tasks: Tasks, gradients: FeatureGradients) -> None:
        """A pass per task, down to the features."""

    def total(self, gram: Tensor) -> Tensor:
        """M at the features over all processes."""

    def finish_features(
        self, tasks: Tasks, plan: Plan, gradients: FeatureGradients, weights: Tensor
    ) -> None:
        """The pass through the trunk."""

    def publish_features(self, plan: Plan) -> None:
        """The gradients become p.grad."""


@dataclass
class Call:
    """What a route works with."""

    tasks: Tasks
    source: Source
    solver: Solver
    options: Options
    parameters: list[Tensor]
    """The optimizer's, those that require grad."""
    weights: Tensor | None
    """Known from an earlier solve, [T]; None where they are to be found."""
    waiting: MicroBatches | None
    drop: Callable[[], None]
    """Called before memory changes in which micro-batches wait: a call that fails drops them."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tasks."""
        return self.tasks.names

    @property
    def values(self) -> Tensor | None:
        """The losses' values with those of the micro-batches that wait."""
        now = self.tasks.values
        before = self.waiting.values if self.waiting else None
        return now if now is None or before is None else now + before

    def ask(self) -> SurgeryReport:
        """The weights of a method that needs no gradients."""
        return self.solver.ask(self.names, self.tasks.device, self.values)

    def waits(
        self, *, in_rows: bool, weights: Tensor | None, reach: dict[int, int]
    ) -> MicroBatches:
        """What waits after this micro-batch."""
        return MicroBatches(self.names, in_rows, weights, self.values, reach)


@dataclass
class Outcome:
    """What a call has done."""

    report: SurgeryReport | None
    """Of weights that were found in this call; None where none were."""
    waiting: MicroBatches | None
    reached: bool
    """Whether any parameter got a gradient."""
    arrived: int
    """The tasks of which a gradient has arrived, bit t for task t; -1 where they were not told
    apart."""
    operated: list[bool]
    """For each parameter with rows whether it was under surgery; empty without rows."""


class Route(Protocol):
    """One way from losses to p.grad."""

    def run(self, call: Call) -> Outcome:
        """All of it, or nothing."""


class SingleTask:
    """Nothing to weigh: `loss.backward()`."""

    def run(self, call: Call) -> Outcome:
        """See `Route`."""
        tasks, source, waiting = call.tasks, call.source, call.waiting
        if not source.waits_in_grad:
            call.drop()
        plan = source.single(tasks, waiting)
        accumulate = tasks.request.accumulate
        reach: dict[int, int] = {}
        if plan is not None:
            rows = plan

            def body() -> None:
                source.fill(tasks, rows, add=waiting is not None)
                if not accumulate:
                    source.publish(rows, [])

            Transaction(plan.leaves, call.solver).run(body)
            reach = plan.reach()
        one = torch.ones(1, dtype=torch.float64, device=tasks.device)
        report = SurgeryReport(call.names, torch.full_like(one, torch.nan)[:, None], one)
        after = call.waits(in_rows=plan is not None, weights=None, reach=reach)
        return Outcome(report, after if accumulate else None, True, -1, [])


class PerTask:
    """A backward pass per task, into rows; then M, w and g. With known weights, no M."""

    def run(self, call: Call) -> Outcome:
        """See `Route`."""
        tasks, source, solver, waiting = call.tasks, call.source, call.solver, call.waiting
        shown = any(tasks.reach.values())
        call.drop()
        plan = source.begin(tasks, waiting)

        def body() -> tuple[SurgeryReport | None, list[bool]]:
            report = None
            source.fill(tasks, plan, add=waiting is not None and waiting.in_rows)
            weights = call.weights
            if weights is None and solver.knows_weights:
                # Of the first micro-batch, as where one backward pass does.
                report = call.ask()
                weights = report.weights
            if tasks.request.accumulate:
                return report, []
            operated = plan.operated(call.options.scope)
            if weights is None:
                report = solver.solve(
                    source.rows, operated, call.parameters, call.names, tasks.device, call.values
                )
                weights = report.weights
            solver.combine(source.rows, operated, call.parameters, weights)
            source.publish(plan, operated)
            return report, operated

        report, operated = Transaction(plan.leaves, solver).run(body)
        source.last_reach = plan.reach()
        after = None
        if tasks.request.accumulate:
            weights = report.weights if report is not None else call.weights
            after = call.waits(in_rows=True, weights=weights, reach=source.last_reach)
        arrived = reduce(or_, plan.reached, 0) | reduce(or_, tasks.reach.values(), 0)
        return Outcome(report, after, shown or any(plan.reached), arrived, operated)


class Weighted:
    """The weights are known beforehand: one backward pass of Σ_t w_t L_t."""

    def run(self, call: Call) -> Outcome:
        """See `Route`."""
        tasks, source, waiting = call.tasks, call.source, call.waiting
        shown = any(tasks.reach.values())
        if not source.waits_in_grad:
            call.drop()
        plan = source.begin_weighted(tasks, waiting)

        def body() -> tuple[SurgeryReport | None, Tensor]:
            report, weights = None, call.weights
            if weights is None:
                report = call.ask()
                weights = report.weights
            source.fill_weighted(tasks, plan, weights, add=waiting is not None)
            if not tasks.request.accumulate:
                source.publish_weighted(plan)
            return report, weights

        report, weights = Transaction(plan.leaves, call.solver).run(body)
        after = None
        if tasks.request.accumulate:
            after = call.waits(in_rows=False, weights=weights, reach=plan.reach())
        return Outcome(report, after, shown or any(plan.reached) or bool(tasks.opaque), -1, [])


class AtFeatures:
    """Surgery on the gradients at a shared representation: one pass through the trunk."""

    def run(self, call: Call) -> Outcome:
        """See `Route`."""
        tasks, source, solver = call.tasks, call.source, call.solver
        assert tasks.features is not None
        plan, add = source.begin_features(tasks)
        own = tasks.reach.keys()
        # What the optimizer does not hold gets the plain sum.
        plain = tasks.features.heads.leaves.keys() - own
        plain = {key for key in plain if key not in tasks.features.trunk.leaves} | {
            key
            for key, (leaf, _) in tasks.features.trunk.leaves.items()
            if key not in own and isinstance(leaf, torch.nn.Parameter)
        }
        gradients = FeatureGradients(
            tasks.features,
            weighted=set(own) if call.options.scope == "all" else set(),
            plain=plain,
            add=add,
        )

        def body() -> SurgeryReport:
            source.fill_features(tasks, gradients)
            gram, accuracy = gradients.gram(len(call.names), tasks.device)
            gram = source.total(gram)
            weights = solver.weights(call.names, gram, call.values, accuracy)
            source.finish_features(tasks, plan, gradients, weights)
            source.publish_features(plan)
            return SurgeryReport(call.names, gram, weights)

        report = Transaction(plan.leaves, solver).run(body)
        return Outcome(report, None, any(plan.reached), -1, [])


def choose_route(call: Call) -> Route:
    """The cheapest way that is right."""
    tasks, waiting = call.tasks, call.waiting
    if len(tasks.names) == 1:
        return SingleTask()
    known = call.weights is not None or (call.solver.knows_weights and waiting is None)
    rows_wait = waiting is not None and waiting.in_rows
    if known and not rows_wait and call.source.can_weigh(tasks, waiting):
        return Weighted()
    if tasks.features is not None and not known:
        return AtFeatures()
    return PerTask()
