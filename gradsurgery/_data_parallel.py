"""Surgery on the mean of all processes' gradients, where each process holds every parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor

from gradsurgery._features import FeatureGradients, add_to_grad, check_features
from gradsurgery._graph import GraphSurvey, survey
from gradsurgery._losses import Losses
from gradsurgery._options import Options
from gradsurgery._parameters import (
    check_parameters,
    check_replicated,
    name_of,
    refuse_inner_backward,
    sparse_error,
)
from gradsurgery._rows_by_grad import fill_views
from gradsurgery._spread_rows import SpreadRows
from gradsurgery._undo import Undo
from gradsurgery.distributed import Ranks, fingerprint, look_for_wrappers
from gradsurgery.methods import Method
from gradsurgery.report import SurgeryReport
from gradsurgery.surgery import Surgery, explain_donated_buffers

__all__ = ["DataParallelSurgery"]

# Full rows in memory: one is filled while the other is on its way.
_ROWS_IN_FLIGHT = 2


class DataParallelSurgery(Surgery):
    """A surgery whose task gradients are means over the ranks of a process group.

    Gradients come from `torch.autograd.grad`, not from p.grad: DistributedDataParallel's hooks, if
    the module has any, then never fire. As soon as a task's row is full, its mean over the ranks
    is formed in the background, each rank getting its part of the columns; on these parts M is
    computed and summed up, and the combined parts are put together in p.grad.

    Before the first backward the hosts agree on what is to be done, after the last on what came
    out, so that an error on one rank is an error on all and nobody waits for what never comes.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        method: Method,
        options: Options,
        seed: int,
        group: Any,
    ) -> None:
        super().__init__(optimizer, method, options, seed)
        self._ranks = Ranks(group)
        self._rows = SpreadRows(self._ranks)
        # Parameters that need no weights: the mean of one task's gradient, or of the only task's.
        self._plain = SpreadRows(self._ranks)
        # The one row of steps whose weights are known beforehand.
        self._single = SpreadRows(self._ranks)
        self._known: tuple[tuple[int, ...], str] = ((), "")

    def waiting(self) -> list[Tensor]:
        """The parameters whose rows hold micro-batches."""
        return self._rows.full.parameters

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "an optimizer with a process_group cannot be copied or pickled; save its state_dict()"
        )

    # --------------------------------------------------------------- backward

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def backward(
        self, losses: Losses, *, accumulate: bool, retain_graph: bool, features: Any = None
    ) -> None:
        """See `AdaptiveGradientSurgery.backward`."""
        if not self._ranks.in_step:
            raise RuntimeError(
                "a collective of this process group failed earlier, so the ranks are out of step: "
                "start again from a checkpoint"
            )
        parameters = self.parameters()
        plan = self._agree(parameters, losses, accumulate, features)
        weights = self._adding if self._pending is not None else self._kept.get(plan.names)
        asked = self.method.one_backward and self._pending is None
        visible = self.options.scope == "all" or not plan.opaque
        known = (weights is not None or asked) and visible and not self._rows_wait
        values = self._loss_values(plan.losses)
        if plan.features and not known:
            self._by_features(parameters, plan, values, retain_graph)
        elif known and len(plan.names) > 1:
            self._by_weights(parameters, plan, weights, values, accumulate, retain_graph)
        else:
            self._by_rows(parameters, plan, weights, values, accumulate, retain_graph)

    def _by_rows(
        self,
        parameters: list[Tensor],
        plan: _Plan,
        weights: Tensor | None,
        values: Tensor | None,
        accumulate: bool,
        retain: bool,
    ) -> None:
        """One backward per task, into rows."""
        pending = self._rows_wait
        # From here on the rows change: what waits is dropped unless the call comes to its end.
        call = self._arrange(parameters, plan, accumulate=accumulate)
        undo = self._undo(parameters, call)
        report = self.last
        try:
            undo.clear()
            self._run(call, plan, accumulate=accumulate, retain=retain, add=pending)
            if not accumulate:
                report = self._put_together(call, plan.names, values, weights)
            undo.add_earlier()
        except BaseException:
            undo.roll_back()
            raise
        if not accumulate and len(plan.names) > 1:
            self.keep_weights(plan.names, weights, report)
        self.last = report
        self._reach = dict(zip(map(id, call.targets), call.reached, strict=True))
        self._rows_wait = accumulate
        self._pending, self._values, self._adding = (
            (plan.names, values, weights) if accumulate else (None, None, None)
        )
        self.warn_without_gradient(any(plan.reach) or any(call.reached))

    def _undo(self, parameters: list[Tensor], call: _Call) -> Undo:
        leaves = (*parameters, *call.targets, *call.inputs)
        return Undo({id(leaf): leaf for leaf in leaves}, self.order, self.method)

    def _by_weights(
        self,
        parameters: list[Tensor],
        plan: _Plan,
        weights: Tensor | None,
        values: Tensor | None,
        accumulate: bool,
        retain: bool,
    ) -> None:
        """Weights are known beforehand: one backward, one row to average."""
        add = self._pending is not None
        call = self._arrange_single(parameters, plan, add=add)
        targets = call.targets
        undo = self._undo(parameters, call)
        report = self.last
        try:
            undo.clear()
            if weights is None:
                report = self._ask(plan.names, call.device, values)
                weights = report.weights
            failure: BaseException | None = None
            try:
                self._fill_weighted(call, plan, weights, retain=retain, add=add)
            except BaseException as error:
                failure = error
            self._settle(call, failure, [] if accumulate else [self._single])
            if not accumulate:
                self._publish_single(call)
            undo.add_earlier()
        except BaseException:
            undo.roll_back()
            raise
        self.last = report
        self._reach = dict(zip(map(id, targets), call.reached, strict=True))
        self._pending, self._adding = (plan.names, weights) if accumulate else (None, None)
        if not accumulate:
            self._kept.count()
        self.warn_without_gradient(any(plan.reach) or any(call.reached))

    def _by_features(
        self, parameters: list[Tensor], plan: _Plan, values: Tensor | None, retain: bool
    ) -> None:
        """Surgery on the gradients at a shared representation of all ranks' samples."""
        call = self._arrange_single(parameters, plan, add=False)
        undo = self._undo(parameters, call)
        index = {id(p): i for i, p in enumerate(call.targets)}
        views = [self._single.full.view(0, i) for i in range(len(call.targets))]

        def add(leaf: Tensor, gradient: Tensor) -> None:
            i = index.get(id(leaf))
            if i is None:
                add_to_grad(leaf, gradient)
                return
            if gradient.layout != torch.strided:
                raise sparse_error(leaf, self.optimizer)
            views[i].add_(gradient)
            call.reached[i] |= plan.reach_of[id(leaf)]

        own = set(map(id, parameters))
        gradients = FeatureGradients(
            plan.features,
            plan.near,
            by_weights=own if self.options.scope == "all" else set(),
            plain=plan.seen.leaves.keys() - own,
            add=add,
        )
        try:
            undo.clear()
            failure: BaseException | None = None
            try:
                gradients.fill(plan.losses, retain=retain)
            except BaseException as error:
                failure = error
            self._agree_so_far(failure)
            gram, accuracy = gradients.gram(len(plan.names), call.device)
            self._ranks.sum(gram)
            # Each rank's loss is a mean of its own samples, of which the whole has R times as many.
            gram /= self._ranks.size**2
            weights = self.method.weights(
                gram, losses=values, generator=self.order, resolution=accuracy
            )
            try:
                tensors, factors = gradients.weigh(weights)
                behind = {i: (p, views[i]) for i, p in enumerate(call.targets)}
                if tensors:
                    found = fill_views(
                        tensors, factors, behind, call.inputs, self.optimizer, keep=retain, add=True
                    )
                    for i in found:
                        call.reached[i] |= plan.reach_of[id(call.targets[i])]
                refuse_inner_backward(parameters)
            except BaseException as error:
                failure = error
            self._settle(call, failure, [self._single])
            self._publish_single(call)
            undo.add_earlier()
        except BaseException:
            undo.roll_back()
            raise
        self.last = SurgeryReport(plan.names, gram, weights)
        self._kept.take(plan.names, weights)
        self.warn_without_gradient(any(plan.reach) or any(call.reached))

    def _agree_so_far(self, failure: BaseException | None) -> None:
        """Raise on all ranks what went wrong on one."""
        text = f"{type(failure).__name__}: {failure}" if failure else None
        said = self._ranks.exchange((text, {}))
        if failure is not None:
            raise failure
        self._ranks.compare(said)

    def _arrange_single(self, parameters: list[Tensor], plan: _Plan, *, add: bool) -> _Call:
        """One row over everything that the tasks reach on any rank."""
        waiting = self._single.full.parameters if add else []
        held = {id(p): p for p in waiting}
        held |= {id(p): p for p in parameters if plan.reach_of[id(p)] or plan.opaque}
        self._pending = None
        self._single.arrange(list(held.values()), 1, 1, [0] * len(held), keep=add)
        targets = self._single.full.parameters
        before = self._reach if add else {}
        reached = [before.get(id(p), 0) for p in targets]
        return _Call(targets, reached, self._inputs(plan, plan.reach_of))

    def _publish_single(self, call: _Call) -> None:
        for arrived in self._single.gather():
            arrived()
        for i, (p, mask) in enumerate(zip(call.targets, call.reached, strict=True)):
            if mask:
                p.grad = self._single.full.publish(0, i)

    def _fill_weighted(
        self, call: _Call, plan: _Plan, weights: Tensor, *, retain: bool, add: bool
    ) -> None:
        """This rank's gradient of Σ_t w_t L_t into the single row; a head's without the weight."""
        given = [(t, loss) for t, loss in enumerate(plan.losses) if loss is not None]
        views = [self._single.full.view(0, i) for i in range(len(call.targets))]
        plain: dict[int, tuple[Tensor, Tensor]] = {}
        weighted: dict[int, tuple[Tensor, Tensor]] = {}
        for i, (p, view) in enumerate(zip(call.targets, views, strict=True)):
            if plan.seen.complete and not plan.seen.tasks_of(p):
                continue
            head = self.options.scope == "shared" and plan.reach_of.get(id(p), 0).bit_count() == 1
            (plain if head else weighted)[i] = (p, view)
        reached: set[int] = set()
        losses = [loss for _, loss in given]
        factors = [weights[t].to(loss.device, loss.dtype, non_blocking=True) for t, loss in given]
        with explain_donated_buffers():
            if losses and (plain or call.inputs):
                keep = retain or bool(weighted)
                reached |= fill_views(
                    losses, None, plain, call.inputs, self.optimizer, keep=keep, add=add
                )
            if losses and weighted:
                reached |= fill_views(
                    losses, factors, weighted, (), self.optimizer, keep=retain, add=add
                )
        refuse_inner_backward(self.parameters())
        for i in reached:
            call.reached[i] |= sum(1 << t for t, _ in given) & (
                plan.seen.tasks_of(call.targets[i]) or -1
            )
        empty = [view for i, view in enumerate(views) if i not in reached]
        if empty and not add:
            torch._foreach_zero_(empty)

    def _loss_values(self, losses: Sequence[Tensor | None]) -> Tensor | None:
        """The mean over the ranks that have samples of the task."""
        if not self.method.reads_losses:
            return None
        device = next((p.device for p in self.parameters()), torch.device("cpu"))
        there = [loss is not None for loss in losses]
        values = torch.zeros(2, len(losses), dtype=torch.float64, device=device)
        values[1] = torch.tensor(there, dtype=torch.float64).to(device, non_blocking=True)
        for task, loss in enumerate(losses):
            if loss is not None:
                values[0, task] = loss.detach().to(device, torch.float64)
        self._ranks.sum(values)
        mean = values[0] / values[1].clamp(min=1)
        return mean if self._values is None else self._values + mean

    @property
    def keeps_rows(self) -> bool:
        """No rank holds a task's whole gradient."""
        return False

    def products(self, changes: Mapping[int, Tensor]) -> Tensor:
        """Not here: no rank holds a task's whole gradient."""
        raise RuntimeError("with a process_group the tasks' gradients do not outlive backward")

    def _agree(
        self, parameters: list[Tensor], losses: Losses, accumulate: bool, features: Any
    ) -> _Plan:
        """What all ranks are going to do; raises on all of them where they do not fit together."""
        ids = tuple(map(id, parameters))
        is_new = ids != self._known[0]
        failure: Exception | None = None
        seen = GraphSurvey(retain=[])
        names: tuple[str, ...] = ()
        tensors: list[Tensor | None] = []
        points: list[Tensor] = []
        near = seen
        try:
            if is_new:
                look_for_wrappers(parameters, grouped=True)
            names, tensors = self.read(losses, parameters, absent=True)
            seen = survey(tensors)
            check_parameters(self.optimizer, parameters, seen)
            check_replicated(self.optimizer, parameters, seen, self.others())
            if features is not None and len(names) > 1:
                self._refuse_with_features(accumulate)
                points, near = check_features(features, tensors)
        except Exception as error:
            failure = error
        if is_new:
            described = "; ".join(self._describe(parameters))
            self._known = ids, fingerprint(described.encode())
        settings = self.settings(names, accumulate) | {
            "parameters": self._known[1],
            "features": features is not None,
        }
        known = self._known
        reach = tuple(seen.tasks_of(p) for p in parameters)
        error_text = f"{type(failure).__name__}: {failure}" if failure else None
        # Nodes written in Python show what they reach, unless they run a backward of their own, and
        # that is refused. They are common here: gathering samples, synchronised batch norm.
        hidden = 0 if seen.complete else seen.opaque
        said = self._ranks.exchange((error_text, settings, reach, hidden, is_new))
        if failure is not None:
            raise failure
        failed = any(each[0] for each in said)
        if not failed and len({each[1]["parameters"] for each in said}) > 1:
            self._refuse_parameters(parameters)
        self._ranks.compare([each[:2] for each in said])
        if any(each[4] for each in said):
            # Not known before this has succeeded.
            self._known = (), ""
            names_of = [name_of(p, self.optimizer) for p in parameters]
            self._ranks.check_values(parameters, names_of)
            self._known = known
        together = [reduce(or_, masks) for masks in zip(*(each[2] for each in said), strict=True)]
        reach_of = dict(zip(ids, together, strict=True))
        opaque = reduce(or_, (each[3] for each in said))
        return _Plan(names, tensors, seen, together, reach_of, opaque, points, near)

    def _arrange(self, parameters: list[Tensor], plan: _Plan, *, accumulate: bool) -> _Call:
        """Room for what the tasks reach on any rank."""
        pending = self._rows_wait
        waits = accumulate or pending
        count = len(plan.names)
        captured: list[Tensor] = []
        ranks: list[int] = []
        masks = plan.reach_of
        if count > 1:
            captured, ranks = self.choose(parameters, masks, plan.opaque, gather=waits)
        self._pending, self._rows_wait = None, False
        held = {id(p) for p in captured}
        rest = [p for p in parameters if id(p) not in held and (masks[id(p)] or plan.opaque)]
        rows = count if waits else min(count, _ROWS_IN_FLIGHT)
        self._rows.arrange(captured, count, rows, ranks, keep=pending)
        self._plain.arrange(rest, 1, 1, [0] * len(rest), keep=pending)
        targets = self._rows.full.parameters + self._plain.full.parameters
        before = self._reach if pending else {}
        reached = [before.get(id(p), 0) for p in targets]
        return _Call(targets, reached, self._inputs(plan, masks))

    @staticmethod
    def _inputs(plan: _Plan, own: Mapping[int, int]) -> list[Tensor]:
        """Leaves that are no parameters: what somebody wants a gradient of beside."""
        return [
            leaf
            for key, (leaf, _) in plan.seen.leaves.items()
            if key not in own and not isinstance(leaf, torch.nn.Parameter)
        ]

    def _run(self, call: _Call, plan: _Plan, *, accumulate: bool, retain: bool, add: bool) -> None:
        """One backward per task, rows on their way while the next one runs; then compare notes."""
        failure: BaseException | None = None
        for task, loss in enumerate(plan.losses):
            row = task % self._rows.full.count if self._rows.full.count else 0
            self._rows.settle(row)
            if failure is None:
                try:
                    keep = retain or plan.seen.retain[task]
                    self._fill(call, task, row, loss, plan, keep=keep, add=add)
                except BaseException as error:
                    failure = error
            # Also after an error: the other ranks are sending theirs.
            if not accumulate:
                self._rows.send(task, row)
        self._settle(call, failure, [] if accumulate else [self._plain])

    def _settle(
        self, call: _Call, failure: BaseException | None, rows: Sequence[SpreadRows]
    ) -> None:
        """Send single rows, compare notes, and wait for everything that is on its way."""
        for row in rows:
            row.send(0, 0)
        text = f"{type(failure).__name__}: {failure}" if failure else None
        said = self._ranks.exchange((text, {}, tuple(call.reached)))
        for row in (self._rows, self._plain, self._single):
            row.settle()
        if failure is not None:
            raise failure
        self._ranks.compare([each[:2] for each in said])
        call.reached = [reduce(or_, masks) for masks in zip(*(s[2] for s in said), strict=True)]

    def _fill(
        self,
        call: _Call,
        task: int,
        row: int,
        loss: Tensor | None,
        plan: _Plan,
        *,
        keep: bool,
        add: bool,
    ) -> None:
        """One task's gradient on this rank, into its row."""
        bit = 1 << task
        count = len(self._rows.full.parameters)
        views = [self._rows.full.view(row, i) for i in range(count)]
        views += [self._plain.full.view(0, i) for i in range(len(call.targets) - count)]
        reached: set[int] = set()
        if loss is not None:
            known = plan.seen.complete
            wanted = {
                i: view
                for i, (p, view) in enumerate(zip(call.targets, views, strict=True))
                if (not known and p.requires_grad) or plan.seen.tasks_of(p) & bit
            }
            with explain_donated_buffers():
                reached = fill_views(
                    [loss],
                    None,
                    {i: (call.targets[i], view) for i, view in wanted.items()},
                    call.inputs,
                    self.optimizer,
                    keep=keep,
                    add=add,
                )
            refuse_inner_backward(self.parameters())
        for i in reached:
            call.reached[i] |= bit
        empty = [view for i, view in enumerate(views[:count]) if i not in reached]
        if empty and not add:
            torch._foreach_zero_(empty)

    def _put_together(
        self,
        call: _Call,
        names: tuple[str, ...],
        values: Tensor | None,
        weights: Tensor | None,
    ) -> SurgeryReport | None:
        """This rank's parts of the rows -> M -> w -> all of row 0 -> p.grad."""
        rows, plain = self._rows, self._plain
        count = len(rows.full.parameters)
        least = 2 if self.options.scope == "shared" else 1
        operated = [mask.bit_count() >= least for mask in call.reached[:count]]
        report = self.last
        if len(names) > 1:
            if weights is None:
                report = self.solve(rows, operated, names, call.device, values)
                weights = report.weights
            self.combine(rows, operated, weights)
            rows.pick(
                [
                    -1 if by_weights else mask.bit_length() - 1
                    for by_weights, mask in zip(operated, call.reached, strict=False)
                ]
            )
        else:
            one = torch.ones(1, dtype=torch.float64, device=call.device)
            report = SurgeryReport(names, torch.full_like(one, torch.nan)[:, None], one)
        arrivals = [*rows.gather(), *plain.gather()]
        for arrived in arrivals:
            arrived()
        for i, (p, mask) in enumerate(zip(call.targets, call.reached, strict=True)):
            if mask:
                p.grad = rows.full.publish(0, i) if i < count else plain.full.publish(0, i - count)
        return report

    # -------------------------------------------------------------- agreement

    def _describe(self, parameters: Sequence[Tensor]) -> list[str]:
        return [f"{name_of(p, self.optimizer)} of {p.dtype}" for p in parameters]

    def _refuse_parameters(self, parameters: Sequence[Tensor]) -> None:
        self._known = (), ""
        lists = self._ranks.exchange(self._describe(parameters))
        for rank, theirs in enumerate(lists):
            for mine, other in zip(lists[0], theirs, strict=False):
                if mine != other:
                    raise ValueError(
                        "parameters must be the same on all ranks, in the same order; rank 0 has "
                        f"{mine} where rank {rank} has {other}"
                    )
            if len(theirs) != len(lists[0]):
                raise ValueError(
                    f"parameters must be the same on all ranks; rank 0 has {len(lists[0])}, rank "
                    f"{rank} has {len(theirs)} that require grad"
                )


@dataclass
class _Plan:
    """What the ranks agreed on; losses and seen are this rank's own."""

    names: tuple[str, ...]
    losses: list[Tensor | None]
    seen: GraphSurvey
    reach: list[int]
    """For each parameter the tasks that reach it on any rank, bit t for task t."""
    reach_of: dict[int, int]
    """The same, by id."""
    opaque: int
    features: list[Tensor]
    near: GraphSurvey
    """The graph between losses and features, where there are any."""


@dataclass
class _Call:
    """One call's parameters with rows, then those without; what reached them; other leaves."""

    targets: list[Tensor]
    reached: list[int]
    inputs: list[Tensor] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        """Where M and w are wanted."""
        return self.targets[0].device if self.targets else torch.device("cpu")
