"""One call of `backward`, from the losses to p.grad."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradsurgery._features import FeatureGradients, add_to_grad, check_features
from gradsurgery._graph import GraphSurvey, survey
from gradsurgery._kept import KeptWeights
from gradsurgery._losses import Losses, read_losses
from gradsurgery._metric import check_metric, roots_of
from gradsurgery._options import Options, Parts
from gradsurgery._parameters import check_parameters, refuse_sparse
from gradsurgery._spread_rows import SpreadRows
from gradsurgery._undo import Undo
from gradsurgery._warn import warn_user
from gradsurgery._weighted import backward_weighted
from gradsurgery.distributed import (
    Ranks,
    agree_over_mesh,
    fingerprint,
    look_for_wrappers,
    shard_groups,
    warn_alone,
)
from gradsurgery.methods import Method
from gradsurgery.report import SurgeryReport
from gradsurgery.task_gradients import TaskGradients

__all__ = ["Surgery", "explain_donated_buffers"]

_STATE_VERSION = 3
_WHOLE = Parts()
# Every live surgery, so that two plugins on parts of one model leave each other's p.grad alone.
_live: weakref.WeakSet[Surgery] = weakref.WeakSet()


class Surgery:
    """Everything of the plugin that is not the wrapped optimizer's: one object, shared by copies.

    Some frameworks copy the plugin's `__dict__` into an object of their own; mutable state
    therefore lives here and nowhere else.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, method: Method, options: Options, seed: int
    ) -> None:
        if options.metric == "optimizer":
            check_metric(optimizer)
        self.optimizer = optimizer
        self.method = method
        self.options = options
        self.keep_rows = False
        """Whether all tasks' gradients outlive `backward`, for `products`; costs one more row."""
        self.order = torch.Generator().manual_seed(seed)
        self.last: SurgeryReport | None = None
        self._gradients = TaskGradients()
        self._pending: tuple[str, ...] | None = None
        # id(parameter) -> tasks that reached it in the last call, or since the first of the
        # micro-batches that wait.
        self._reach: dict[int, int] = {}
        self._kept = KeptWeights(options.every)
        # The losses' values of micro-batches that wait, and where one backward pass does, the
        # weights that the rest of them get too.
        self._rows_wait = False
        self._values: Tensor | None = None
        self._adding: Tensor | None = None
        self._operated: list[bool] = []
        self._parts: tuple[tuple[object, ...], Parts] | None = None
        self._looked = False
        self._warned = False
        self._meshes: dict[Any, Ranks] = {}
        _live.add(self)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Python values and tensors that `torch.load(weights_only=True)` takes."""
        return {
            "version": _STATE_VERSION,
            "method": self.method.name,
            "method_state": self.method.state_dict(),
            "order": self.order.get_state(),
            "kept": self._kept.state_dict(),
        }

    def check_state_dict(self, state: dict[str, Any] | None) -> None:
        """Raise ValueError where `load_state_dict` could not take this; change nothing."""
        if state is None:
            return
        missing = {"version", "method", "method_state", "order"} - state.keys()
        if missing:
            raise ValueError(f"the gradient_surgery state lacks {', '.join(sorted(missing))}")
        if state["version"] > _STATE_VERSION:
            raise ValueError(
                f"the gradient_surgery state has version {state['version']}, this library reads "
                f"up to {_STATE_VERSION}; update gradsurgery"
            )
        try:
            torch.Generator().set_state(state["order"].cpu())
        except (AttributeError, RuntimeError, TypeError) as error:
            raise ValueError(f"order in the gradient_surgery state is damaged: {error}") from error

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Continue where `state_dict` was taken; another method's own state is left out.

        None, from an optimizer without surgery, leaves method and order as they are.
        """
        self.discard()
        if state is None:
            return
        # map_location may have moved the generator's state; generators take it on the CPU only.
        self.order.set_state(state["order"].cpu())
        same = state["method"] == self.method.name
        self.method.load_state_dict(state["method_state"] if same else {})
        self._kept.load_state_dict(state.get("kept", "") if same else "")

    def __getstate__(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer,
            "method": self.method,
            "options": self.options,
            "order": self.order.get_state(),
            "kept": self._kept,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["optimizer"], state["method"], state["options"], 0)  # type: ignore[misc]
        self.order.set_state(state["order"])
        self._kept = state["kept"]

    def discard(self) -> None:
        """Drop micro-batches that were accumulated and not yet operated on."""
        self._pending = self._values = self._adding = None
        self._rows_wait = False

    # --------------------------------------------------------------- backward

    def parameters(self) -> list[Tensor]:
        """The trainable parameters of the wrapped optimizer, as they are now."""
        groups = self.optimizer.param_groups
        unique = {id(p): p for group in groups for p in group["params"] if p.requires_grad}
        return list(unique.values())

    # Also under inference_mode, where buffers would be made that nothing can write to later.
    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def backward(
        self, losses: Losses, *, accumulate: bool, retain_graph: bool, features: Any = None
    ) -> None:
        """See `AdaptiveGradientSurgery.backward`."""
        parameters = self.parameters()
        names, tensors = self._read_everywhere(losses, parameters, accumulate)
        self._look_at_processes(parameters)
        if len(tensors) == 1:
            self._backward_alone(names, tensors[0], accumulate=accumulate, retain=retain_graph)
            return
        if features is not None and self._kept.get(names) is None and not self.method.one_backward:
            self._backward_features(names, tensors, features, accumulate, retain_graph)
            return
        seen = survey(tensors)
        check_parameters(self.optimizer, parameters, seen)
        if any(hasattr(p, "device_mesh") for p in parameters):
            # fully_shard puts the gathered parameters into the graph, not the ones held here.
            seen.opaque = (1 << len(tensors)) - 1
        pending = self._pending is not None
        weights = self._adding if pending else self._kept.get(names)
        asked = self.method.one_backward and not pending
        values = self._loss_values(tensors)
        # A node that hides what it reaches may hide a head, which needs a row of its own.
        visible = self.options.scope == "all" or not seen.opaque
        call = _Call(names, tensors, seen, weights, values, accumulate, retain_graph)
        if (weights is not None or asked) and visible and not self._rows_wait:
            self._backward_weighted(call)
        else:
            self._backward_each(call)

    def _backward_weighted(self, call: _Call) -> None:
        """Weights are known: one pass. Micro-batches add up in p.grad, as with a single loss."""
        parameters, names, seen = self.parameters(), call.names, call.seen
        own = {id(p) for p in parameters}
        leaves = {id(p): p for p in parameters} | {k: leaf for k, (leaf, _) in seen.leaves.items()}
        foreign = self._foreign(leaves, own, hidden=bool(seen.opaque))
        leaves |= foreign
        plain: list[Tensor] = []
        weighted: list[Tensor] = []
        # fully_shard's graph shows other leaves than the parameters held here.
        visible = not any(hasattr(p, "device_mesh") for p in parameters)
        for key, (leaf, mask) in seen.leaves.items():
            head = self.options.scope == "shared" and mask.bit_count() == 1
            (plain if visible and (key not in own or head) else weighted).append(leaf)
        undo = Undo(leaves, self.order, self.method)
        report = self.last
        try:
            undo.clear()
            weights = call.weights
            if weights is None:
                report = self._ask(names, call.losses[0].device, call.values)
                weights = report.weights
            with explain_donated_buffers():
                backward_weighted(
                    call.losses,
                    weights,
                    plain,
                    weighted if plain else None,
                    retain=call.retain_graph,
                )
            undo.add_earlier(foreign)
        except BaseException:
            undo.roll_back()
            raise
        self.last = report
        self._operated = []
        self._pending, self._adding = (names, weights) if call.accumulate else (None, None)
        if not call.accumulate:
            self._kept.count()
        reached = bool(weighted) or any(id(leaf) in own for leaf in plain) or bool(seen.opaque)
        self.warn_without_gradient(reached)

    def _ask(
        self, names: tuple[str, ...], device: torch.device, values: Tensor | None
    ) -> SurgeryReport:
        """The weights of a method that needs no gradients, and NaN for those."""
        gram = torch.full((len(names), len(names)), torch.nan, dtype=torch.float64, device=device)
        return SurgeryReport(
            names, gram, self.method.weights(gram, losses=values, generator=self.order)
        )

    def _backward_each(self, call: _Call) -> None:
        """One backward pass per task, into rows; the method is asked unless weights are known."""
        parameters, names, tensors, seen = self.parameters(), call.names, call.losses, call.seen
        pending, accumulate = self._rows_wait, call.accumulate
        masks = {id(p): seen.tasks_of(p) for p in parameters}
        captured, ranks = self.choose(parameters, masks, seen.opaque, gather=accumulate or pending)
        # From here on the rows change: what waits is dropped unless the call comes to its end.
        self._pending, self._rows_wait = None, False
        self._gradients.arrange(captured, len(tensors), ranks, keep=pending, spare=self.keep_rows)
        earlier_reach = self._reach if pending else {}
        targets = self._gradients.parameters
        reached = [earlier_reach.get(id(p), 0) for p in targets]
        leaves = {id(p): p for p in captured} | {k: leaf for k, (leaf, _) in seen.leaves.items()}
        foreign = self._foreign(leaves, {id(p) for p in parameters}, hidden=bool(seen.opaque))
        leaves |= foreign
        expected = [seen.tasks_of(p) | seen.opaque for p in targets]
        retain = [call.retain_graph or kept for kept in seen.retain]
        watched = [
            p for p in targets if p.requires_grad and (seen.opaque or id(p) in seen.doubtful)
        ]
        watches = [refuse_sparse(p, self.optimizer) for p in watched]
        # The graph must not outlive the last backward pass.
        del seen
        call.seen = GraphSurvey(retain=[])
        undo = Undo(leaves, self.order, self.method)
        report = self.last
        try:
            undo.clear()
            for task, loss in enumerate(tensors):
                self._fill_row(task, loss, retain[task], expected, reached)
            if not accumulate:
                device = tensors[0].device
                report = self._operate(names, reached, device, call.values, call.weights)
            undo.add_earlier(foreign)
        except BaseException:
            undo.roll_back()
            raise
        finally:
            for watch in watches:
                watch.remove()
        if not accumulate:
            self.keep_weights(names, call.weights, report)
        self.last = report
        self._reach = dict(zip(map(id, targets), reached, strict=True))
        self._rows_wait = accumulate
        self._pending, self._values, self._adding = (
            (names, call.values, call.weights) if accumulate else (None, None, None)
        )
        self.warn_without_gradient(any(masks.values()) or any(reached))

    def _backward_features(
        self,
        names: tuple[str, ...],
        losses: list[Tensor],
        features: Any,
        accumulate: bool,
        retain: bool,
    ) -> None:
        """Surgery on the gradients at a shared representation."""
        self._refuse_with_features(accumulate)
        tensors, seen = check_features(features, losses)
        parameters = self.parameters()
        check_parameters(self.optimizer, parameters, seen)
        own = {id(p): p for p in parameters}
        beside = {key: leaf for key, (leaf, _) in seen.leaves.items()}
        behind = {key: leaf for key, (leaf, _) in survey(tensors).leaves.items()}
        leaves = own | beside | behind
        foreign = self._foreign(leaves, set(own), hidden=bool(seen.opaque))
        leaves |= foreign
        gradients = FeatureGradients(
            tensors,
            seen,
            by_weights=set(own) if self.options.scope == "all" else set(),
            plain=leaves.keys() - own.keys(),
            add=add_to_grad,
        )
        undo = Undo(leaves, self.order, self.method)
        try:
            undo.clear()
            gradients.fill(losses, retain=retain)
            gram, accuracy = gradients.gram(len(losses), losses[0].device)
            weights = self.method.weights(
                gram,
                losses=self._loss_values(losses),
                generator=self.order,
                resolution=accuracy,
            )
            behind_them, factors = gradients.weigh(weights)
            torch.autograd.backward(behind_them, factors, retain_graph=retain)
            undo.add_earlier(foreign)
        except BaseException:
            undo.roll_back()
            raise
        self.last = SurgeryReport(names, gram, weights)
        self._kept.take(names, weights)
        self._operated = []
        self.warn_without_gradient(not own.keys().isdisjoint(beside.keys() | behind.keys()))

    def _refuse_with_features(self, accumulate: bool) -> None:
        if accumulate or self._pending is not None:
            raise ValueError(
                "features cannot be combined with micro-batches (accumulate=True): the trunk waits "
                "for weights that are known after the last of them"
            )
        if not self.options.whole:
            raise ValueError("features needs granularity='model': it measures no parameters")
        if self.options.metric != "euclidean":
            raise ValueError("features needs metric='euclidean': it measures no parameters")
        if any(hasattr(p, "device_mesh") for p in self.parameters()):
            raise ValueError("features cannot be combined with fully_shard")

    def keep_weights(
        self, names: tuple[str, ...], known: Tensor | None, report: SurgeryReport | None
    ) -> None:
        """Note for `every` that a step was solved, or took the weights that were known."""
        if known is None and report is not None:
            self._kept.take(names, report.weights)
        else:
            self._kept.count()

    def _loss_values(self, losses: Sequence[Tensor | None]) -> Tensor | None:
        """The losses' values, [T] float64, for methods that read them; micro-batches add up."""
        if not self.method.reads_losses:
            return None
        given = [loss for loss in losses if loss is not None]
        values = torch.stack([loss.detach().to(given[0].device, torch.float64) for loss in given])
        for ranks in self._meshes.values():
            ranks.sum(values)
            values /= ranks.size
        return values if self._values is None else self._values + values

    def _backward_alone(
        self, names: tuple[str, ...], loss: Tensor, *, accumulate: bool, retain: bool
    ) -> None:
        """One task: nothing to weigh, and micro-batches add up in p.grad as they always do."""
        foreign: dict[int, Tensor] = {}
        if len(_live) > 1:
            seen = survey([loss])
            leaves = {key: leaf for key, (leaf, _) in seen.leaves.items()}
            own = {id(p) for p in self.parameters()}
            foreign = self._foreign(leaves, own, hidden=bool(seen.opaque))
            del seen
        earlier = {key: leaf.grad for key, leaf in foreign.items()}
        for leaf in foreign.values():
            leaf.grad = None
        try:
            loss.backward(retain_graph=retain)  # type: ignore[no-untyped-call]
        finally:
            for key, leaf in foreign.items():
                leaf.grad = earlier[key]
        one = torch.ones(1, dtype=torch.float64, device=loss.device)
        self.last = SurgeryReport(names, torch.full_like(one, torch.nan)[:, None], one)
        self._pending = names if accumulate else None

    def _fill_row(
        self, task: int, loss: Tensor, retain: bool, masks: list[int], reached: list[int]
    ) -> None:
        """One task's backward, straight into its row; notes which parameters got a gradient."""
        storage, bit = self._gradients, 1 << task
        indices = [i for i, mask in enumerate(masks) if mask >> task & 1]
        given: list[Tensor | None] = []
        for i in indices:
            p, view = storage.parameters[i], storage.view(task, i)
            if p._post_accumulate_grad_hooks:
                # Hooks may keep, replace or take away what they find: it is a tensor of its own.
                p.grad = view.clone() if reached[i] & bit else None
                given.append(None)
            else:
                p.grad = view
                given.append(view)
        versions = [storage.version(task, i) for i in indices]
        with explain_donated_buffers():
            loss.backward(retain_graph=retain)  # type: ignore[no-untyped-call]
        for i, handed, version in zip(indices, given, versions, strict=True):
            p = storage.parameters[i]
            found = p.grad
            p.grad = None
            if found is not None and found is handed and storage.is_in_place(task, i):
                reached[i] |= bit if storage.version(task, i) != version else 0
            elif found is not None:
                storage.replace_view(task, i).copy_(found)
                reached[i] |= bit
            elif handed is not None or reached[i] & bit:
                storage.replace_view(task, i).zero_()
                reached[i] &= ~bit

    def _operate(
        self,
        names: tuple[str, ...],
        reached: list[int],
        device: torch.device,
        values: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> SurgeryReport | None:
        """Rows -> M -> w -> the combined row -> p.grad; with weights that are known no M."""
        storage = self._gradients
        least = 2 if self.options.scope == "shared" else 1
        operated = [mask.bit_count() >= least for mask in reached]
        report = self.last
        if weights is None:
            report = self.solve(storage, operated, names, device, values)
            weights = report.weights
        self.combine(storage, operated, weights)
        for index, (p, mask) in enumerate(zip(storage.parameters, reached, strict=True)):
            if operated[index]:
                p.grad = storage.publish(storage.combined, index)
            elif mask:
                # A head: its own task's plain gradient.
                p.grad = storage.publish(mask.bit_length() - 1, index)
        self._operated = operated
        return report

    def solve(
        self,
        rows: TaskGradients | SpreadRows,
        operated: list[bool],
        names: tuple[str, ...],
        device: torch.device,
        values: Tensor | None,
    ) -> SurgeryReport:
        """Measure M and ask the method."""
        if self.method.one_backward:
            return self._ask(names, device, values)
        layout = self._layout(rows)
        parts = self._part_names(layout.parameters)
        roots = None
        if self.options.metric == "optimizer":
            roots = roots_of(self.optimizer, layout, operated)
        if self.options.whole and roots is None:
            gram, resolution = rows.gram(operated, device)
        else:
            where = [parts.of(p) for p in layout.parameters]
            number = max(len(parts.names), 1)
            gram, resolution = rows.grams(operated, where, number, device, roots)
            if self.options.whole:
                gram = gram[0]
        weights = self.method.weights(
            gram, losses=values, generator=self.order, resolution=resolution
        )
        return SurgeryReport(names, gram, weights, parts.names)

    def combine(
        self, rows: TaskGradients | SpreadRows, operated: list[bool], weights: Tensor
    ) -> None:
        """The combined row becomes Gᵀw, each part with its own weights."""
        if weights.dim() == 1:
            rows.combine(operated, weights)
            return
        layout = self._layout(rows)
        parts = self._part_names(layout.parameters)
        where = [parts.of(p) for p in layout.parameters]
        rows.combine_parts(operated, where, weights)

    @staticmethod
    def _layout(rows: TaskGradients | SpreadRows) -> TaskGradients:
        return rows if isinstance(rows, TaskGradients) else rows.full

    def _held(self) -> list[Tensor]:
        """The parameters whose rows hold micro-batches; none where nothing waits."""
        return self.waiting() if self._rows_wait else []

    def _part_names(self, held: Sequence[Tensor]) -> Parts:
        """The parts of the model, as the optimizer's groups are now.

        Args:
            held: parameters that have rows. One that was frozen after the first micro-batch is
                among them, and belongs to the part that it was in.
        """
        if self.options.whole:
            return _WHOLE
        unique = {id(p): p for p in [*self.parameters(), *held]}
        parameters = [
            p for group in self.optimizer.param_groups for p in group["params"] if id(p) in unique
        ]
        sizes = [len(group["params"]) for group in self.optimizer.param_groups]
        key = (*map(id, parameters), *sizes)
        if self._parts is None or self._parts[0] != key:
            self._parts = key, Parts.read(self.options, self.optimizer, parameters)
        return self._parts[1]

    @property
    def keeps_rows(self) -> bool:
        """Whether `keep_rows` can be set."""
        return True

    def products(self, changes: Mapping[int, Tensor]) -> Tensor:
        """g_t·change over the parameters that the last call operated on, [T] float64.

        Args:
            changes: id(parameter) -> a tensor of its shape.

        Raises:
            RuntimeError: the rows of the last call are not there: `keep_rows` was not set.
        """
        storage = self._gradients
        if not storage.spare or not any(self._operated):
            raise RuntimeError("set keep_rows before the call of backward")
        given = [changes.get(id(p), p) for p in storage.parameters]
        return storage.products(self._operated, given)

    def operated(self) -> list[Tensor]:
        """The parameters that the last call operated on."""
        pairs = zip(self._gradients.parameters, self._operated, strict=False)
        return [p for p, chosen in pairs if chosen]

    def read(
        self, losses: Losses, parameters: list[Tensor], *, absent: bool = False
    ) -> tuple[tuple[str, ...], list[Tensor | None]]:
        """Names and losses, checked, in the order of the micro-batches that wait."""
        names, tensors = read_losses(losses, {p.device for p in parameters}, absent=absent)
        if self._pending is not None and sorted(names) == sorted(self._pending):
            by_name = dict(zip(names, tensors, strict=True))
            names, tensors = self._pending, [by_name[name] for name in self._pending]
        self._check_tasks(names)
        return names, tensors

    def _read_everywhere(
        self, losses: Losses, parameters: list[Tensor], accumulate: bool
    ) -> tuple[tuple[str, ...], list[Tensor]]:
        """The same; where parameters are spread over processes, these must ask for the same."""
        names: tuple[str, ...] = ()
        given: list[Tensor | None] = []
        failure: Exception | None = None
        try:
            names, given = self.read(losses, parameters)
        except (TypeError, ValueError) as error:
            failure = error
        if parameters and hasattr(parameters[0], "device_mesh"):
            settings = self.settings(names, accumulate)
            agree_over_mesh(self._meshes, parameters[0], failure, settings)
        elif failure is not None:
            raise failure
        return names, [loss for loss in given if loss is not None]

    def settings(self, names: tuple[str, ...], accumulate: bool) -> dict[str, Any]:
        """What must be the same on all ranks of a surgery."""
        order = self.order.get_state()
        return {
            "losses": list(names),
            "accumulate": accumulate,
            "method": repr(self.method),
            **self.options.describe(),
            "the steps since the last solve": self._kept.age,
            "the seed or state of the task order": fingerprint(
                ctypes.string_at(order.data_ptr(), order.numel())
            ),
        }

    def choose(
        self, parameters: list[Tensor], masks: Mapping[int, int], opaque: int, *, gather: bool
    ) -> tuple[list[Tensor], list[int]]:
        """Which parameters get rows, and in which order: those that share weights side by side.

        With scope="shared" a head needs no rows: autograd gives it its own task's gradient. It
        gets them where a micro-batch still to come, or a node that hides what it reaches, may
        bring in a second task.

        Args:
            parameters: all of them.
            masks: id(parameter) -> the tasks that the graph shows to reach it.
            opaque: the tasks that may reach any parameter.
            gather: whether the next call adds to this one's rows, or this one to the last one's.
        """
        everything = self.options.scope == "all"
        needed = 1 if gather or everything else 2
        waiting = self._held()
        captured = {id(p): p for p in waiting}
        for p in parameters:
            if masks[id(p)].bit_count() >= needed or opaque:
                captured[id(p)] = p
        # What an opaque node reached last time is the best guess at what it will reach now. A
        # wrong guess costs a few more calls of the kernels, never a wrong result.
        guesses = [masks.get(key, 0) | self._reach.get(key, opaque) for key in captured]
        parts = self._part_names(waiting)
        last = max(len(parts.names), 1)
        ranks = [
            parts.of(p) if everything or guess.bit_count() >= 2 else last
            for p, guess in zip(captured.values(), guesses, strict=True)
        ]
        return list(captured.values()), ranks

    def waiting(self) -> list[Tensor]:
        """The parameters whose rows hold micro-batches."""
        return self._gradients.parameters

    # ----------------------------------------------------------------- checks

    def _check_tasks(self, names: tuple[str, ...]) -> None:
        if self._pending is not None and self._pending != names:
            raise ValueError(
                f"losses has the tasks {', '.join(names)}, but micro-batches of "
                f"{', '.join(self._pending)} are waiting: micro-batches of one step have the "
                "same tasks; zero_grad() drops those that wait"
            )
        if len(names) == 1:
            # Nothing is to be weighed: the method and its state are not asked.
            return
        parts = 0 if self.method.one_backward else len(self._part_names(self._held()).names)
        self.method.check(torch.Size([parts, len(names)] if parts else [len(names)]))

    def _foreign(
        self, leaves: dict[int, Tensor], own: set[int], *, hidden: bool
    ) -> dict[int, Tensor]:
        """What belongs to other plugins and not to this one: leaves, and all if some are hidden."""
        if not hidden and leaves.keys() <= own:
            return {}
        found = {key: p for key, p in self.others().items() if key not in own}
        return found if hidden else {key: p for key, p in found.items() if key in leaves}

    def others(self) -> dict[int, Tensor]:
        """id -> parameter, of all other plugins."""
        others = (s.parameters() for s in list(_live) if s.optimizer is not self.optimizer)
        return {id(p): p for parameters in others for p in parameters}

    def warn_without_gradient(self, reached: bool) -> None:
        """Warn once where no loss reaches any parameter held here."""
        if reached or self._warned:
            return
        self._warned = True
        warn_user(
            "the losses reach none of the parameters that this optimizer holds, so they get no "
            "gradient (are they those of a copy of the model?)"
        )

    def _look_at_processes(self, parameters: list[Tensor]) -> None:
        distributed = torch.distributed
        if self._looked or not (distributed.is_available() and distributed.is_initialized()):
            return
        self._looked = True
        if distributed.get_world_size() > 1 and not any(map(shard_groups, parameters)):
            look_for_wrappers(parameters, grouped=False)
            warn_alone()


@dataclass
class _Call:
    """One call of `backward` with several losses."""

    names: tuple[str, ...]
    losses: list[Tensor]
    seen: GraphSurvey
    weights: Tensor | None
    """Known beforehand, or to be found."""
    values: Tensor | None
    accumulate: bool
    retain_graph: bool


@contextmanager
def explain_donated_buffers() -> Iterator[None]:
    """Say what to do where a compiled model's graph does not outlive its first backward."""
    try:
        yield
    except RuntimeError as error:
        if "donated buffers" not in str(error):
            raise
        raise RuntimeError(
            "a compiled model reuses its saved tensors, and several losses share its graph: "
            "set torch._functorch.config.donated_buffer = False before the model is compiled"
        ) from error
