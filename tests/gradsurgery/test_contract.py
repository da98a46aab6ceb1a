"""Every optimizer and every method through one contract: the plugin is an Optimizer."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import contract
import pytest
import torch
from contract import CASES, OPTIMIZERS, VARIANTS, Case, Reference, assert_same, batch, pair, train
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import gradsurgery
from gradsurgery import AdaptiveGradientSurgery

# Options that no other path than the step itself sees are of the long part.
OFTEN = [(), ("fused",), ("tensor_lr",), ("momentum",)]
every_case = pytest.mark.parametrize(
    "case",
    [
        case
        if tuple(name for name, _ in case.options) in OFTEN
        else pytest.param(case, marks=pytest.mark.slow)
        for case in CASES
    ],
    ids=str,
)
SGD = Case("SGD", (("momentum", 0.9),))
ADAMW = Case("AdamW", (("fused", True),), "gradvac")
LBFGS = Case("LBFGS")
few_cases = pytest.mark.parametrize("case", [SGD, ADAMW, LBFGS], ids=str)


def through_a_file(value: Any) -> Any:
    """`torch.save`, and `torch.load` as it is by default."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def base_of(optimizer: AdaptiveGradientSurgery) -> torch.optim.Optimizer:
    """The wrapped optimizer, found as the object that the global hooks see."""
    seen: list[torch.optim.Optimizer] = []
    handle = register_optimizer_step_pre_hook(lambda base, args, kwargs: seen.append(base))
    grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
    assert all(grad is None for grad in grads)
    optimizer.step(lambda: torch.zeros(()))
    handle.remove()
    return seen[0]


def assert_same_training(
    first: tuple[nn.Module, Any], second: tuple[nn.Module, Any], *, whole: bool = True
) -> None:
    """Same parameters and state to the bit; `whole`: the surgery's own state too."""
    assert_same(first[0].state_dict(), second[0].state_dict(), "model")
    states = [copy.deepcopy(optimizer.state_dict()) for _, optimizer in (first, second)]
    if not whole:
        for state in states:
            state["param_groups"][0].pop("gradient_surgery", None)
    assert_same(states[0], states[1], "optimizer")


# ------------------------------------------------------------------ the roster itself


def test_the_roster_holds_every_optimizer_and_every_method() -> None:
    """New optimizers of torch and new methods come in by themselves, or are named with a reason."""
    assert {case.optimizer for case in CASES} == set(OPTIMIZERS) - {"SparseAdam"}
    assert {case.method for case in CASES} == set(gradsurgery.methods.available())
    used = {case.optimizer for case in VARIANTS if dict(case.options).get("fused")}
    assert used >= {"SGD", "Adam", "AdamW", "Adagrad"}
    tensor_rate = {case.optimizer for case in VARIANTS if dict(case.options).get("tensor_lr")}
    assert tensor_rate >= {"SGD", "Adam", "AdamW"}


def test_the_losses_of_the_roster_conflict() -> None:
    """Without conflicts every method would be the plain sum, and the roster would prove little."""
    model, optimizer = pair(SGD)
    optimizer.backward(model.losses(batch(0)))
    assert optimizer.last is not None
    assert int(optimizer.last.conflicts) >= 1
    assert (optimizer.last.weights - 1).abs().max() > 0.01


# ------------------------------------------------------------------ contract


@every_case
def test_is_an_optimizer_that_shares_everything_by_reference(case: Case) -> None:
    """param_groups, state and defaults are the base's own objects, also after a load."""
    model = case.model()
    base = case.base(model.parameters())
    optimizer = AdaptiveGradientSurgery(base, method=case.method)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.defaults is base.defaults
    for _ in range(2):
        train(model, optimizer, range(1))
        assert optimizer.param_groups is base.param_groups
        assert optimizer.state is base.state
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert optimizer.param_groups is base.param_groups
        assert optimizer.state is base.state
        assert set(optimizer.state) <= set(model.parameters())


@every_case
def test_a_step_is_the_plain_step_on_the_same_gradients(case: Case) -> None:
    """Bit for bit, three steps, with the value of the closure passed on; the base stays pure."""
    model, plain = case.model(), Reference(case)
    base = case.base(model.parameters())
    optimizer = AdaptiveGradientSurgery(base, method=case.method)
    before = copy.deepcopy(model.state_dict())
    assert train(model, optimizer, range(3)) == train(plain.model, plain, range(3))
    assert_same_training((model, base), (plain.model, plain.optimizer))
    assert not torch.equal(before["trunk.weight"], model.state_dict()["trunk.weight"])
    for group, expected in zip(base.param_groups, plain.optimizer.param_groups, strict=True):
        assert list(group) == list(expected)


@every_case
def test_a_step_without_backward(case: Case) -> None:
    """With no gradient nothing moves; with gradients from elsewhere it is the plain step."""
    model, other = case.model(), case.model()
    optimizer, base = case.plugin(model), case.base(other.parameters())
    before = copy.deepcopy(model.state_dict())
    value = torch.zeros(())
    assert optimizer.step(lambda: value) is value
    assert_same(model.state_dict(), before)
    base.step(lambda: value)
    for trained, stepper in ((model, optimizer), (other, base)):
        torch.stack(list(trained.losses(batch(0)).values())).sum().backward()
        stepper.step(lambda: value)
    assert_same_training((model, optimizer), (other, base), whole=False)
    assert optimizer.last is None


@every_case
def test_zero_grad_both_ways(case: Case) -> None:
    """set_to_none=True: None. False: zeros in the gradient that was there."""
    model, optimizer = pair(case)
    optimizer.backward(model.losses(batch(0)))
    held = [p.grad for p in model.parameters()]
    optimizer.zero_grad(set_to_none=False)
    for p, grad in zip(model.parameters(), held, strict=True):
        assert grad is not None
        assert p.grad is grad
        assert torch.count_nonzero(grad) == 0
    optimizer.backward(model.losses(batch(0)))
    again = [p.grad for p in model.parameters()]
    assert all(one is other for one, other in zip(again, held, strict=True))
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@every_case
@pytest.mark.parametrize("steps_before", [0, 1])
def test_add_param_group(case: Case, steps_before: int) -> None:
    """A group added before or after the first step is trained as by the plain optimizer."""
    if case.one_group:
        model, optimizer = pair(case)
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))]})
        assert len(optimizer.param_groups) == 2
        return
    if "Adagrad" in str(case) and torch.__version__ < "2.12":
        pytest.skip("torch's own Adagrad cannot step a group added later (KeyError: 'sum')")
    model, twin = case.model(), case.model()
    late = [model.heads[2].weight, twin.heads[2].weight]
    early = [
        [p for p in net.parameters() if p is not head]
        for net, head in zip((model, twin), late, strict=True)
    ]
    optimizer = AdaptiveGradientSurgery(case.base(early[0]), method=case.method)
    plain = Reference(case, model=twin)
    plain.optimizer = case.base(early[1])
    start = late[0].detach().clone()
    train(model, optimizer, range(steps_before))
    train(twin, plain, range(steps_before))
    assert torch.equal(late[0], start)
    optimizer.add_param_group({"params": [late[0]], "lr": optimizer.param_groups[0]["lr"] * 0.5})
    plain.optimizer.add_param_group(
        {"params": [late[1]], "lr": plain.optimizer.param_groups[0]["lr"] * 0.5}
    )
    train(model, optimizer, range(5, 7))
    train(twin, plain, range(5, 7))
    assert not torch.equal(late[0], start)
    assert_same_training((model, optimizer), (twin, plain.optimizer), whole=False)


@every_case
def test_resumes_to_the_bit_from_a_file(case: Case) -> None:
    """Model and optimizer through torch.save, and the run goes on as if nothing had happened."""
    model, optimizer = pair(case, seed=3)
    train(model, optimizer, range(3))
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    resumed, other = pair(case, seed=99)
    resumed.load_state_dict(saved["model"])
    kept = copy.deepcopy(saved["optimizer"])
    other.load_state_dict(saved["optimizer"])
    assert_same(saved["optimizer"], kept, "the caller's own dictionary")
    assert_same_training((resumed, other), (model, optimizer))
    assert train(resumed, other, range(3, 6)) == train(model, optimizer, range(3, 6))
    assert_same_training((resumed, other), (model, optimizer))


@every_case
def test_plain_checkpoints_go_both_ways(case: Case) -> None:
    """The base's checkpoint loads into the plugin, the plugin's into a plain base; both go on."""
    model, optimizer = pair(case)
    train(model, optimizer, range(2))
    with_surgery = through_a_file(optimizer.state_dict())
    plain = Reference(case, model=copy.deepcopy(model))
    plain.optimizer.load_state_dict(with_surgery)
    without = through_a_file(plain.optimizer.state_dict())
    without["param_groups"][0].pop("gradient_surgery", None)
    wrapped = copy.deepcopy(model)
    other = case.plugin(wrapped)
    other.load_state_dict(without)
    train(wrapped, other, range(2, 4))
    train(plain.model, plain, range(2, 4))
    assert_same_training((wrapped, other), (plain.model, plain.optimizer), whole=False)
    assert not torch.equal(wrapped.trunk.weight, model.trunk.weight)


@every_case
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_of_model_and_optimizer(case: Case, way: str) -> None:
    """A copy made together with the model goes on to the bit; it shares nothing with its origin."""
    model, optimizer = pair(case, seed=5)
    train(model, optimizer, range(2))
    if way == "deepcopy":
        other_model, other = copy.deepcopy((model, optimizer))
    else:
        other_model, other = pickle.loads(pickle.dumps((model, optimizer)))
    assert type(other) is AdaptiveGradientSurgery
    if not case.copies_step:
        with pytest.raises(AttributeError, match="_params"):
            copy.deepcopy(case.base(model.parameters())).step(lambda: torch.zeros(()))
        fresh = case.plugin(other_model)
        fresh.load_state_dict(other.state_dict())
        other = fresh
    assert repr(other.method) == repr(optimizer.method)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    expected = train(other_model, other, range(2, 4))
    assert_same((model.state_dict(), optimizer.state_dict()), before)
    assert train(model, optimizer, range(2, 4)) == expected
    assert_same_training((other_model, other), (model, optimizer))
    own = {id(p) for p in other_model.parameters()}
    assert {id(p) for group in other.param_groups for p in group["params"]} == own


@every_case
def test_repr_shows_method_and_base(case: Case) -> None:
    """Both names are there, and the base's own text."""
    model = case.model()
    base = case.base(model.parameters())
    text = repr(AdaptiveGradientSurgery(base, method=case.method))
    assert text.startswith("AdaptiveGradientSurgery(")
    assert repr(base) in text
    assert type(AdaptiveGradientSurgery(base, method=case.method).method).__name__ in text


@every_case
def test_a_closure_is_called_as_by_the_base(case: Case) -> None:
    """As often, with grad enabled, and what it returned comes back."""
    counts: list[int] = []
    values: list[Any] = []
    for wrapped in (True, False):
        model = case.model()
        plain: Any = Reference(case, model=model)
        stepper = case.plugin(model) if wrapped else plain
        calls: list[bool] = []

        def closure(stepper: Any = stepper, model: Any = model, calls: Any = calls) -> torch.Tensor:
            calls.append(torch.is_grad_enabled())
            stepper.zero_grad()
            losses = model.losses(batch(0))
            stepper.backward(losses)
            return torch.stack(list(losses.values())).sum().detach()

        with torch.no_grad():
            values.append(stepper.step(closure))
        assert all(calls)
        counts.append(len(calls))
    assert counts[0] == counts[1] >= 1
    assert_same(values[0], values[1])


def test_sparse_adam_takes_sparse_gradients_only() -> None:
    """Surgery refuses sparse gradients, and its dense ones are refused by SparseAdam itself."""
    layer = nn.Embedding(4, 3, sparse=True)
    optimizer = AdaptiveGradientSurgery(torch.optim.SparseAdam(layer.parameters()))
    out = layer(torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="sparse"):
        optimizer.backward([out.sum(), out.square().sum()])
    optimizer.backward([layer(torch.tensor([1])).sum()])
    before = layer.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, layer.weight)


def test_step_takes_closure_by_keyword_and_none() -> None:
    """Each way in which tools call step."""
    _, optimizer = pair(SGD)
    assert optimizer.step(closure=None) is None
    assert optimizer.step(closure=lambda: 3.0) == 3.0
    assert optimizer.step() is None
    with pytest.raises(TypeError, match="closure"):
        pair(LBFGS)[1].step()
    optimizer.load_state_dict(state_dict=optimizer.state_dict())


def test_nothing_mutable_lives_on_the_plugin_itself() -> None:
    """One inner object and the hooks: what copies of `__dict__` can share."""
    model, optimizer = pair(SGD)
    names = set(vars(optimizer))
    train(model, optimizer, range(2))
    assert set(vars(optimizer)) == names
    assert not names & {"_optimizer", "_strategy", "optimizer", "param_groups", "state"}


def test_a_shallow_copy_is_the_same_training() -> None:
    """copy.copy shares the base and the order stream, as of any optimizer."""
    model, optimizer = pair(ADAMW)
    other = copy.copy(optimizer)
    train(model, other, range(2))
    assert other.param_groups is optimizer.param_groups
    assert optimizer.last is other.last


def test_custom_optimizers_keep_what_they_have_beyond_torch() -> None:
    """Methods and attributes of the base's own class are reachable; dunder names are not."""

    class Own(torch.optim.SGD):
        flag = 3

        def train(self) -> str:
            """As of schedule-free optimizers."""
            return "train"

    model = SGD.model()
    optimizer: Any = AdaptiveGradientSurgery(Own(model.parameters(), lr=0.1))
    assert optimizer.train() == "train"
    assert optimizer.flag == 3
    assert not hasattr(optimizer, "__wrapped__")
    with pytest.raises(AttributeError, match="no_such_thing"):
        optimizer.no_such_thing  # noqa: B018


# ------------------------------------------------------------------ schedulers

Schedule = Callable[[torch.optim.Optimizer], Any]
S = lr_scheduler

SCHEDULERS: dict[str, Schedule] = {
    "LambdaLR": lambda o: S.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "MultiplicativeLR": lambda o: S.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: S.StepLR(o, 2),
    "MultiStepLR": lambda o: S.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: S.ConstantLR(o, total_iters=3),
    "LinearLR": lambda o: S.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o: S.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: S.PolynomialLR(o, total_iters=5),
    "CosineAnnealingLR": lambda o: S.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: S.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: S.CyclicLR(o, 0.001, 0.1, step_size_up=2),
    "OneCycleLR": lambda o: S.OneCycleLR(o, 0.1, total_steps=10),
    "ReduceLROnPlateau": lambda o: S.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: S.SequentialLR(
        o, [S.LinearLR(o, total_iters=2), S.ExponentialLR(o, 0.5)], [2]
    ),
    "ChainedScheduler": lambda o: S.ChainedScheduler(
        [S.ConstantLR(o, total_iters=2), S.ExponentialLR(o, 0.7)], optimizer=o
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.05, anneal_epochs=3),
}


def test_every_scheduler_of_torch_is_here() -> None:
    """A scheduler that torch adds shows up as a failure of this test."""
    known = {
        name
        for name, kind in vars(lr_scheduler).items()
        if inspect.isclass(kind) and issubclass(kind, lr_scheduler.LRScheduler)
    }
    assert set(SCHEDULERS) == known - {"LRScheduler", "_LRScheduler"} | {"SWALR"}


def trace(
    case: Case, schedule: Schedule, build: str
) -> tuple[list[tuple[Any, ...]], dict[str, Any]]:
    """(lr, momentum) after each of eight steps, and the final weights."""
    model = case.model()
    base = case.base(model.parameters())
    stepper: Any = Reference(case, model=model)
    stepper.optimizer = base
    if build == "plugin":
        stepper = AdaptiveGradientSurgery(base, method=case.method)
        scheduler = schedule(stepper)
    else:
        scheduler = schedule(base)
        if build == "base":
            stepper = AdaptiveGradientSurgery(base, method=case.method)
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if isinstance(scheduler, S.SequentialLR):
            # Its own, of torch: calls scheduler.step(epoch) at the milestone.
            warnings.filterwarnings("ignore", message="The epoch parameter", category=UserWarning)
        for index in range(8):
            train(model, stepper, range(index, index + 1))
            scheduler.step(*([1.0] if isinstance(scheduler, S.ReduceLROnPlateau) else []))
            group = base.param_groups[0]
            rows.append(tuple(group.get(key) for key in ("lr", "momentum", "betas")))
    return rows, model.state_dict()


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("case", [SGD, Case("AdamW")], ids=str)
@pytest.mark.parametrize("build", ["plugin", "base"])
def test_schedulers_give_the_same_rates(name: str, case: Case, build: str) -> None:
    """Built on the plugin, or on the base before wrapping: as on the plain base, no warning."""
    found = trace(case, SCHEDULERS[name], build)
    expected = trace(case, SCHEDULERS[name], "plain")
    assert found[0] == expected[0]
    assert len(set(expected[0])) > 1
    assert_same(found[1], expected[1])


def test_a_scheduler_still_warns_when_step_is_called_first() -> None:
    """The check for the order of calls works through the plugin, as on the plain base."""
    _, optimizer = pair(SGD)
    scheduler = S.StepLR(optimizer, 1)
    with pytest.warns(UserWarning, match=r"before `optimizer\.step\(\)`"):
        scheduler.step()


def test_a_scheduler_resumes() -> None:
    """Scheduler and plugin from files: the same rates and weights as without the break."""
    runs = []
    for broken in (False, True):
        model, optimizer = pair(ADAMW)
        scheduler: Any = S.OneCycleLR(optimizer, 0.1, total_steps=10)
        for index in range(6):
            if broken and index == 3:
                saved = through_a_file([model.state_dict(), optimizer.state_dict()])
                rates = copy.deepcopy(scheduler.state_dict())
                model, optimizer = pair(ADAMW)
                scheduler = S.OneCycleLR(optimizer, 0.1, total_steps=10)
                model.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
                scheduler.load_state_dict(rates)
            train(model, optimizer, range(index, index + 1))
            scheduler.step()
        runs.append((model, optimizer))
    assert_same_training(*runs)


# ------------------------------------------------------------------ hooks


@pytest.fixture
def handles() -> Iterator[list[Any]]:
    """Handles that are removed whatever happens: global hooks outlive a test otherwise."""
    made: list[Any] = []
    yield made
    for handle in made:
        handle.remove()


@few_cases
def test_step_hooks_fire_once_with_the_right_object(case: Case, handles: list[Any]) -> None:
    """On the plugin: the plugin; on the base and globally: the base; once for each step."""
    model = case.model()
    base = case.base(model.parameters())
    optimizer = AdaptiveGradientSurgery(base, method=case.method)
    seen: list[tuple[str, Any]] = []

    def note(label: str) -> Callable[..., None]:
        return lambda who, args, kwargs: seen.append((label, who))

    handles += [
        optimizer.register_step_pre_hook(note("plugin pre")),
        optimizer.register_step_post_hook(note("plugin post")),
        base.register_step_pre_hook(note("base pre")),
        base.register_step_post_hook(note("base post")),
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
    ]
    for _ in range(2):
        train(model, optimizer, range(1))
        labels = [label for label, _ in seen]
        assert sorted(labels) == sorted(
            f"{who} {when}" for who in ("plugin", "base", "global") for when in ("pre", "post")
        )
        assert all("pre" in label for label in labels[:3])
        assert all("post" in label for label in labels[3:])
        for label, who in seen:
            assert who is (optimizer if label.startswith("plugin") else base)
        seen.clear()
    for handle in handles:
        handle.remove()
    train(model, optimizer, range(1))
    assert seen == []


@pytest.mark.parametrize("how", ["none", "positional", "keyword"])
def test_step_hooks_see_the_arguments_that_torch_gives(how: str) -> None:
    """A hook reads `args` and `kwargs` as on any optimizer: args[0] is the optimizer itself."""

    def closure() -> float:
        return 1.0

    model = SGD.model()
    seen: list[Any] = []
    for optimizer in (SGD.base(model.parameters()), SGD.plugin(model)):
        for register in (optimizer.register_step_pre_hook, optimizer.register_step_post_hook):
            register(
                lambda who, args, kwargs: seen.append(
                    ([a if a is not who else "the optimizer" for a in args], dict(kwargs))
                )
            )
        if how == "none":
            optimizer.step()
        elif how == "positional":
            optimizer.step(closure)
        else:
            optimizer.step(closure=closure)
    assert seen[2:] == seen[:2]


@pytest.mark.parametrize("on", ["plugin", "base", "global"])
@pytest.mark.parametrize("how", ["positional", "keyword"])
def test_a_pre_hook_replaces_the_arguments(on: str, how: str, handles: list[Any]) -> None:
    """What a pre-hook returns is what the step gets, written once for any optimizer."""
    model = SGD.model()
    base = SGD.base(model.parameters())
    optimizer = AdaptiveGradientSurgery(base)

    def replace(who: Any, args: Any, kwargs: Any) -> Any:
        if how == "positional":
            return (args[0], lambda: "new"), {}
        return args[:1], {"closure": lambda: "new"}

    if on == "global":
        handles.append(register_optimizer_step_pre_hook(replace))
    else:
        (optimizer if on == "plugin" else base).register_step_pre_hook(replace)
    assert optimizer.step(lambda: "old") == "new"


def test_a_pre_hook_that_returns_nonsense_is_refused() -> None:
    """As on any optimizer: RuntimeError, before the step."""
    model, optimizer = pair(SGD)
    optimizer.backward(model.losses(batch(0)))
    optimizer.register_step_pre_hook(lambda who, args, kwargs: "nonsense")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="nonsense"):
        optimizer.step()
    assert_same(model.state_dict(), before)


def test_state_dict_hooks(handles: list[Any]) -> None:
    """Pre and post, prepend, a replaced dictionary, and removal, as on any optimizer."""
    model, optimizer = pair(SGD)
    train(model, optimizer, range(1))
    order: list[str] = []

    def before(label: str) -> Callable[[Any], None]:
        return lambda who: order.append(label) if who is optimizer else order.append("wrong")

    def after(label: str) -> Callable[[Any, Any], dict[str, Any]]:
        def hook(who: Any, state: dict[str, Any]) -> dict[str, Any]:
            order.append(label if who is optimizer and "param_groups" in state else "wrong")
            return {**state, label: True}

        return hook

    handles += [
        optimizer.register_state_dict_pre_hook(before("pre 2")),
        optimizer.register_state_dict_pre_hook(before("pre 1"), prepend=True),
        optimizer.register_state_dict_post_hook(after("post 2")),
        optimizer.register_state_dict_post_hook(after("post 1"), prepend=True),
    ]
    state = optimizer.state_dict()
    assert order == ["pre 1", "pre 2", "post 1", "post 2"]
    assert list(state)[-2:] == ["post 1", "post 2"]
    for handle in handles:
        handle.remove()
    assert "post 1" not in optimizer.state_dict()
    assert len(order) == 4


def test_load_state_dict_hooks(handles: list[Any]) -> None:
    """Pre and post, prepend, a replaced dictionary, and removal, as on any optimizer."""
    model, optimizer = pair(SGD)
    train(model, optimizer, range(1))
    saved = optimizer.state_dict()
    order: list[str] = []

    def before(label: str, rate: float) -> Callable[[Any, Any], dict[str, Any]]:
        def hook(who: Any, state: dict[str, Any]) -> dict[str, Any]:
            order.append(label if who is optimizer else "wrong")
            groups = [{**group, "lr": rate} for group in state["param_groups"]]
            return {**state, "param_groups": groups}

        return hook

    def after(label: str) -> Callable[[Any], None]:
        return lambda who: order.append(f"{label} {who.param_groups[0]['lr']}")

    handles += [
        optimizer.register_load_state_dict_pre_hook(before("pre 2", 0.5)),
        optimizer.register_load_state_dict_pre_hook(before("pre 1", 0.25), prepend=True),
        optimizer.register_load_state_dict_post_hook(after("post 2")),
        optimizer.register_load_state_dict_post_hook(after("post 1"), prepend=True),
    ]
    optimizer.load_state_dict(saved)
    assert order == ["pre 1", "pre 2", "post 1 0.5", "post 2 0.5"]
    assert saved["param_groups"][0]["lr"] == 0.01
    for handle in handles:
        handle.remove()
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert len(order) == 4


def test_a_load_pre_hook_may_write_into_the_copy_it_gets() -> None:
    """The hook gets a shallow copy: new top-level keys do not reach the caller's dictionary."""
    _, optimizer = pair(SGD)
    optimizer.register_load_state_dict_pre_hook(lambda who, state: state.update(mark=1))
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert "mark" not in saved


def test_the_bases_own_state_dict_hooks_fire_too() -> None:
    """Hooks registered on the base before wrapping fire once for each call on the plugin."""
    model = SGD.model()
    base = SGD.base(model.parameters())
    seen: list[str] = []
    base.register_state_dict_post_hook(lambda who, state: seen.append("save"))
    base.register_load_state_dict_post_hook(lambda who: seen.append("load"))
    optimizer = AdaptiveGradientSurgery(base)
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["save", "load"]


def test_hooks_stay_behind_in_copies() -> None:
    """As on torch's own optimizers: a deepcopy and a pickle come without hooks."""
    model, optimizer = pair(SGD)
    seen: list[int] = []
    optimizer.register_step_pre_hook(lambda who, args, kwargs: seen.append(1))
    copy.deepcopy((model, optimizer))[1].step()
    assert seen == []
    optimizer.step()
    assert seen == [1]


def test_loading_drops_micro_batches_that_wait() -> None:
    """A load replaces everything that shapes the next step, from either kind of checkpoint."""
    for plain in (False, True):
        model, optimizer = pair(SGD)
        other = pair(SGD)[1]
        saved = SGD.base(model.parameters()).state_dict() if plain else other.state_dict()
        optimizer.backward(model.losses(batch(0)), accumulate=True)
        optimizer.load_state_dict(saved)
        optimizer.backward(model.losses(batch(1)))
        expected_model, expected = pair(SGD)
        expected.backward(expected_model.losses(batch(1)))
        assert optimizer.last is not None
        assert expected.last is not None
        assert_same(optimizer.last.gram, expected.last.gram, f"plain checkpoint: {plain}")


def test_the_optimizer_is_collected_with_its_model() -> None:
    """No registry keeps a plugin, its model or its buffers alive."""
    import gc
    import weakref

    model, optimizer = pair(SGD)
    train(model, optimizer, range(2))
    watched = [weakref.ref(model), weakref.ref(optimizer), weakref.ref(model.trunk.weight)]
    del model, optimizer
    gc.collect()
    assert [watch() for watch in watched] == [None] * 3


def test_contract_is_what_it_says() -> None:
    """`assert_same` itself can fail."""
    with pytest.raises(AssertionError):
        contract.assert_same({"a": [torch.ones(2)]}, {"a": [torch.tensor([1.0, 2.0])]})
    with pytest.raises(AssertionError):
        contract.assert_same({"a": 1}, {"a": 1, "b": 2})
