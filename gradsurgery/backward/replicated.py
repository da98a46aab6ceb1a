"""The mean of all processes' gradients, where each process holds every parameter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradsurgery.backward.agreement import Agreement
from gradsurgery.backward.checks import refuse_inner_backward, sparse_error
from gradsurgery.backward.differentiate import explained, fill_views
from gradsurgery.backward.features import FeatureGradients, add_to_grad
from gradsurgery.backward.selection import Plan, select
from gradsurgery.backward.tasks import MicroBatches, Request, Settings, Tasks, trainable
from gradsurgery.distributed.group import Group
from gradsurgery.gradients.scattered import ScatteredRows
from gradsurgery.options import Options
from gradsurgery.weights.solver import Solver

__all__ = ["Replicated"]

# Full rows in memory: one is filled while the other is on its way.
_ROWS_IN_FLIGHT = 2


class Replicated:
    """Rows are means over the ranks of a process group.

    Gradients come from `torch.autograd.grad`, not from p.grad: DistributedDataParallel's hooks, if
    the module has any, then never fire. As soon as a task's row is full, its mean over the ranks
    is formed in the background, each rank getting its part of the columns; on these parts M is
    computed and summed up, and the combined parts are put together in p.grad.

    Before the first backward the hosts agree on what is to be done, after the last on what came
    out, so that an error on one rank is an error on all and nobody waits for what never comes.

    Args:
        optimizer: the wrapped optimizer.
        solver: of the plugin.
        options: scope and what else was asked for.
        group: a torch.distributed process group.
    """

    keeps_rows = False
    waits_in_grad = False

    def __init__(self, optimizer: Optimizer, solver: Solver, options: Options, group: Any) -> None:
        self.optimizer, self.solver, self.options = optimizer, solver, options
        self.group = Group(group)
        self.rows = ScatteredRows(self.group)
        self.last_reach: dict[int, int] = {}
        self._agreement = Agreement(self.group, optimizer, solver)
        # Parameters that need no weights: the mean of one task's gradient, or of the only task's.
        self._plain = ScatteredRows(self.group)
        # The one row of steps whose weights are known beforehand.
        self._single = ScatteredRows(self.group)

    def held(self) -> list[Tensor]:
        """The parameters that have rows."""
        return self.rows.full.parameters

    def read(self, request: Request, waiting: MicroBatches | None, settings: Settings) -> Tasks:
        """What all ranks are going to do; raises on all where they do not fit together."""
        parameters = trainable(self.optimizer)
        held = self.held() if waiting else []
        tasks = self._agreement.read(request, parameters, waiting, held, settings)
        tasks.device = parameters[0].device if parameters else torch.device("cpu")
        if len(tasks.names) > 1 and self.solver.method.reads_losses:
            tasks.values = self._values(tasks)
        return tasks

    def _values(self, tasks: Tasks) -> Tensor:
        """Of each task's loss the mean over the ranks that have samples of it."""
        there = [loss is not None for loss in tasks.losses]
        values = torch.zeros(2, len(there), dtype=torch.float64, device=tasks.device)
        values[1] = torch.tensor(there, dtype=torch.float64).to(tasks.device, non_blocking=True)
        for task, loss in enumerate(tasks.losses):
            if loss is not None:
                values[0, task] = loss.detach().to(tasks.device, torch.float64)
        self.group.sum(values)
        return values[0] / values[1].clamp(min=1)

    # ----------------------------------------------------------------- per task

    def single(self, tasks: Tasks, waiting: MicroBatches | None) -> Plan:
        """One task: the mean of its gradient, in the rows that need no weights."""
        return self.begin(tasks, waiting)

    def begin(self, tasks: Tasks, waiting: MicroBatches | None) -> Plan:
        """Room for what the tasks reach on any rank."""
        parameters = trainable(self.optimizer)
        add = waiting is not None and waiting.in_rows
        waits = tasks.request.accumulate or add
        count = len(tasks.names)
        captured: list[Tensor] = []
        sort_keys: list[int] = []
        if count > 1:
            held = self.held() if add else []
            captured, sort_keys = select(
                parameters,
                tasks,
                self.solver.partition.parts(parameters, held),
                scope=self.options.scope,
                held=held,
                gather=waits,
                last_reach=self.last_reach,
            )
        kept = {id(p) for p in captured}
        beside = [
            p for p in parameters if id(p) not in kept and (tasks.reach[id(p)] or tasks.opaque)
        ]
        rows = count if waits else min(count, _ROWS_IN_FLIGHT)
        self.rows.arrange(captured, count, rows, sort_keys, keep=add)
        self._plain.arrange(beside, 1, 1, [0] * len(beside), keep=add)
        targets = self.rows.full.parameters + self._plain.full.parameters
        earlier = waiting.reach if add and waiting else {}
        reached = [earlier.get(id(p), 0) for p in targets]
        return self._plan(tasks, targets, reached, len(self._plain.full.parameters))

    def _plan(self, tasks: Tasks, targets: list[Tensor], reached: list[int], beside: int) -> Plan:
        """With leaves that are no parameters: what somebody wants a gradient of beside."""
        inputs = [
            leaf
            for key, (leaf, _) in tasks.graph.leaves.items()
            if key not in tasks.reach and not isinstance(leaf, torch.nn.Parameter)
        ]
        leaves = [*trainable(self.optimizer), *targets, *inputs]
        return Plan(targets, reached, leaves, inputs, beside)

    def fill(self, tasks: Tasks, plan: Plan, *, add: bool) -> None:
        """One backward per task, rows on their way while the next one runs; then compare notes."""
        failure: BaseException | None = None
        accumulate = tasks.request.accumulate
        for task, loss in enumerate(tasks.losses):
            row = task % self.rows.full.count if self.rows.full.count else 0
            self.rows.settle(row)
            if failure is None:
                try:
                    self._fill_row(tasks, plan, task, row, loss, add=add)
                except BaseException as error:
                    failure = error
            # Also after an error: the other ranks are sending theirs.
            if not accumulate:
                self.rows.send(task, row)
        self._settle(plan, failure, [] if accumulate else [self._plain])

    def _fill_row(
        self, tasks: Tasks, plan: Plan, task: int, row: int, loss: Tensor | None, *, add: bool
    ) -> None:
        """One task's gradient on this rank, into its row."""
        bit = 1 << task
        count = len(plan.targets) - plan.beside
        views = [self.rows.full.view(row, i) for i in range(count)]
        views += [self._plain.full.view(0, i) for i in range(plan.beside)]
        reached: set[int] = set()
        if loss is not None:
            known = tasks.graph.complete
            wanted = {
                i: (p, view)
                for i, (p, view) in enumerate(zip(plan.targets, views, strict=True))
                if (not known and p.requires_grad) or tasks.graph.tasks_of(p) & bit
            }
            with explained():
                reached = fill_views(
                    [loss],
                    None,
                    wanted,
                    plan.inputs,
                    self.optimizer,
                    keep=tasks.retain(task),
                    add=add,
                )
            refuse_inner_backward(trainable(self.optimizer))
        for i in reached:
            plan.reached[i] |= bit
        empty = [view for i, view in enumerate(views[:count]) if i not in reached]
        if empty and not add:
            torch._foreach_zero_(empty)

    def _settle(
        self, plan: Plan, failure: BaseException | None, rows: Sequence[ScatteredRows]
    ) -> None:
        """Send single rows, compare notes, and wait for everything that is on its way."""
        for row in rows:
            row.send(0, 0)
        moving = (self.rows, self._plain, self._single)
        plan.reached = self._agreement.together(failure, plan.reached, moving)

    def publish(self, plan: Plan, operated: list[bool]) -> None:
        """All ranks' parts of row 0 together, as p.grad."""
        rows, plain = self.rows, self._plain
        count = len(plan.targets) - plan.beside
        if operated:
            rows.pick(
                [
                    -1 if by_weights else mask.bit_length() - 1
                    for by_weights, mask in zip(operated, plan.reached, strict=False)
                ]
            )
        for arrived in [*rows.gather(), *plain.gather()]:
            arrived()
        for i, (p, mask) in enumerate(zip(plan.targets, plan.reached, strict=True)):
            if mask:
                p.grad = rows.full.publish(0, i) if i < count else plain.full.publish(0, i - count)

    # ----------------------------------------------------------------- weighted

    def can_weigh(self, tasks: Tasks, waiting: MicroBatches | None) -> bool:
        """Whether one backward pass of Σ_t w_t L_t gives every parameter what it should have."""
        return self.options.scope == "all" or not tasks.opaque

    def begin_weighted(self, tasks: Tasks, waiting: MicroBatches | None) -> Plan:
        """One row over everything that the tasks reach on any rank."""
        return self._begin_single(tasks, tasks.reach, waiting)

    def _begin_single(
        self, tasks: Tasks, reach: dict[int, int], waiting: MicroBatches | None
    ) -> Plan:
        held = {id(p): p for p in self._single.full.parameters} if waiting else {}
        held |= {id(p): p for p in trainable(self.optimizer) if reach[id(p)] or tasks.opaque}
        keep = waiting is not None
        self._single.arrange(list(held.values()), 1, 1, [0] * len(held), keep=keep)
        targets = self._single.full.parameters
        earlier = waiting.reach if waiting else {}
        reached = [earlier.get(id(p), 0) for p in targets]
        return self._plan(tasks, targets, reached, 0)

    def fill_weighted(self, tasks: Tasks, plan: Plan, weights: Tensor, *, add: bool) -> None:
        """This rank's gradient of Σ_t w_t L_t into the single row; a head's without the weight."""
        failure: BaseException | None = None
        try:
            self._fill_single(tasks, plan, weights, add=add)
        except BaseException as error:
            failure = error
        self._settle(plan, failure, [] if tasks.request.accumulate else [self._single])

    def _fill_single(self, tasks: Tasks, plan: Plan, weights: Tensor, *, add: bool) -> None:
        given = [(t, loss) for t, loss in enumerate(tasks.losses) if loss is not None]
        views = [self._single.full.view(0, i) for i in range(len(plan.targets))]
        plain: dict[int, tuple[Tensor, Tensor]] = {}
        weighted: dict[int, tuple[Tensor, Tensor]] = {}
        for i, (p, view) in enumerate(zip(plan.targets, views, strict=True)):
            if tasks.graph.complete and not tasks.graph.tasks_of(p):
                continue
            head = self.options.scope == "shared" and tasks.reach.get(id(p), 0).bit_count() == 1
            (plain if head else weighted)[i] = (p, view)
        reached: set[int] = set()
        losses = [loss for _, loss in given]
        factors = [weights[t].to(loss.device, loss.dtype, non_blocking=True) for t, loss in given]
        retain = tasks.request.retain_graph
        with explained():
            if losses and (plain or plan.inputs):
                keep = retain or bool(weighted)
                reached |= fill_views(
                    losses, None, plain, plan.inputs, self.optimizer, keep=keep, add=add
                )
            if losses and weighted:
                reached |= fill_views(
                    losses, factors, weighted, (), self.optimizer, keep=retain, add=add
                )
        refuse_inner_backward(trainable(self.optimizer))
        for i in reached:
            plan.reached[i] |= sum(1 << t for t, _ in given) & (
                tasks.graph.tasks_of(plan.targets[i]) or -1
            )
        empty = [view for i, view in enumerate(views) if i not in reached]
        if empty and not add:
            torch._foreach_zero_(empty)

    def publish_weighted(self, plan: Plan) -> None:
        """All ranks' parts of the single row together, as p.grad."""
        for arrived in self._single.gather():
            arrived()
        for i, (p, mask) in enumerate(zip(plan.targets, plan.reached, strict=True)):
            if mask:
                p.grad = self._single.full.publish(0, i)

    # ----------------------------------------------------------------- features

    def begin_features(self, tasks: Tasks) -> tuple[Plan, Callable[[Tensor, Tensor], None]]:
        """The single row; and where the gradient of a leaf beside the features goes."""
        plan = self._begin_single(tasks, tasks.reach, None)
        index = {id(p): i for i, p in enumerate(plan.targets)}
        views = [self._single.full.view(0, i) for i in range(len(plan.targets))]

        def add(leaf: Tensor, gradient: Tensor) -> None:
            i = index.get(id(leaf))
            if i is None:
                add_to_grad(leaf, gradient)
                return
            if gradient.layout != torch.strided:
                raise sparse_error(leaf, self.optimizer)
            views[i].add_(gradient)
            plan.reached[i] |= tasks.reach[id(leaf)]

        return plan, add

    def fill_features(self, tasks: Tasks, gradients: FeatureGradients) -> None:
        """T passes down to the features; an error on one rank is raised on all."""
        failure: BaseException | None = None
        try:
            gradients.fill(tasks.losses, retain=tasks.request.retain_graph)
        except BaseException as error:
            failure = error
        self._agreement.together(failure, ())

    def total(self, gram: Tensor) -> Tensor:
        """M at the features of all ranks' samples."""
        self.group.sum(gram)
        # Each rank's loss is a mean of its own samples, of which the whole has R times as many.
        gram /= self.group.size**2
        return gram

    def finish_features(
        self, tasks: Tasks, plan: Plan, gradients: FeatureGradients, weights: Tensor
    ) -> None:
        """Weighted gradients for what lies beside the features, and the pass through the trunk."""
        failure: BaseException | None = None
        try:
            gradients.add_beside(weights)
            views = [self._single.full.view(0, i) for i in range(len(plan.targets))]
            passes = gradients.passes(weights)
            for number, (tensors, at, leaves) in enumerate(passes):
                chosen = None if leaves is None else set(map(id, leaves))
                behind = {
                    i: (p, views[i])
                    for i, p in enumerate(plan.targets)
                    if chosen is None or id(p) in chosen
                }
                inputs = [x for x in plan.inputs if chosen is None or id(x) in chosen]
                retain = tasks.request.retain_graph or number + 1 < len(passes)
                if not tensors or not (behind or inputs):
                    continue
                found = fill_views(
                    tensors, at, behind, inputs, self.optimizer, keep=retain, add=True
                )
                for i in found:
                    plan.reached[i] |= tasks.reach[id(plan.targets[i])]
            refuse_inner_backward(trainable(self.optimizer))
        except BaseException as error:
            failure = error
        self._settle(plan, failure, [self._single])

    def publish_features(self, plan: Plan) -> None:
        """All ranks' parts of the single row together, as p.grad."""
        self.publish_weighted(plan)
