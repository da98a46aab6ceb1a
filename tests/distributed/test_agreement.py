"""What differs between ranks: seen by all of them, with one message, and nobody hangs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launch import Processes
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from training import Network, Setting, attempt, batches, full, make, wrap

from gradsurgery import AdaptiveGradientSurgery


def gradients(network: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in network.parameters()]


def same(left: list[Tensor | None], right: list[Tensor | None]) -> bool:
    return all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(left, right, strict=True)
    )


# ------------------------------------------------------------------ legitimate differences


def without_samples(how: str) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Rank 1 has no samples of task 1: with None, and with a loss of zero on its graph."""
    results = []
    for absent in (True, False):
        network, model, optimizer = make(Setting(how))
        losses: list[Tensor | None] = list(model(batches(1)[0]))
        if dist.get_rank() == 1:
            losses[1] = None if absent else losses[1] * 0
        optimizer.backward(losses)
        results.append(gradients(network))
    return results[0], results[1]


@pytest.mark.parametrize("how", ["bare", "ddp", "ddp find_unused"])
def test_a_rank_without_samples_of_a_task(two: Processes, how: str) -> None:
    answers = two(without_samples, how)
    for with_none, with_zero in answers:
        assert same(with_none, with_zero)
        assert same(with_none, answers[0][0])


def all_without(tasks: list[int]) -> list[bool]:
    network, model, optimizer = make(Setting())
    losses: list[Tensor | None] = list(model(batches(1)[0]))
    for task in tasks:
        losses[task] = None
    optimizer.backward(losses)
    return [p.grad is None for p in network.heads[tasks[0]].parameters()]


def test_a_task_without_samples_on_any_rank_leaves_its_head_alone(two: Processes) -> None:
    assert two(all_without, [1]) == [[True, True]] * 2


def from_losses_of_nothing() -> tuple[str, list[bool]]:
    network, _, optimizer = make(Setting(method="from_losses"))
    x = torch.ones(3, requires_grad=True)
    error = attempt(lambda: optimizer.backward([x.sum(), x.square().sum()]))
    return error, [p.grad is None for p in network.parameters()]


def test_weights_from_losses_that_reach_no_parameter(two: Processes) -> None:
    for error, untouched in two(from_losses_of_nothing):
        # A warning, which is an error in these processes.
        assert "reach none of the parameters" in error
        assert all(untouched)


def each_its_own_branch() -> tuple[list[Tensor | None], list[bool]]:
    """Rank r uses branch r alone; a branch is reached by both tasks on that rank."""
    torch.manual_seed(0)
    branches = nn.ModuleList(nn.Linear(3, 2) for _ in range(3))
    optimizer = AdaptiveGradientSurgery(
        torch.optim.SGD(branches.parameters(), lr=0.1), process_group=dist.group.WORLD
    )
    out = branches[dist.get_rank()](torch.ones(1, 3))
    optimizer.backward([out[0, 0], out.square().sum()])
    return gradients(branches), [p.grad is None for p in branches.parameters()]


def test_other_parameters_reached_on_every_rank(two: Processes) -> None:
    first, second = two(each_its_own_branch)
    assert same(first[0], second[0])
    assert first[1] == [False, False, False, False, True, True]


def not_finite(value: float, how: str) -> tuple[list[bool], list[bool], float]:
    """Rank 1's second task is not finite; a GradScaler then leaves the parameters alone."""
    network, model, optimizer = make(Setting(how))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = full(network.parameters())
    losses = list(model(batches(1)[0]))
    if dist.get_rank() == 1:
        losses[1] = losses[1] * value
    optimizer.backward(scaler.scale(losses))
    finite = [bool(p.grad.isfinite().all()) for p in network.first.parameters()]
    scaler.step(optimizer)
    scaler.update()
    kept = [torch.equal(before, full(network.parameters()))]
    return finite, kept, scaler.get_scale()


@pytest.mark.parametrize("how", ["bare", "ddp"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_all_ranks_see_what_is_not_finite_on_one(two: Processes, value: float, how: str) -> None:
    assert two(not_finite, value, how) == [([False, False], [True], 2.0)] * 2


def adds_to_what_is_there() -> list[bool]:
    network, model, optimizer = make(Setting("ddp"))
    optimizer.backward(model(batches(1)[0]))
    once = gradients(network)
    kept = [p.grad for p in network.parameters()]
    optimizer.backward(model(batches(1)[0]))
    return [
        a is None if a is None else bool(p.grad is k and torch.equal(p.grad, 2 * a))
        for a, k, p in zip(once, kept, network.parameters(), strict=True)
    ]


def test_a_gradient_that_is_there_is_added_to(two: Processes) -> None:
    for answers in two(adds_to_what_is_there):
        assert all(answers)


def hooks_and_inputs() -> tuple[int, int, bool, bool]:
    network, model, optimizer = make(Setting("ddp"))
    calls = {"tensor": 0, "after": 0}

    def double(gradient: Tensor) -> Tensor:
        calls["tensor"] += 1
        return 2 * gradient

    def after(parameter: Tensor) -> None:
        calls["after"] += 1
        parameter.grad = parameter.grad / 2

    optimizer.backward(model(batches(1)[0]))
    plain = gradients(network)
    optimizer.zero_grad()
    network.second.weight.register_hook(double)
    network.second.weight.register_post_accumulate_grad_hook(after)
    x = batches(1)[0].requires_grad_()
    optimizer.backward(model(x))
    # An input is this rank's own: its gradient is the plain local sum.
    expected = torch.autograd.grad(sum(network(x)), x)[0]
    close = torch.allclose(x.grad, expected, atol=1e-6)
    return calls["tensor"], calls["after"], close, same(plain, gradients(network))


def test_hooks_run_once_a_task_and_inputs_keep_their_gradient(two: Processes) -> None:
    assert two(hooks_and_inputs) == [(3, 3, True, True)] * 2


class Doubled(torch.autograd.Function):
    """A node written in Python, as gathering samples over ranks is; it hides nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


def python_nodes() -> tuple[int, bool]:
    """Parameters with rows, and whether p.grad is as without the node."""
    found = []
    for through in (Doubled.apply, lambda x: 2 * x):
        network, _, optimizer = make(Setting())
        losses = [through(loss) for loss in network(batches(1)[0])]
        optimizer.backward(losses)
        found.append(gradients(network))
    return len(optimizer._surgery._source.held()), same(*found)


def test_heads_have_no_rows_behind_a_node_written_in_python(two: Processes) -> None:
    # Of the 14 parameters the six of the trunk; the heads are averaged, the unused layer is not.
    assert two(python_nodes) == [(6, True)] * 2


def buffers() -> tuple[Tensor, Tensor]:
    """Running means under DistributedDataParallel, which sends rank 0's at each forward."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(7, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model, group = wrap(network, "ddp")
    optimizer = AdaptiveGradientSurgery(
        torch.optim.SGD(model.parameters(), lr=0.1), process_group=group
    )
    for batch in batches(3):
        optimizer.zero_grad()
        out = model(batch)
        optimizer.backward([out[:, 0].mean(), out.square().mean()])
        optimizer.step()
    with torch.no_grad():
        model(batches(1)[0])
    return network[1].running_mean.clone(), full(network.parameters())


def test_buffers_stay_in_sync(two: Processes) -> None:
    (first, parameters), (second, others) = two(buffers)
    assert torch.equal(parameters, others)
    # Sent before the last forward, which then adds a tenth of each rank's own mean.
    assert (first - second).abs().max() < 0.2


# ------------------------------------------------------------------ refused, by all ranks


def refused(what: str) -> tuple[str, bool, bool]:
    """One rank's mistake: the message here, whether p.grad is as before, and the next call."""
    rank = dist.get_rank()
    how = "fully_shard root" if what.startswith("sharded") else "bare"
    network, model, optimizer = make(Setting(how), seed=rank if what.endswith("seed") else 0)
    losses: list[Tensor] = list(model(batches(1)[0]))
    call: dict[str, bool] = {}
    if what.endswith("fewer losses") and rank == 1:
        losses.pop()
    elif what.endswith("no scalar") and rank == 1:
        losses[1] = losses[1][None]
    elif what == "no scalar, other parameters" and rank == 1:
        losses[1] = losses[1][None]
        network.first.weight.requires_grad_(False)
    elif what.endswith("accumulate"):
        call["accumulate"] = rank == 1
    elif what == "raises" and rank == 1:
        losses[1].register_hook(lambda gradient: 1 / 0)
    before = gradients(network)
    message = attempt(lambda: optimizer.backward(losses, **call))
    untouched = same(before, gradients(network))
    if what.endswith("seed"):
        return message, untouched, True
    network.first.weight.requires_grad_(True)
    again = attempt(lambda: optimizer.backward(model(batches(1)[0])))
    return message, untouched, again == "no error"


REFUSED = {
    "seed": ("the seed or state of the task order must be the same on all ranks",) * 2,
    "fewer losses": ("losses must be the same on all ranks; rank 0 has",) * 2,
    "no scalar": ("rank 1: ValueError: losses['task_1'] must be a scalar", "must be a scalar"),
    "no scalar, other parameters": ("rank 1: ValueError: losses['task_1']", "must be a scalar"),
    "accumulate": ("accumulate must be the same on all ranks; rank 0 has False, rank 1",) * 2,
    "raises": ("rank 1: ZeroDivisionError", "ZeroDivisionError: division by zero"),
}


@pytest.mark.parametrize(
    ("what", "sharded"),
    # With fully_shard its own collectives wait for a rank whose backward failed.
    [
        *((what, "") for what in REFUSED),
        *((what, "sharded ") for what in ("seed", "fewer losses", "no scalar", "accumulate")),
    ],
)
def test_a_mistake_on_one_rank_is_an_error_on_all(two: Processes, what: str, sharded: str) -> None:
    answers = two(refused, sharded + what)
    for expected, (message, untouched, works_again) in zip(REFUSED[what], answers, strict=True):
        assert expected in message
        assert untouched
        assert works_again


def parameters_differ(how: str) -> str:
    rank = dist.get_rank()
    network = Network(seed=rank if how == "values" else 0)
    parameters = list(network.parameters())
    if how == "order" and rank:
        parameters.reverse()
    elif how == "values in order" and rank:
        # Two of one shape change places: only the values can tell.
        a, b = [i for i, p in enumerate(parameters) if list(p.shape) == [13]][:2]
        parameters[a], parameters[b] = parameters[b], parameters[a]
    elif how == "frozen" and rank:
        network.first.weight.requires_grad_(False)
    optimizer = AdaptiveGradientSurgery(
        torch.optim.SGD(parameters, lr=0.1), process_group=dist.group.WORLD
    )
    losses = network(batches(1)[0])
    first = attempt(lambda: optimizer.backward(losses, retain_graph=True))
    return first if first == attempt(lambda: optimizer.backward(losses)) else "forgotten"


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("order", "parameters must be the same on all ranks, in the same order; rank 0 has"),
        ("values", "differs between rank 0 and rank 1"),
        ("values in order", "differs between rank 0 and rank 1"),
        ("frozen", "parameters must be the same on all ranks"),
    ],
)
def test_other_parameters_are_refused(two: Processes, how: str, expected: str) -> None:
    for message in two(parameters_differ, how):
        assert message.startswith("ValueError")
        assert expected in message


class Inside(torch.autograd.Function):
    """A node that runs a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        with torch.enable_grad():
            ctx.weight.sum().backward()
        return gradient, None


def unsuitable(what: str) -> str:
    network = Network()
    parameters = list(network.parameters())
    losses = network(batches(1)[0])
    group = dist.group.WORLD
    if what == "a stranger's parameter":
        parameters = parameters[2:]
    elif what == "reentrant":
        from torch.utils.checkpoint import checkpoint

        x = batches(1)[0].requires_grad_()
        losses = [loss + checkpoint(network.first, x, use_reentrant=True).sum() for loss in losses]
    elif what == "backward inside":
        losses = [Inside.apply(loss, network.unused.weight) for loss in losses]
    elif what == "mixed precision":
        # DistributedDataParallel's own leaves this mark; it needs streams, which a CPU has not.
        network.first.weight._mp_param = network.first.weight.to(torch.bfloat16)
    elif what == "sparse":
        table = nn.Embedding(4, 7, sparse=True)
        with torch.no_grad():
            table.weight.fill_(1.0)
        parameters.append(table.weight)
        losses = network(table(torch.tensor([1, 2])))
    elif what == "wrapped, no group":
        losses = DistributedDataParallel(network)(batches(1)[0])
        group = None
    elif what.startswith("older sharding"):
        sharded = FullyShardedDataParallel(
            network, use_orig_params="original" in what, device_id=torch.device("cpu")
        )
        parameters, losses = list(sharded.parameters()), sharded(batches(1)[0])
        group = None if what.endswith("no group") else group
    elif what == "pickle":
        import pickle

        optimizer = AdaptiveGradientSurgery(
            torch.optim.SGD(parameters, lr=0.1), process_group=group
        )
        return attempt(lambda: pickle.dumps(optimizer))
    optimizer = AdaptiveGradientSurgery(torch.optim.SGD(parameters, lr=0.1), process_group=group)
    return attempt(lambda: optimizer.backward(losses))


UNSUITABLE = {
    "a stranger's parameter": "ValueError: losses reach a parameter of shape [13",
    "reentrant": "use_reentrant=False",
    "backward inside": "ran a backward of its own",
    "mixed precision": "use torch.autocast",
    "sparse": "sparse gradient",
    "wrapped, no group": "pass process_group=torch.distributed.group.WORLD",
    "older sharding": "use torch.distributed.fsdp.fully_shard",
    "older sharding, no group": "use torch.distributed.fsdp.fully_shard",
    "older sharding of original parameters": "use torch.distributed.fsdp.fully_shard",
    "pickle": "save its state_dict()",
}


@pytest.mark.parametrize("what", UNSUITABLE)
def test_what_would_be_silently_wrong_is_refused(two: Processes, what: str) -> None:
    for message in two(unsuitable, what):
        assert UNSUITABLE[what] in message


def without_a_group() -> list[str]:
    """A bare module and no process_group: one warning, at the first call."""
    import warnings

    _, model, _ = make(Setting())
    optimizer = AdaptiveGradientSurgery(torch.optim.SGD(model.parameters(), lr=0.1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batch in batches(2):
            optimizer.backward(model(batch))
    return [f"{Path(w.filename).name}: {w.message}" for w in caught]


def test_one_warning_without_a_group(two: Processes) -> None:
    for messages in two(without_a_group):
        assert len(messages) == 1
        assert messages[0].startswith("test_agreement.py: torch.distributed runs 2 processes")
        assert "process_group=torch.distributed.group.WORLD" in messages[0]
