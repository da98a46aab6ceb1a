"""Surgery: everything of the plugin that is not the wrapped optimizer's."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gradsurgery._warn import warn_user
from gradsurgery.backward.local import Local
from gradsurgery.backward.replicated import Replicated
from gradsurgery.backward.routes import Call, Outcome, Source, choose_route
from gradsurgery.backward.sharded import Sharded
from gradsurgery.backward.tasks import MicroBatches, Request, trainable
from gradsurgery.distributed.group import fingerprint, shard_groups
from gradsurgery.distributed.wrappers import is_running, refuse_flat_parameters, warn_alone
from gradsurgery.methods import Method
from gradsurgery.options import Options
from gradsurgery.report import SurgeryReport
from gradsurgery.weights.schedule import Schedule
from gradsurgery.weights.solver import Solver, TaskNames

__all__ = ["Surgery"]

_STATE_VERSION = 4
# Tools that restore checkpoints make one step without gradients of their own.
_STEPS_WITHOUT = 3


class Surgery:
    """One object, shared by copies of the plugin.

    Some frameworks copy the plugin's `__dict__` into an object of their own; mutable state
    therefore lives here and nowhere else.

    Args:
        optimizer: the wrapped optimizer.
        method: the rule M -> w.
        options: what else was asked for.
        seed: of the order in which tasks meet.
        process_group: over which gradients are averaged, or None.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        method: Method,
        options: Options,
        seed: int,
        process_group: Any = None,
    ) -> None:
        self.optimizer, self.options = optimizer, options
        self.solver = Solver(optimizer, method, options, seed)
        self.schedule = Schedule(options.every)
        self.last: SurgeryReport | None = None
        self.waiting: MicroBatches | None = None
        self._operated: list[bool] = []
        self._source: Source | None = None
        if process_group is not None:
            self._source = Replicated(optimizer, self.solver, options, process_group)
        self._grouped = process_group is not None
        self._looked = self._called = False
        self._steps = 0
        self._warned: set[str] = set()

    @property
    def method(self) -> Method:
        """The rule M -> w."""
        return self.solver.method

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Python values and tensors that `torch.load(weights_only=True)` takes."""
        return {
            "version": _STATE_VERSION,
            "method": self.method.name,
            "method_state": self.method.state_dict(),
            "order": self.solver.generator.get_state(),
            "kept": self.schedule.state_dict(),
            # As text: distributed checkpoints load only entries that they find in the optimizer
            # they load into, which knows no tasks before its first step.
            "tasks": json.dumps(self.solver.tasks.names if self.solver.tasks.named else ()),
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
        for name, part in (("method_state", self.method), ("kept", self.schedule)):
            taken = part.snapshot()
            same = state["method"] == self.method.name
            try:
                part.load_state_dict(state.get(name, "" if name == "kept" else {}) if same else {})
            except Exception as error:
                raise ValueError(
                    f"{name} in the gradient_surgery state is damaged: {error}"
                ) from error
            finally:
                part.restore(taken)

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Continue where `state_dict` was taken; another method's own state is left out.

        None, from an optimizer without surgery, leaves method and order as they are.
        """
        self.discard()
        if state is None:
            return
        # map_location may have moved the generator's state; generators take it on the CPU only.
        self.solver.generator.set_state(state["order"].cpu())
        same = state["method"] == self.method.name
        self.method.load_state_dict(state["method_state"] if same else {})
        self.schedule.load_state_dict(state.get("kept", "") if same else "")
        # Before version 4 tasks were known by their place alone.
        names = json.loads(state.get("tasks", "[]"))
        self.solver.tasks = TaskNames(tuple(names), named=bool(names))

    def __getstate__(self) -> dict[str, Any]:
        if self._grouped:
            raise TypeError(
                "an optimizer with a process_group cannot be copied or pickled; save its "
                "state_dict()"
            )
        return {
            "optimizer": self.optimizer,
            "method": self.method,
            "options": self.options,
            "order": self.solver.generator.get_state(),
            "schedule": self.schedule,
            "tasks": self.solver.tasks,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["optimizer"], state["method"], state["options"], 0)  # type: ignore[misc]
        self.solver.generator.set_state(state["order"])
        self.schedule, self.solver.tasks = state["schedule"], state["tasks"]

    def discard(self) -> None:
        """Drop micro-batches that were accumulated and not yet operated on."""
        self.waiting = None

    # --------------------------------------------------------------- backward

    # Also under inference_mode, where buffers would be made that nothing can write to later.
    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def backward(self, request: Request) -> None:
        """See `AdaptiveGradientSurgery.backward`."""
        self._called = True
        parameters = trainable(self.optimizer)
        self._refuse_features(request)
        source, waiting = self._source_of(parameters), self.waiting
        tasks = source.read(request, waiting, self._settings)
        self._look_at_processes(parameters)
        weights = waiting.weights if waiting else self.schedule.known(tasks.names)
        call = Call(
            tasks, source, self.solver, self.options, parameters, weights, waiting, self.discard
        )
        before, self.solver.tasks = self.solver.tasks, tasks.known
        try:
            outcome = choose_route(call).run(call)
        except BaseException:
            self.solver.tasks = before
            raise
        self._record(call, outcome)

    def _record(self, call: Call, outcome: Outcome) -> None:
        self.waiting, self._operated = outcome.waiting, outcome.operated
        weights = call.weights
        if outcome.report is not None:
            self.last = outcome.report
            weights = outcome.report.weights
        solved = outcome.report is not None or (call.waiting is not None and call.waiting.solved)
        if outcome.waiting is not None:
            outcome.waiting.solved = solved
        elif len(call.names) > 1 and solved and weights is not None:
            self.schedule.solved(call.names, weights)
        elif len(call.names) > 1:
            self.schedule.reused()
        self._warn_of_nothing(call, outcome)

    def _warn_of_nothing(self, call: Call, outcome: Outcome) -> None:
        """Say once what looks like a mistake: surgery that cannot do anything."""
        if not outcome.reached:
            self._warn(
                "the losses reach none of the parameters that this optimizer holds, so they get no "
                "gradient (are they those of a copy of the model?)"
            )
            return
        if outcome.arrived < 0 or outcome.waiting is not None:
            return
        given = zip(call.names, call.tasks.losses, strict=True)
        away = [
            name
            for t, (name, loss) in enumerate(given)
            if loss is not None and not outcome.arrived >> t & 1
        ]
        if away:
            self._warn(
                f"the loss of {', '.join(map(repr, away))} reaches none of the parameters that "
                "this optimizer holds (does it depend on frozen or on another optimizer's ones?)"
            )
        elif not any(outcome.operated):
            self._warn(
                "no parameter of this optimizer is reached by two of the tasks, so there is "
                "nothing to operate on and each keeps its plain gradient (is the shared trunk "
                "frozen, or in another optimizer? scope='all' operates on heads too)"
            )

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warn_user(message)

    def stepped(self) -> None:
        """A step of the wrapped optimizer is over: warn once where `backward` is never called."""
        self._steps += 1
        if self._steps != _STEPS_WITHOUT or self._called:
            return
        if any(p.grad is not None for p in trainable(self.optimizer)):
            self._warn(
                f"{_STEPS_WITHOUT} steps have been made and backward(losses) of this optimizer "
                "was never called: the gradients are plain ones. Write optimizer.backward([loss_a, "
                "loss_b]) where loss.backward() stands (in Lightning, automatic_optimization = "
                "False)"
            )

    def _source_of(self, parameters: list[Tensor]) -> Source:
        """Where gradients come from; parameters may become DTensors after construction."""
        if self._grouped:
            assert self._source is not None
            return self._source
        kind = Sharded if any(hasattr(p, "device_mesh") for p in parameters) else Local
        if type(self._source) is not kind:
            self._source = kind(self.optimizer, self.solver, self.options)
        return self._source

    def _refuse_features(self, request: Request) -> None:
        if request.features is None:
            return
        if request.accumulate or self.waiting is not None:
            raise ValueError(
                "features cannot be combined with micro-batches (accumulate=True): the trunk waits "
                "for weights that are known after the last of them"
            )
        if request.inputs is not None:
            raise ValueError("features cannot be combined with inputs")
        if not self.options.whole:
            raise ValueError("features needs granularity='model': it measures no parameters")
        if self.options.metric != "euclidean":
            raise ValueError("features needs metric='euclidean': it measures no parameters")

    def _settings(self, names: tuple[str, ...], accumulate: bool) -> dict[str, Any]:
        """What must be the same on all ranks of a surgery."""
        order = self.solver.generator.get_state()
        return {
            "losses": list(names),
            "accumulate": accumulate,
            "method": repr(self.method),
            **self.options.describe(),
            "the steps since the last solve": self.schedule.age,
            "the seed or state of the task order": fingerprint(
                ctypes.string_at(order.data_ptr(), order.numel())
            ),
        }

    def _look_at_processes(self, parameters: list[Tensor]) -> None:
        if self._grouped or self._looked or not is_running():
            return
        refuse_flat_parameters(parameters)
        self._looked = True
        if torch.distributed.get_world_size() > 1 and not any(map(shard_groups, parameters)):
            warn_alone()

    # ---------------------------------------------------------------- history

    @property
    def keeps_rows(self) -> bool:
        """Whether all tasks' gradients can outlive a call, for `products`."""
        return not self._grouped

    def keep_rows(self, keep: bool) -> None:
        """Let all tasks' gradients outlive `backward`; it costs one more row."""
        source = self._source_of(trainable(self.optimizer))
        assert isinstance(source, Local)
        source.keep_rows = keep

    def products(self, changes: Mapping[int, Tensor]) -> Tensor:
        """g_t·change over the parameters that the last call operated on, [T] float64.

        Args:
            changes: id(parameter) -> a tensor of its shape.

        Raises:
            RuntimeError: the rows of the last call are not there: `keep_rows` was not asked for.
        """
        source = self._source
        if not isinstance(source, Local) or not source.rows.spare or not any(self._operated):
            raise RuntimeError("ask to keep_rows before the call of backward")
        given = [changes.get(id(p), p) for p in source.rows.parameters]
        return source.rows.products(self._operated, given)

    def operated(self) -> list[Tensor]:
        """The parameters that the last call operated on."""
        if self._source is None:
            return []
        pairs = zip(self._source.held(), self._operated, strict=False)
        return [p for p, chosen in pairs if chosen]
