"""AdaptiveGradientSurgery: the plugin, an Optimizer around an Optimizer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradsurgery.backward.losses import Losses
from gradsurgery.backward.surgery import Surgery
from gradsurgery.backward.tasks import Request
from gradsurgery.methods import Method, resolve
from gradsurgery.options import Granularity, read_options
from gradsurgery.report import SurgeryReport

__all__ = ["AdaptiveGradientSurgery"]

# One entry of our own in the first group: the place that every checkpoint tool carries along
# (torch.distributed.checkpoint drops top-level keys that it does not know).
_STATE_KEY = "gradient_surgery"


class AdaptiveGradientSurgery(Optimizer):
    """Gradient surgery around any optimizer: `backward(losses)` replaces `sum(losses).backward()`.

    Each loss gets a backward pass of its own, M_ij = g_i·g_j is formed, a method turns M into
    task weights w, and p.grad becomes Σ_t w_t g_t. Everything else is the wrapped optimizer's:
    `param_groups`, `state` and `defaults` are its own, by reference.

    Args:
        optimizer: any `torch.optim.Optimizer`.
        method: a name out of `gradsurgery.methods.available()`, or an instance such as
            `gradsurgery.methods.AGS(max_scale=10.0)`.
        scope: "shared": surgery on the parameters that two or more tasks reach, while a head keeps
            its own task's plain gradient; "all": every parameter is under surgery.
        granularity: "model": one Gram matrix over all of them; "group": one for each parameter
            group; "parameter": one for each tensor; a mapping from names to modules (or
            parameters): one for each, and one for the rest.
        every: solve for the weights at every k-th call; one backward pass of the weighted loss in
            between. Needs granularity="model".
        metric: "euclidean": plain dot products; "optimizer": M_ij = Σ_d h_d g_id g_jd, h what the
            wrapped optimizer multiplies coordinate d by (Adam's family, RMSprop, Adagrad, SGD).
        process_group: a torch.distributed group over which gradients are averaged, task by task,
            before the surgery: all ranks then get the same p.grad, that of one process on the
            joined batch. For a bare module and for one in DistributedDataParallel. DTensor
            parameters, as `torch.distributed.fsdp.fully_shard` makes them, bring their own mesh.
        seed: seeds the random order in which tasks meet; part of `state_dict`.

    Raises:
        TypeError: `optimizer` is none, or is wrapped already; `method` is neither name nor method;
            an argument of another type.
        ValueError: an unknown method or value; `every` with parts of the model; metric="optimizer"
            with an optimizer whose geometry is not known.

    Source: SLAM-AGS, arXiv 2511.14639, for the default method.

    Example:
        >>> import torch
        >>> from gradsurgery import AdaptiveGradientSurgery
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = AdaptiveGradientSurgery(torch.optim.AdamW(model.parameters(), lr=1e-3))
        >>> out = model(torch.ones(4, 3))
        >>> optimizer.zero_grad()
        >>> optimizer.backward([out[:, 0].mean(), (out[:, 1] - out[:, 0]).square().mean()])
        >>> optimizer.step()
    """

    # Optimizer.__init__ is not called: it would make param_groups, state and hooks of its own,
    # which go stale as soon as the wrapped optimizer's are rebound.
    def __init__(
        self,
        optimizer: Optimizer,
        method: str | Method = "ags",
        *,
        scope: str = "shared",
        granularity: Granularity = "model",
        every: int = 1,
        metric: str = "euclidean",
        process_group: Any = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer; got {type(optimizer).__name__}"
            )
        if isinstance(optimizer, AdaptiveGradientSurgery):
            raise TypeError("optimizer is wrapped in AdaptiveGradientSurgery already")
        options = read_options(scope, granularity, every, metric)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed must be an int; got {seed!r}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must be at least 0 and fit into 64 bits; got {seed}")
        self._surgery = Surgery(optimizer, resolve(method), options, seed, process_group)
        self._make_hooks()

    # ------------------------------------------------------------------ surgery

    # A compiled step leaves its graph here: tracing the surgery would only take time.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def backward(
        self,
        losses: Losses,
        *,
        accumulate: bool = False,
        retain_graph: bool | None = None,
        features: Any = None,
        inputs: Sequence[Tensor] | None = None,
        create_graph: bool = False,
    ) -> None:
        """One backward pass per loss, surgery, and the combined gradient in p.grad.

        A parameter that no loss reaches keeps its p.grad. A gradient that is there already is
        added to. With one loss this is `loss.backward()`. Hooks on tensors fire once per loss
        that reaches them; post-accumulate-grad hooks fire once per loss too, and see that task's
        gradient alone in p.grad. Parameters of other optimizers get the plain sum, as from
        `sum(losses).backward()`, unless another AdaptiveGradientSurgery owns them.

        Where the weights are known beforehand (between two solves of `every`, methods that need no
        gradients) it is one backward pass of Σ_t w_t L_t, and micro-batches add up in p.grad.

        Args:
            losses: a sequence of 0-dim tensors, or a mapping from names to 0-dim tensors. With a
                process_group, None where this rank has no samples of the task.
            accumulate: True for a micro-batch: its gradients are added to the rows, p.grad stays
                as it is, and the next plain call operates on the sum. This `zero_grad()`, not
                the model's, drops micro-batches that wait. A single loss adds up in p.grad.
            retain_graph: keep the graph for another backward, as in `Tensor.backward`.
            features: a tensor, or several, through which the tasks share the trunk. The Gram matrix
                is then that of the gradients there, and the trunk has one backward pass. Not with
                micro-batches, parts of the model or metric="optimizer".
            inputs: as in `Tensor.backward`, the only leaves that get a gradient. None: all that the
                losses reach.
            create_graph: not supported; here so that asking for it says why.

        Raises:
            TypeError, ValueError: wrong losses, features or sparse gradients, before anything is
                changed.
            RuntimeError: from autograd; everything is then as before the call, but that
                micro-batches are dropped (with one loss: what `loss.backward()` leaves).
        """
        if create_graph:
            raise ValueError(
                "create_graph=True is not supported: gradients are written into flat rows, which "
                "carry no graph"
            )
        self._surgery.backward(Request(losses, accumulate, bool(retain_graph), features, inputs))

    @property
    def last(self) -> SurgeryReport | None:
        """What the last surgery saw and did; None before the first."""
        return self._surgery.last

    @property
    def method(self) -> Method:
        """The method in use."""
        return self._surgery.method

    # ---------------------------------------------------------------- optimizer

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """`step(closure=None)`: one step of the wrapped optimizer, with this one's hooks around.

        As in torch, hooks get (optimizer, args, kwargs) with the optimizer itself as args[0].
        Global hooks fire within, with the wrapped optimizer.
        """
        args = (self, *args)
        for before in self._optimizer_step_pre_hooks.values():
            changed = before(self, args, kwargs)
            if changed is None:
                continue
            if not (isinstance(changed, tuple) and len(changed) == 2):
                raise RuntimeError(
                    f"{before} must return None or a tuple of (new_args, new_kwargs); got {changed}"
                )
            args, kwargs = changed
        try:
            result = self._base.step(*args[1:], **kwargs)
        except RuntimeError as error:
            if "does not require grad and does not have a grad_fn" not in str(error):
                raise
            raise RuntimeError(
                f"{type(self._base).__name__} differentiates p.grad once more, which needs "
                "backward(create_graph=True); the rows that surgery works on carry no graph, so it "
                "cannot be wrapped"
            ) from error
        self._surgery.stepped()
        for after in self._optimizer_step_post_hooks.values():
            after(self, args, kwargs)
        return result

    # Tells torch not to wrap `step` with the global hooks: the wrapped optimizer fires them.
    step.hooked = True  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients as the wrapped optimizer does, and micro-batches that wait."""
        self._surgery.discard()
        self._base.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer; the next `backward` sees it."""
        self._base.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's, with the surgery's own state as an entry of its first group."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state: dict[str, Any] = self._base.state_dict()
        own = self._surgery.state_dict()
        if state.get("param_groups"):
            state["param_groups"][0][_STATE_KEY] = own
        else:
            # A wrapper around another optimizer (Lookahead, schedule-free ones) has a form of its
            # own, to which one more entry is added.
            state = {**state, _STATE_KEY: own}
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state)
            state = state if changed is None else changed
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, here or on the wrapped optimizer without surgery.

        Micro-batches that wait are dropped. From a checkpoint without surgery, the task order and
        the method's running state go on as they are.
        """
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        own = state_dict.pop(_STATE_KEY, None)
        if "param_groups" in state_dict:
            groups = [dict(group) for group in state_dict["param_groups"]]
            found = [group.pop(_STATE_KEY, None) for group in groups]
            state_dict["param_groups"], own = groups, found[0] if found else own
        self._surgery.check_state_dict(own)
        self._base.load_state_dict(state_dict)
        self._surgery.load_state_dict(own)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's, by reference."""
        return self._base.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self._base.param_groups = value

    @property
    def state(self) -> Any:
        """The wrapped optimizer's, by reference; nothing of ours is in it."""
        return self._base.state

    @state.setter
    def state(self, value: Any) -> None:
        self._base.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimizer's, by reference."""
        return self._base.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self._base.defaults = value

    # GradScaler sets these two on the object it was given, and a fused step reads them there.
    @property
    def grad_scale(self) -> Tensor | None:
        """What GradScaler hands to an optimizer that unscales by itself."""
        return self._base.grad_scale  # type: ignore[attr-defined, no-any-return]

    @grad_scale.setter
    def grad_scale(self, value: Tensor | None) -> None:
        self._base.grad_scale = value  # type: ignore[attr-defined]

    @grad_scale.deleter
    def grad_scale(self) -> None:
        del self._base.grad_scale  # type: ignore[attr-defined]

    @property
    def found_inf(self) -> Tensor | None:
        """GradScaler's flag for an optimizer that skips steps by itself."""
        return self._base.found_inf  # type: ignore[attr-defined, no-any-return]

    @found_inf.setter
    def found_inf(self, value: Tensor | None) -> None:
        self._base.found_inf = value  # type: ignore[attr-defined]

    @found_inf.deleter
    def found_inf(self) -> None:
        del self._base.found_inf  # type: ignore[attr-defined]

    # ------------------------------------------------------------------- object

    @property
    def _base(self) -> Optimizer:
        return self._surgery.optimizer

    def _make_hooks(self) -> None:
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()
        self._optimizer_state_dict_pre_hooks = OrderedDict()
        self._optimizer_state_dict_post_hooks = OrderedDict()
        self._optimizer_load_state_dict_pre_hooks = OrderedDict()
        self._optimizer_load_state_dict_post_hooks = OrderedDict()

    def __getattr__(self, name: str) -> Any:
        # What the wrapped optimizer has beyond Optimizer (train() and eval() of schedule-free
        # ones, _step_supports_amp_scaling of fused ones) is ours too.
        if name == "_surgery" or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)
        return getattr(self._base, name)

    def __getstate__(self) -> dict[str, Any]:
        # As torch's optimizers do, hooks stay behind.
        return {"_surgery": self._surgery}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._surgery = state["_surgery"]
        self._make_hooks()

    def __repr__(self) -> str:
        surgery = self._surgery
        return (
            f"{type(self).__name__}(method={surgery.method!r}, scope={surgery.options.scope!r}, "
            f"optimizer={self._base!r})"
        )
