"""One call of `backward`, from the losses to p.grad."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gradsurgery._graph import survey
from gradsurgery._losses import Losses, read_losses
from gradsurgery._parameters import check_parameters, refuse_sparse
from gradsurgery._undo import Undo
from gradsurgery._warn import warn_user
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

_STATE_VERSION = 2
# Every live surgery, so that two plugins on parts of one model leave each other's p.grad alone.
_live: weakref.WeakSet[Surgery] = weakref.WeakSet()


class Surgery:
    """Everything of the plugin that is not the wrapped optimizer's: one object, shared by copies.

    Some frameworks copy the plugin's `__dict__` into an object of their own; mutable state
    therefore lives here and nowhere else.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, method: Method, scope: str, seed: int
    ) -> None:
        self.optimizer = optimizer
        self.method = method
        self.scope = scope
        self.order = torch.Generator().manual_seed(seed)
        self.last: SurgeryReport | None = None
        self._gradients = TaskGradients()
        self._pending: tuple[str, ...] | None = None
        # id(parameter) -> tasks that reached it in the last call, or since the first of the
        # micro-batches that wait.
        self._reach: dict[int, int] = {}
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

    def __getstate__(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer,
            "method": self.method,
            "scope": self.scope,
            "order": self.order.get_state(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["optimizer"], state["method"], state["scope"], 0)  # type: ignore[misc]
        self.order.set_state(state["order"])

    def discard(self) -> None:
        """Drop micro-batches that were accumulated and not yet operated on."""
        self._pending = None

    # --------------------------------------------------------------- backward

    def parameters(self) -> list[Tensor]:
        """The trainable parameters of the wrapped optimizer, as they are now."""
        groups = self.optimizer.param_groups
        unique = {id(p): p for group in groups for p in group["params"] if p.requires_grad}
        return list(unique.values())

    # Also under inference_mode, where buffers would be made that nothing can write to later.
    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def backward(self, losses: Losses, *, accumulate: bool, retain_graph: bool) -> None:
        """See `AdaptiveGradientSurgery.backward`."""
        parameters = self.parameters()
        names, tensors = self._read_everywhere(losses, parameters, accumulate)
        self._look_at_processes(parameters)
        if len(tensors) == 1:
            self._backward_alone(names, tensors[0], accumulate=accumulate, retain=retain_graph)
            return
        seen = survey(tensors)
        check_parameters(self.optimizer, parameters, seen)
        if any(hasattr(p, "device_mesh") for p in parameters):
            # fully_shard puts the gathered parameters into the graph, not the ones held here.
            seen.opaque = (1 << len(tensors)) - 1
        pending = self._pending is not None
        masks = {id(p): seen.tasks_of(p) for p in parameters}
        captured, together = self.choose(
            parameters, masks, seen.opaque, gather=accumulate or pending
        )
        # From here on the rows change: what waits is dropped unless the call comes to its end.
        self._pending = None
        self._gradients.arrange(captured, len(tensors), together, keep=pending)
        earlier_reach = self._reach if pending else {}
        targets = self._gradients.parameters
        reached = [earlier_reach.get(id(p), 0) for p in targets]
        leaves = {id(p): p for p in captured} | {k: leaf for k, (leaf, _) in seen.leaves.items()}
        foreign = self._foreign(leaves, {id(p) for p in parameters}, hidden=bool(seen.opaque))
        leaves |= foreign
        expected = [seen.tasks_of(p) | seen.opaque for p in targets]
        retain = [retain_graph or kept for kept in seen.retain]
        watched = [
            p for p in targets if p.requires_grad and (seen.opaque or id(p) in seen.doubtful)
        ]
        del seen
        watches = [refuse_sparse(p, self.optimizer) for p in watched]
        undo = Undo(leaves, self.order, self.method)
        report = self.last
        try:
            undo.clear()
            for task, loss in enumerate(tensors):
                self._fill_row(task, loss, retain[task], expected, reached)
            if not accumulate:
                report = self._operate(names, reached, tensors[0].device)
            undo.add_earlier(foreign)
        except BaseException:
            undo.roll_back()
            raise
        finally:
            for watch in watches:
                watch.remove()
        self.last = report
        self._reach = dict(zip(map(id, targets), reached, strict=True))
        self._pending = names if accumulate else None
        self.warn_without_gradient(any(masks.values()) or any(reached))

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
        self, names: tuple[str, ...], reached: list[int], device: torch.device
    ) -> SurgeryReport:
        """Rows -> M -> w -> row 0 -> p.grad."""
        storage = self._gradients
        least = 2 if self.scope == "shared" else 1
        operated = [mask.bit_count() >= least for mask in reached]
        gram, resolution = storage.gram(operated, device)
        weights = self.method.weights(gram, generator=self.order, resolution=resolution)
        storage.combine(operated, weights)
        for index, (p, mask) in enumerate(zip(storage.parameters, reached, strict=True)):
            if operated[index]:
                p.grad = storage.publish(0, index)
            elif mask:
                # A head: its own task's plain gradient.
                p.grad = storage.publish(mask.bit_length() - 1, index)
        return SurgeryReport(names, gram, weights)

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
            "scope": self.scope,
            "the seed or state of the task order": fingerprint(
                ctypes.string_at(order.data_ptr(), order.numel())
            ),
        }

    def choose(
        self, parameters: list[Tensor], masks: Mapping[int, int], opaque: int, *, gather: bool
    ) -> tuple[list[Tensor], list[bool]]:
        """Which parameters get rows, and which of these to lay side by side.

        With scope="shared" a head needs no rows: autograd gives it its own task's gradient. It
        gets them where a micro-batch still to come, or a node that hides what it reaches, may
        bring in a second task.

        Args:
            parameters: all of them.
            masks: id(parameter) -> the tasks that the graph shows to reach it.
            opaque: the tasks that may reach any parameter.
            gather: whether the next call adds to this one's rows, or this one to the last one's.
        """
        needed = 1 if gather or self.scope == "all" else 2
        waiting = self.waiting() if self._pending is not None else []
        captured = {id(p): p for p in waiting}
        for p in parameters:
            if masks[id(p)].bit_count() >= needed or opaque:
                captured[id(p)] = p
        # What an opaque node reached last time is the best guess at what it will reach now. A
        # wrong guess costs a few more calls of the kernels, never a wrong result.
        guesses = [masks.get(key, 0) | self._reach.get(key, opaque) for key in captured]
        together = [self.scope == "all" or guess.bit_count() >= 2 for guess in guesses]
        return list(captured.values()), together

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
        self.method.check(torch.Size([len(names)]))

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
