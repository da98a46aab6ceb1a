"""Gradients of this process alone, which autograd writes into the rows by way of p.grad."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gradsurgery.backward.checks import check_inputs, check_parameters, refuse_sparse
from gradsurgery.backward.differentiate import backward_weighted, explained
from gradsurgery.backward.features import FeatureGradients, SharedFeatures, add_to_grad
from gradsurgery.backward.graph import GraphSurvey, survey
from gradsurgery.backward.losses import Given, loss_values, read_losses
from gradsurgery.backward.selection import Plan, select
from gradsurgery.backward.tasks import MicroBatches, Request, Settings, Tasks, leave_out, trainable
from gradsurgery.distributed.wrappers import Collectives, is_running
from gradsurgery.gradients.storage import TaskGradients
from gradsurgery.options import Options
from gradsurgery.weights.solver import Solver

__all__ = ["Local"]


class Local:
    """Where rows come from: plain backward passes in this process.

    Args:
        optimizer: the wrapped optimizer.
        solver: of the plugin.
        options: scope and what else was asked for.
    """

    keeps_rows = True
    """Whether all tasks' gradients can outlive a call."""
    waits_in_grad = True
    """Micro-batches of known weights, or of one task, add up in p.grad itself."""
    hides_leaves = False
    """Whether the graph shows other leaves than the parameters that the optimizer holds."""

    def __init__(self, optimizer: Optimizer, solver: Solver, options: Options) -> None:
        self.optimizer, self.solver, self.options = optimizer, solver, options
        self.rows = TaskGradients()
        self.keep_rows = False
        """Keep all tasks' gradients after a call, at the cost of one more row."""
        self.last_reach: dict[int, int] = {}
        # Until a first call has shown that its backward passes do not communicate.
        self._alone = True

    def held(self) -> list[Tensor]:
        """The parameters that have rows."""
        return self.rows.parameters

    # -------------------------------------------------------------------- read

    def read(self, request: Request, waiting: MicroBatches | None, settings: Settings) -> Tasks:
        """Check everything, before anything changes."""
        parameters = trainable(self.optimizer)
        given = self._read_losses(request, waiting, parameters, settings)
        if waiting:
            waiting.check(given.names)
        held = self.held() if waiting else ()
        self.solver.check(given.tasks, given.names, parameters, held)
        if request.inputs is not None:
            check_inputs(request.inputs)
        device = next(loss.device for loss in given.losses if loss is not None)
        graph = GraphSurvey(retain=[])
        tasks = Tasks(given.tasks, given.names, given.losses, graph, {}, 0, request, device=device)
        if request.features is not None:
            self._refuse_features(parameters)
            tasks.features = SharedFeatures(request.features, given.losses)
            check_parameters(self.optimizer, parameters, tasks.features.heads)
        if len(given.names) > 1:
            tasks.graph = survey(given.losses)
            check_parameters(self.optimizer, parameters, tasks.graph)
            self._look(tasks.graph, parameters)
            hidden = (1 << len(given.names)) - 1 if self.hides_leaves else 0
            tasks.opaque = tasks.graph.opaque | hidden
            leave_out(tasks)
            tasks.reach = {id(p): tasks.graph.tasks_of(p) for p in parameters}
            if self.solver.method.reads_losses:
                tasks.values = self._over_processes(loss_values(given.losses, device))
        return tasks

    def _read_losses(
        self,
        request: Request,
        waiting: MicroBatches | None,
        parameters: list[Tensor],
        settings: Settings,
    ) -> Given:
        names = waiting.names if waiting else ()
        devices = {p.device for p in parameters}
        return read_losses(request.losses, devices, self.solver.tasks, waiting=names)

    def _look(self, graph: GraphSurvey, parameters: list[Tensor]) -> None:
        """Whether the graph shows the parameters: here it does."""

    def _refuse_features(self, parameters: list[Tensor]) -> None:
        """Nothing to say against them here."""

    def _over_processes(self, values: Tensor) -> Tensor:
        """The losses' values of all processes together: here of this one."""
        return values

    # -------------------------------------------------------------- single task

    def single(self, tasks: Tasks, waiting: MicroBatches | None) -> None:
        """One task is `loss.backward()`; its micro-batches add up in p.grad as they always do."""
        (loss,) = tasks.losses
        assert loss is not None
        inputs = tasks.request.inputs
        loss.backward(  # type: ignore[no-untyped-call]
            retain_graph=tasks.request.retain_graph, inputs=None if inputs is None else list(inputs)
        )

    # ----------------------------------------------------------------- per task

    def begin(self, tasks: Tasks, waiting: MicroBatches | None) -> Plan:
        """Rows for what the tasks reach."""
        parameters, request = trainable(self.optimizer), tasks.request
        add = waiting is not None and waiting.in_rows
        held = self.held() if add else []
        wanted = parameters
        if request.inputs is not None:
            allowed = set(map(id, request.inputs))
            wanted = [p for p in parameters if id(p) in allowed]
        captured, sort_keys = select(
            wanted,
            tasks,
            self.solver.partition.parts(parameters, held),
            scope=self.options.scope,
            held=held,
            gather=request.accumulate or add,
            last_reach=self.last_reach,
        )
        count = len(tasks.names)
        self.rows.arrange(captured, count, sort_keys, keep=add, spare=self.keep_rows)
        targets = self.rows.parameters
        earlier = waiting.reach if add and waiting else {}
        reached = [earlier.get(id(p), 0) for p in targets]
        return Plan(targets, reached, self._leaves(tasks, captured))

    def _leaves(self, tasks: Tasks, captured: Sequence[Tensor]) -> list[Tensor]:
        return [*captured, *(leaf for leaf, _ in tasks.graph.leaves.values())]

    def fill(self, tasks: Tasks, plan: Plan, *, add: bool) -> None:
        """One backward pass per task, into its row."""
        graph = tasks.graph
        expected = [graph.tasks_of(p) | tasks.opaque for p in plan.targets]
        retain = [tasks.retain(task) for task in range(len(tasks.names))]
        watched = [
            p for p in plan.targets if p.requires_grad and (tasks.opaque or id(p) in graph.doubtful)
        ]
        inputs = None if tasks.request.inputs is None else plan.leaves
        alone = self._alone and not (graph.communicates or self.hides_leaves)
        # The graph must not outlive the last backward pass.
        del graph
        tasks.graph = GraphSurvey(retain=[])
        watches: list[RemovableHandle] = []
        collectives = Collectives() if alone and is_running() else None
        try:
            watches += [refuse_sparse(p, self.optimizer) for p in watched]
            for task, loss in enumerate(tasks.losses):
                if loss is None:
                    continue
                self._fill_row(task, loss, retain[task], expected, plan.reached, inputs)
                if collectives is not None:
                    collectives.refuse()
                    collectives = None
            self._alone = False
        finally:
            for watch in watches:
                watch.remove()

    def _fill_row(
        self,
        task: int,
        loss: Tensor,
        retain: bool,
        expected: list[int],
        reached: list[int],
        inputs: list[Tensor] | None,
    ) -> None:
        """One task's gradient, straight into its row; notes which parameters got any."""
        rows, parameters, bit = self.rows, self.rows.parameters, 1 << task
        indices = [i for i, mask in enumerate(expected) if mask >> task & 1]
        given: list[Tensor | None] = []
        for i in indices:
            p, view = parameters[i], rows.view(task, i)
            if p._post_accumulate_grad_hooks:
                # Hooks may keep, replace or take away what they find: it is a tensor of its own.
                p.grad = view.clone() if reached[i] & bit else None
                given.append(None)
            else:
                p.grad = view
                given.append(view)
        versions = [rows.version(task, i) for i in indices]
        if inputs is None or inputs:
            with explained():
                loss.backward(retain_graph=retain, inputs=inputs)  # type: ignore[no-untyped-call]
        for i, handed, version in zip(indices, given, versions, strict=True):
            p = parameters[i]
            found = p.grad
            p.grad = None
            if found is not None and found is handed and rows.is_in_place(task, i):
                reached[i] |= bit if rows.version(task, i) != version else 0
            elif found is not None:
                rows.replace_view(task, i).copy_(found)
                reached[i] |= bit
            elif handed is not None or reached[i] & bit:
                rows.replace_view(task, i).zero_()
                reached[i] &= ~bit

    def publish(self, plan: Plan, operated: list[bool]) -> None:
        """The combined row, and a head's own row, as p.grad."""
        rows = self.rows
        for index, (p, mask) in enumerate(zip(plan.targets, plan.reached, strict=True)):
            if operated[index]:
                p.grad = rows.publish(rows.combined, index)
            elif mask:
                p.grad = rows.publish(mask.bit_length() - 1, index)

    # ----------------------------------------------------------------- weighted

    def can_weigh(self, tasks: Tasks, waiting: MicroBatches | None) -> bool:
        """Whether one backward pass of Σ_t w_t L_t gives every parameter what it should have.

        A node that runs a backward pass of its own (reentrant checkpointing) accepts no choice of
        leaves, so all that it hides must want the same: the weighted sum.
        """
        hidden = tasks.graph.reentrant or self.hides_leaves
        if not hidden:
            return True
        if not tasks.graph.complete:
            return False
        plain, _ = self._plain_and_weighted(tasks)
        if plain or tasks.request.inputs is not None:
            return False
        if self.options.scope == "all":
            return True
        visible = tasks.graph.leaves.keys()
        behind = [mask for key, mask in self.last_reach.items() if key not in visible and mask]
        return bool(behind) and all(mask.bit_count() > 1 for mask in behind)

    def _plain_and_weighted(self, tasks: Tasks) -> tuple[list[Tensor], list[Tensor]]:
        """Leaves that get Σ_t ∂L_t: heads, and what the optimizer does not hold; and the others."""
        own = set(tasks.reach)
        plain: list[Tensor] = []
        weighted: list[Tensor] = []
        for key, (leaf, mask) in tasks.graph.leaves.items():
            head = self.options.scope == "shared" and mask.bit_count() == 1
            beside = not self.hides_leaves and (key not in own or head)
            (plain if beside else weighted).append(leaf)
        return plain, weighted

    def begin_weighted(self, tasks: Tasks, waiting: MicroBatches | None) -> Plan:
        """No rows: micro-batches add up in p.grad, as with a single loss."""
        parameters = trainable(self.optimizer)
        leaves = [leaf for leaf, _ in tasks.graph.leaves.values()]
        targets = [p for p in parameters if tasks.reach[id(p)]]
        reached = [tasks.reach[id(p)] for p in targets]
        hidden = parameters if tasks.opaque else []
        return Plan(targets, reached, [*hidden, *leaves])

    def fill_weighted(self, tasks: Tasks, plan: Plan, weights: Tensor, *, add: bool) -> None:
        """One pass, or two where heads or other optimizers' parameters get the plain sum."""
        plain, weighted = self._plain_and_weighted(tasks)
        every = not plain and tasks.request.inputs is None
        given = [(t, loss) for t, loss in enumerate(tasks.losses) if loss is not None]
        losses = [loss for _, loss in given]
        factors = [weights[t].to(loss.device, loss.dtype, non_blocking=True) for t, loss in given]
        with explained():
            backward_weighted(
                losses,
                factors,
                plain,
                None if every else weighted,
                retain=tasks.request.retain_graph,
            )
        if tasks.opaque and not every:
            self._refuse_hidden(tasks)

    def _refuse_hidden(self, tasks: Tasks) -> None:
        """Raise RuntimeError where a gradient came that the graph did not show."""
        for p in trainable(self.optimizer):
            if p.grad is not None and not tasks.reach[id(p)]:
                raise RuntimeError(
                    "a node of the graph ran a backward pass of its own and reached parameters "
                    "that the graph does not show, so heads behind it cannot be told apart while "
                    "the weights are known beforehand; use scope='all', or every=1"
                )

    def publish_weighted(self, plan: Plan) -> None:
        """Nothing: autograd has written p.grad itself."""

    # ----------------------------------------------------------------- features

    def begin_features(self, tasks: Tasks) -> tuple[Plan, Callable[[Tensor, Tensor], None]]:
        """The leaves on both sides of the features; and where a leaf's gradient goes."""
        assert tasks.features is not None
        parameters = trainable(self.optimizer)
        heads, trunk = tasks.features.heads, tasks.features.trunk
        leaves = [leaf for leaf, _ in (*heads.leaves.values(), *trunk.leaves.values())]
        reached = [tasks.features.tasks_of(p) for p in parameters]
        return Plan(parameters, reached, [*parameters, *leaves]), add_to_grad

    def fill_features(self, tasks: Tasks, gradients: FeatureGradients) -> None:
        """T passes down to the features."""
        gradients.fill(tasks.losses, retain=tasks.request.retain_graph)

    def total(self, gram: Tensor) -> Tensor:
        """M at the features of all processes' samples: here of this one's."""
        return gram

    def finish_features(
        self, tasks: Tasks, plan: Plan, gradients: FeatureGradients, weights: Tensor
    ) -> None:
        """Weighted gradients for what lies beside the features, and the pass through the trunk."""
        assert tasks.features is not None
        gradients.add_beside(weights)
        trunk, heads = tasks.features.trunk, tasks.features.heads
        beside = [leaf for key, (leaf, _) in heads.leaves.items() if key not in trunk.leaves]
        before = [(leaf.grad, _version(leaf.grad)) for leaf in beside]
        passes = gradients.passes(weights)
        for number, (tensors, at, leaves) in enumerate(passes):
            retain = tasks.request.retain_graph or number + 1 < len(passes)
            torch.autograd.backward(tensors, at, retain_graph=retain, inputs=leaves)
        for leaf, (grad, version) in zip(beside, before, strict=True):
            if leaf.grad is not grad or _version(leaf.grad) != version:
                raise RuntimeError(
                    f"a parameter of shape {list(leaf.shape)} is used beside the features and also "
                    "behind them, in a node that hides what it reaches (reentrant checkpointing): "
                    "use_reentrant=False shows it"
                )

    def publish_features(self, plan: Plan) -> None:
        """Nothing: p.grad is there."""


def _version(grad: Tensor | None) -> int:
    return -1 if grad is None else grad._version
