"""Surgery on the mean of all processes' gradients, where each process holds every parameter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor

from gradsurgery._graph import GraphSurvey, survey
from gradsurgery._losses import Losses
from gradsurgery._parameters import check_gradients, check_parameters, check_replicated, name_of
from gradsurgery.distributed import Ranks, fingerprint
from gradsurgery.kernels import combine, gram, resolution
from gradsurgery.methods import Method
from gradsurgery.report import SurgeryReport
from gradsurgery.surgery import Surgery, add_earlier, explain_donated_buffers
from gradsurgery.task_gradients import TaskGradients

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
        self, optimizer: torch.optim.Optimizer, method: Method, scope: str, seed: int, group: Any
    ) -> None:
        super().__init__(optimizer, method, scope, seed)
        self._ranks = Ranks(group)
        self._rows = _Spread(self._ranks)
        # Parameters that need no weights: the mean of one task's gradient, or of the only task's.
        self._plain = _Spread(self._ranks)
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
    def backward(self, losses: Losses, *, accumulate: bool, retain_graph: bool) -> None:
        """See `AdaptiveGradientSurgery.backward`."""
        if not self._ranks.in_step:
            raise RuntimeError(
                "a collective of this process group failed earlier, so the ranks are out of step: "
                "start again from a checkpoint"
            )
        parameters = self.parameters()
        plan = self._agree(parameters, losses, accumulate)
        call = self._arrange(parameters, plan, accumulate)
        leaves = {id(p): p for p in (*call.targets, *call.inputs)}
        earlier = {key: leaf.grad for key, leaf in leaves.items()}
        try:
            for leaf in leaves.values():
                leaf.grad = None
            self._run(call, plan, accumulate=accumulate, retain=retain_graph)
            if not accumulate:
                self._put_together(call, plan.names)
            add_earlier(leaves, earlier, ())
        except BaseException:
            for key, leaf in leaves.items():
                leaf.grad = earlier[key]
            self.discard()
            raise
        self._pending = plan.names if accumulate else None
        self._reach = dict(zip(map(id, call.targets), call.reached, strict=True))

    def _agree(self, parameters: list[Tensor], losses: Losses, accumulate: bool) -> _Plan:
        """What all ranks are going to do; raises on all of them where they do not fit together."""
        failure: Exception | None = None
        seen = GraphSurvey(retain=[])
        names: tuple[str, ...] = ()
        tensors: list[Tensor | None] = []
        try:
            names, tensors = self.read(losses, parameters, absent=True)
            seen = survey(tensors)
            check_parameters(self.optimizer, parameters, seen)
            check_replicated(self.optimizer, parameters, seen, self.others())
        except Exception as error:
            failure = error
        ids = tuple(map(id, parameters))
        is_new = ids != self._known[0]
        if is_new:
            described = "; ".join(self._describe(parameters))
            self._known = ids, fingerprint(described.encode())
        settings = self.settings(names, accumulate) | {"parameters": self._known[1]}
        known = self._known
        reach = tuple(seen.tasks_of(p) for p in parameters)
        error_text = f"{type(failure).__name__}: {failure}" if failure else None
        said = self._ranks.exchange((error_text, settings, reach, seen.opaque, is_new))
        if failure is not None:
            raise failure
        if len({each[1]["parameters"] for each in said}) > 1:
            self._refuse_parameters(parameters)
        self._ranks.compare([each[:2] for each in said])
        if any(each[4] for each in said):
            # Not known before this has succeeded.
            self._known = (), ""
            names_of = [name_of(p, self.optimizer) for p in parameters]
            self._ranks.check_values(parameters, names_of)
            self._known = known
        together = [reduce(or_, masks) for masks in zip(*(each[2] for each in said), strict=True)]
        opaque = reduce(or_, (each[3] for each in said))
        return _Plan(names, tensors, seen, together, opaque)

    def _arrange(self, parameters: list[Tensor], plan: _Plan, accumulate: bool) -> _Call:
        """Room for what the tasks reach on any rank."""
        pending = self._pending is not None
        waits = accumulate or pending
        count = len(plan.names)
        captured: list[Tensor] = []
        together: list[bool] = []
        masks = {id(p): mask for p, mask in zip(parameters, plan.reach, strict=True)}
        if count > 1:
            captured, together = self.choose(parameters, masks, plan.opaque, gather=waits)
        held = {id(p) for p in captured}
        rest = [p for p in parameters if id(p) not in held and (masks[id(p)] or plan.opaque)]
        rows = count if waits else min(count, _ROWS_IN_FLIGHT)
        self._rows.arrange(captured, count, rows, together, keep=pending)
        self._plain.arrange(rest, 1, 1, [True] * len(rest), keep=pending)
        targets = self._rows.full.parameters + self._plain.full.parameters
        before = self._reach if pending else {}
        own = {id(p) for p in parameters}
        inputs = [
            leaf
            for key, (leaf, _) in plan.seen.leaves.items()
            if key not in own and not isinstance(leaf, torch.nn.Parameter)
        ]
        return _Call(targets, [before.get(id(p), 0) for p in targets], inputs)

    def _run(self, call: _Call, plan: _Plan, *, accumulate: bool, retain: bool) -> None:
        """One backward per task, rows on their way while the next one runs; then compare notes."""
        failure: BaseException | None = None
        for task, loss in enumerate(plan.losses):
            row = task % self._rows.full.count if self._rows.full.count else 0
            self._rows.settle(row)
            if failure is None:
                try:
                    keep = retain or plan.seen.retain[task]
                    self._fill(call, task, row, loss, plan, keep=keep)
                except BaseException as error:
                    failure = error
            # Also after an error: the other ranks are sending theirs.
            if not accumulate:
                self._rows.send(task, row)
        if not accumulate:
            self._plain.send(0, 0)
        text = f"{type(failure).__name__}: {failure}" if failure else None
        said = self._ranks.exchange((text, {}, tuple(call.reached)))
        self._rows.settle()
        self._plain.settle()
        if failure is not None:
            raise failure
        self._ranks.compare([each[:2] for each in said])
        call.reached = [reduce(or_, masks) for masks in zip(*(s[2] for s in said), strict=True)]

    def _fill(
        self, call: _Call, task: int, row: int, loss: Tensor | None, plan: _Plan, *, keep: bool
    ) -> None:
        """One task's gradient on this rank, into its row."""
        bit, adds = 1 << task, self._pending is not None
        found: list[Tensor | None] = [None] * len(call.targets)
        if loss is not None:
            hidden = plan.seen.opaque & bit
            wanted = [
                i for i, p in enumerate(call.targets) if hidden or plan.seen.tasks_of(p) & bit
            ]
            leaves = [call.targets[i] for i in wanted]
            with explain_donated_buffers():
                gradients = torch.autograd.grad(
                    loss, [*leaves, *call.inputs], retain_graph=keep, allow_unused=True
                )
            check_gradients(self.optimizer, leaves, gradients[: len(leaves)])
            for i, gradient in zip(wanted, gradients, strict=False):
                found[i] = _after_hooks(call.targets[i], gradient)
            for leaf, local in zip(call.inputs, gradients[len(leaves) :], strict=True):
                if local is not None:
                    leaf.grad = local if leaf.grad is None else leaf.grad + local
        written: list[Tensor] = []
        new: list[Tensor] = []
        empty: list[Tensor] = []
        for i, given in enumerate(found):
            in_rows = i < len(self._rows.full.parameters)
            view = (
                self._rows.full.view(row, i)
                if in_rows
                else self._plain.full.view(0, i - len(self._rows.full.parameters))
            )
            if given is not None:
                written.append(view)
                new.append(given)
                call.reached[i] |= bit
            elif in_rows and not adds:
                empty.append(view)
        if empty:
            torch._foreach_zero_(empty)
        if written:
            operation = torch._foreach_add_ if adds else torch._foreach_copy_
            operation(written, new)

    def _put_together(self, call: _Call, names: tuple[str, ...]) -> None:
        """This rank's parts of the rows -> M -> w -> all of row 0 -> p.grad."""
        rows, plain = self._rows, self._plain
        count = len(rows.full.parameters)
        least = 2 if self.scope == "shared" else 1
        operated = [mask.bit_count() >= least for mask in call.reached[:count]]
        if len(names) > 1:
            device = next(iter({p.device for p in call.targets}), torch.device("cpu"))
            products, accuracy = rows.gram(operated, len(names), device)
            weights = self.method.weights(products, generator=self.order, resolution=accuracy)
            rows.combine(operated, weights)
            rows.pick(
                [
                    -1 if by_weights else mask.bit_length() - 1
                    for by_weights, mask in zip(operated, call.reached, strict=False)
                ]
            )
            self.last = SurgeryReport(names, products, weights)
        else:
            device = call.targets[0].device if call.targets else torch.device("cpu")
            one = torch.ones(1, dtype=torch.float64, device=device)
            self.last = SurgeryReport(names, torch.full_like(one, torch.nan)[:, None], one)
        arrivals = [*rows.gather(), *plain.gather()]
        for arrived in arrivals:
            arrived()
        for i, (p, mask) in enumerate(zip(call.targets, call.reached, strict=True)):
            if mask:
                p.grad = rows.full.publish(0, i) if i < count else plain.full.publish(0, i - count)

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
    opaque: int


@dataclass
class _Call:
    """One call's parameters with rows, then those without; what reached them; other leaves."""

    targets: list[Tensor]
    reached: list[int]
    inputs: list[Tensor] = field(default_factory=list)


class _Spread:
    """Flat rows of this rank's gradients, and this rank's columns of their mean over the ranks."""

    def __init__(self, ranks: Ranks) -> None:
        self.full = TaskGradients(parts=ranks.size)
        self._ranks = ranks
        self._own: list[Tensor] = []
        self._on_their_way: dict[int, list[Callable[[], None]]] = {}

    def arrange(
        self, parameters: list[Tensor], tasks: int, rows: int, together: list[bool], *, keep: bool
    ) -> None:
        """`rows` full rows, and room for `tasks` parts; see `TaskGradients.arrange`."""
        self._on_their_way.clear()
        self.full.arrange(parameters, rows, together, keep=keep, clear=rows == 1)
        shapes = [(tasks, buffer.shape[1] // self._ranks.size) for buffer in self.full.buffers]
        like = [(buffer.dtype, buffer.device) for buffer in self.full.buffers]
        if like != [(own.dtype, own.device) for own in self._own] or shapes != [
            tuple(own.shape) for own in self._own
        ]:
            self._own = [
                buffer.new_empty(shape)
                for buffer, shape in zip(self.full.buffers, shapes, strict=True)
            ]

    def send(self, task: int, row: int) -> None:
        """Begin: own part `task` = mean over the ranks of `row`."""
        self._on_their_way[row] = [
            self._ranks.average(buffer[row], own[task])
            for buffer, own in zip(self.full.buffers, self._own, strict=True)
            if own.numel()
        ]

    def settle(self, row: int | None = None) -> None:
        """Until `row`, or every row, may be written again."""
        for each in list(self._on_their_way) if row is None else [row]:
            for finish in self._on_their_way.pop(each, ()):
                finish()

    def gram(self, chosen: list[bool], tasks: int, device: torch.device) -> tuple[Tensor, float]:
        """M over the chosen parameters, and its relative accuracy; equal on all ranks."""
        total = torch.zeros(tasks, tasks, dtype=torch.float64, device=device)
        accuracy = torch.finfo(torch.float64).eps
        for own in self._own:
            accuracy = max(accuracy, resolution(own))
        for segment in self._segments(chosen):
            total += gram(segment).to(device, non_blocking=True)
        self._ranks.sum(total)
        return total, accuracy

    def combine(self, chosen: list[bool], weights: Tensor) -> None:
        """Part 0 becomes Gᵀw over the chosen parameters."""
        for segment in self._segments(chosen):
            combine(segment, weights.to(segment.device, non_blocking=True), out=segment[0])

    def pick(self, tasks: list[int]) -> None:
        """Part 0 becomes one task's for the parameters that say which, others say -1."""
        for task in set(tasks) - {-1, 0}:
            for segment in self._segments([task == each for each in tasks]):
                segment[0].copy_(segment[task])

    def gather(self) -> list[Callable[[], None]]:
        """Begin: row 0 = all ranks' parts 0; returns what waits for it."""
        return [
            self._ranks.gather(own[0], buffer[0])
            for buffer, own in zip(self.full.buffers, self._own, strict=True)
            if own.numel()
        ]

    def _segments(self, chosen: list[bool]) -> list[Tensor]:
        """The chosen parameters' columns as far as they are this rank's."""
        found: list[Tensor] = []
        for block, start, stop in self.full.spans(chosen):
            own = self._own[block]
            begin = self._ranks.rank * own.shape[1]
            start, stop = max(start - begin, 0), min(stop - begin, own.shape[1])
            if start < stop:
                found.append(own[:, start:stop])
        return found


def _after_hooks(parameter: Tensor, gradient: Tensor | None) -> Tensor | None:
    """Run the post-accumulate-grad hooks, which autograd.grad does not fire."""
    hooks = parameter._post_accumulate_grad_hooks
    if gradient is None or not hooks:
        return gradient
    parameter.grad = gradient
    for hook in list(hooks.values()):
        hook(parameter)
    gradient, parameter.grad = parameter.grad, None
    return gradient
