"""Fewer backward passes: `every=k`, methods that need no gradients, surgery at features."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradsurgery import AdaptiveGradientSurgery
from gradsurgery.methods import Method

# Sums of the same float64 terms in another order.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


class Net(nn.Module):
    """A trunk, a layer that two of three heads share, a head each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh())
        self.between = nn.Linear(6, 6)
        self.heads = nn.ModuleList(nn.Linear(6, 1) for _ in range(3))
        self.double()

    def features(self, index: int) -> Tensor:
        return self.trunk(inputs(index))

    def losses(self, z: Tensor, *, between: bool = False) -> dict[str, Tensor]:
        middle = self.between(z).tanh() if between else z
        a, b, c = self.heads[0](middle), self.heads[1](middle), self.heads[2](z)
        return {"a": (a - 1).square().mean(), "b": (b + 2).square().mean(), "c": 3 * c.mean()}


def inputs(index: int) -> Tensor:
    generator = torch.Generator().manual_seed(index)
    return torch.randn(5, 4, generator=generator, dtype=torch.float64)


def plugin(model: nn.Module, **arguments: Any) -> AdaptiveGradientSurgery:
    return AdaptiveGradientSurgery(torch.optim.SGD(model.parameters(), lr=0.1), **arguments)


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {
        name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
    }


def weighted(
    model: nn.Module, losses: dict[str, Tensor], weights: Tensor, *, scope: str = "shared"
) -> dict[str, Tensor | None]:
    """Σ_t w_t g_t one loss at a time; with scope="shared" a head keeps its plain gradient."""
    found = {}
    each = [
        torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
        for loss in losses.values()
    ]
    for index, (name, _) in enumerate(model.named_parameters()):
        terms = [(w, g[index]) for w, g in zip(weights, each, strict=True) if g[index] is not None]
        if scope == "shared" and len(terms) == 1:
            found[name] = terms[0][1]
        else:
            found[name] = sum(w * g for w, g in terms) if terms else None
    return found


def assert_gradients(
    found: dict[str, Tensor | None], wanted: dict[str, Tensor | None], **close: float
) -> None:
    for name, value in wanted.items():
        if value is None:
            assert found[name] is None, name
        else:
            torch.testing.assert_close(found[name], value, **(close or CLOSE), msg=name)


class FromLosses(Method):
    """w_t = the share of loss t; counts how often it was asked."""

    name: ClassVar[str] = "from_losses"
    reads_gram: ClassVar[bool] = False
    reads_losses: ClassVar[bool] = True
    known_beforehand: ClassVar[bool] = True

    def __init__(self) -> None:
        self._asked = 0
        self._seen: list[Tensor] = []

    def solve(
        self,
        gram: Tensor,
        losses: Tensor | None,
        generator: torch.Generator | None,
        relative_error: float,
    ) -> Tensor:
        assert losses is not None
        self._asked += 1
        self._seen = [*self._seen, losses]
        return losses.abs() / losses.abs().sum()


def passes(run: Callable[[], object], model: nn.Module) -> int:
    """How often autograd goes through the trunk."""
    calls: list[int] = []
    handle = model.trunk[0].weight.register_hook(lambda gradient: calls.append(1))
    run()
    handle.remove()
    return len(calls)


# ------------------------------------------------------------------ every=k


@pytest.mark.parametrize("scope", ["shared", "all"])
@pytest.mark.parametrize("method", ["ags", "pcgrad", "gradvac"])
def test_between_solves_the_gradient_is_that_of_the_kept_weights(method: str, scope: str) -> None:
    model = Net()
    optimizer = plugin(model, method=method, every=3, scope=scope)
    solved = []
    for step in range(7):
        optimizer.zero_grad()
        losses = model.losses(model.features(step), between=True)
        expected = 3 if step % 3 == 0 else 1
        found = passes(lambda losses=losses: optimizer.backward(losses, retain_graph=True), model)
        assert found == expected
        assert optimizer.last is not None
        if step % 3 == 0:
            solved.append(optimizer.last)
        assert optimizer.last is solved[-1]
        wanted = weighted(model, losses, solved[-1].weights, scope=scope)
        assert_gradients(gradients(model), wanted)
        optimizer.step()
    assert len({tuple(report.weights.tolist()) for report in solved}) == 3


def test_every_1_solves_at_every_call() -> None:
    model = Net()
    optimizer = plugin(model)
    for step in range(3):
        losses = model.losses(model.features(step))
        assert passes(lambda losses=losses: optimizer.backward(losses), model) == 3
    assert optimizer.state_dict()["param_groups"][0]["gradient_surgery"]["kept"] == ""


def test_every_resumes_to_the_bit() -> None:
    """Through a file, between two solves; and the twin of another `every` starts anew."""

    def train(model: Net, optimizer: Any, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            optimizer.backward(model.losses(model.features(step)))
            optimizer.step()

    model = Net()
    optimizer = plugin(model, every=4, method="gradvac", seed=3)
    train(model, optimizer, range(6))
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    twin = Net()
    other = plugin(twin, every=4, method="gradvac")
    twin.load_state_dict(weights)
    other.load_state_dict(state)
    for trained, stepper in ((model, optimizer), (twin, other)):
        train(trained, stepper, range(6, 11))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_other_tasks_are_solved_at_once() -> None:
    model = Net()
    optimizer = plugin(model, every=100)
    losses = model.losses(model.features(0))
    optimizer.backward(losses)
    fewer = model.losses(model.features(1))
    del fewer["c"]
    assert passes(lambda: optimizer.backward(fewer), model) == 2
    assert optimizer.last is not None
    assert optimizer.last.names == ("a", "b")


def test_weights_that_are_not_finite_are_not_kept() -> None:
    """GradScaler skips the step; those between it and the next solve take the weights before."""
    model = Net()
    optimizer = plugin(model, every=2)
    bad = model.losses(model.features(0))
    bad["a"] = bad["a"] * torch.inf
    optimizer.backward(bad)
    assert not all(p.grad.isfinite().all() for p in model.trunk.parameters())
    optimizer.zero_grad()
    losses = model.losses(model.features(1))
    optimizer.backward(losses, retain_graph=True)
    wanted = weighted(model, losses, torch.ones(3, dtype=torch.float64))
    assert_gradients(gradients(model), wanted)


def test_a_failed_call_does_not_count() -> None:
    model = Net()
    optimizer = plugin(model, every=2)
    optimizer.backward(model.losses(model.features(0)))

    def fail(gradient: Tensor) -> None:
        raise RuntimeError("on purpose")

    handle = model.trunk[0].weight.register_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        optimizer.backward(model.losses(model.features(1)))
    handle.remove()
    losses = model.losses(model.features(1))
    assert passes(lambda: optimizer.backward(losses), model) == 1
    losses = model.losses(model.features(2))
    assert passes(lambda: optimizer.backward(losses), model) == 3


def test_micro_batches_of_a_kept_step_add_up() -> None:
    model = Net()
    optimizer = plugin(model, every=2)
    optimizer.backward(model.losses(model.features(0)))
    optimizer.zero_grad()
    wanted: list[dict[str, Tensor | None]] = []
    assert optimizer.last is not None
    weights = optimizer.last.weights
    for index, more in ((1, True), (2, False)):
        losses = model.losses(model.features(index))
        optimizer.backward(losses, accumulate=more, retain_graph=True)
        wanted.append(weighted(model, losses, weights))
    total = {k: None if v is None else v + wanted[1][k] for k, v in wanted[0].items()}
    assert_gradients(gradients(model), total)
    losses = model.losses(model.features(3))
    assert passes(lambda: optimizer.backward(losses), model) == 3


def test_a_gradient_that_was_there_is_added_to() -> None:
    model = Net()
    optimizer = plugin(model, every=2)
    optimizer.backward(model.losses(model.features(0)))
    before = gradients(model)
    losses = model.losses(model.features(1))
    optimizer.backward(losses, retain_graph=True)
    assert optimizer.last is not None
    new = weighted(model, losses, optimizer.last.weights)
    total = {k: v if new[k] is None else v + new[k] for k, v in before.items() if v is not None}
    assert_gradients(gradients(model), total)


def test_a_head_that_the_graph_hides_keeps_its_plain_gradient() -> None:
    """Reentrant checkpointing: who reaches what shows only afterwards: each task has its pass."""
    model = Net()
    optimizer = plugin(model, every=2)
    for step in range(2):
        optimizer.zero_grad()
        z = model.features(step)
        losses = {
            str(t): checkpoint(lambda x, h=head: h(x).square().mean(), z, use_reentrant=True)
            for t, head in enumerate(model.heads)
        }
        optimizer.backward(losses)
    assert optimizer.last is not None
    weights = optimizer.last.weights
    z = model.features(1)
    plain = {str(t): head(z).square().mean() for t, head in enumerate(model.heads)}
    assert_gradients(gradients(model), weighted(model, plain, weights))


def test_other_optimizers_get_the_plain_sum() -> None:
    """Parameters of another optimizer as from sum(losses).backward(), whoever wraps that one."""
    model = Net()
    optimizer = AdaptiveGradientSurgery(
        torch.optim.SGD([*model.trunk[2].parameters(), *model.heads.parameters()], lr=0.1), every=2
    )
    other = AdaptiveGradientSurgery(torch.optim.SGD(model.between.parameters(), lr=0.1))
    for step in range(2):
        model.zero_grad()
        losses = model.losses(model.features(step), between=True)
        optimizer.backward(losses, retain_graph=True)
    assert optimizer.last is not None
    ones = weighted(model, losses, torch.ones(3))
    ours = weighted(model, losses, optimizer.last.weights)
    for name, p in model.named_parameters():
        wanted = ones[name] if name.startswith(("trunk.0", "between")) else ours[name]
        torch.testing.assert_close(p.grad, wanted, **CLOSE)
    assert other.last is None


def test_every_needs_one_gram_matrix() -> None:
    with pytest.raises(ValueError, match="granularity='model'"):
        plugin(Net(), every=2, granularity="group")


# ------------------------------------------------- methods that need no gradients


@pytest.mark.parametrize("scope", ["shared", "all"])
def test_weights_from_losses_cost_one_backward(scope: str) -> None:
    model = Net()
    optimizer = plugin(model, method=FromLosses(), scope=scope)
    losses = model.losses(model.features(0), between=True)
    assert passes(lambda: optimizer.backward(losses, retain_graph=True), model) == 1
    values = torch.stack(list(losses.values())).detach()
    shares = values.abs() / values.abs().sum()
    assert_gradients(gradients(model), weighted(model, losses, shares, scope=scope))
    report = optimizer.last
    assert report is not None
    assert report.names == ("a", "b", "c")
    assert report.gram.isnan().all()
    torch.testing.assert_close(report.weights, shares, **CLOSE)
    assert not optimizer._surgery._source.rows.buffers


def test_micro_batches_share_the_first_ones_weights() -> None:
    model, method = Net(), FromLosses()
    optimizer = plugin(model, method=method)
    wanted = []
    for index, more in ((1, True), (2, True), (3, False)):
        losses = model.losses(model.features(index))
        optimizer.backward(losses, accumulate=more, retain_graph=True)
        assert optimizer.last is not None
        wanted.append(weighted(model, losses, optimizer.last.weights))
    assert method._asked == 1
    total = {
        k: None if v is None else v + wanted[1][k] + wanted[2][k] for k, v in wanted[0].items()
    }
    assert_gradients(gradients(model), total)


def test_hidden_heads_under_weights_from_losses() -> None:
    """With rows, as the graph does not show the heads; the first micro-batch's losses decide."""
    model, method = Net(), FromLosses()
    optimizer = plugin(model, method=method)
    plain = []
    for index, more in ((0, True), (1, False)):
        z = model.features(index)
        losses = {
            str(t): checkpoint(lambda x, h=head: h(x).square().mean(), z, use_reentrant=True)
            for t, head in enumerate(model.heads)
        }
        optimizer.backward(losses, accumulate=more)
        z = model.features(index)
        plain.append({str(t): head(z).square().mean() for t, head in enumerate(model.heads)})
    values = torch.stack(list(plain[0].values())).detach()
    assert method._asked == 1
    torch.testing.assert_close(method._seen[0], values, **CLOSE)
    both = {key: plain[0][key] + plain[1][key] for key in plain[0]}
    assert_gradients(gradients(model), weighted(model, both, values / values.sum()))


def test_an_error_takes_the_method_back() -> None:
    model, method = Net(), FromLosses()
    optimizer = plugin(model, method=method)

    def fail(gradient: Tensor) -> None:
        raise RuntimeError("on purpose")

    model.trunk[0].weight.register_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        optimizer.backward(model.losses(model.features(0)))
    assert method._asked == 0
    assert optimizer.last is None
    assert all(p.grad is None for p in model.parameters())


# ------------------------------------------------------------------ features


@pytest.mark.parametrize("scope", ["shared", "all"])
@pytest.mark.parametrize("method", ["ags", "pcgrad"])
def test_features_give_one_trunk_pass_and_the_weights_of_their_gram_matrix(
    method: str, scope: str
) -> None:
    model = Net()
    optimizer = plugin(model, method=method, scope=scope)
    z = model.features(0)
    losses = model.losses(z)
    run = lambda: optimizer.backward(losses, features=z, retain_graph=True)  # noqa: E731
    assert passes(run, model) == 1
    report = optimizer.last
    assert report is not None
    rows = torch.stack(
        [torch.autograd.grad(loss, z, retain_graph=True)[0].flatten() for loss in losses.values()]
    )
    torch.testing.assert_close(report.gram, rows @ rows.T, **CLOSE)
    assert int(report.conflicts) > 0
    assert_gradients(gradients(model), weighted(model, losses, report.weights, scope=scope))


def test_features_equal_the_full_surgery_where_the_trunk_keeps_angles() -> None:
    """A trunk that is one orthogonal map of a batch of one: M is the same up to a factor."""
    torch.manual_seed(0)
    trunk = nn.Linear(6, 6, bias=False).double()
    nn.init.orthogonal_(trunk.weight)
    heads = nn.ModuleList(nn.Linear(6, 1).double() for _ in range(3))
    model = nn.ModuleDict({"trunk": trunk, "heads": heads})
    x = torch.randn(1, 6, dtype=torch.float64)
    found = []
    for with_features in (False, True):
        model.zero_grad()
        optimizer = plugin(model, seed=5)
        z = trunk(x)
        losses = [(-1) ** t * (t + 1) * head(z).sum() for t, head in enumerate(heads)]
        optimizer.backward(losses, features=z if with_features else None)
        found.append(gradients(model))
    assert_gradients(found[1], found[0])


def test_several_features_and_one_that_a_single_task_uses() -> None:
    model = Net()
    optimizer = plugin(model, method="pcgrad")
    x = inputs(0)
    shallow = model.trunk[:2](x)
    deep = model.trunk[2:](shallow.detach().requires_grad_())
    losses = {
        "a": (model.heads[0](deep) - 1).square().mean() + shallow.square().mean(),
        "b": (model.heads[1](deep) + 2).square().mean(),
    }
    optimizer.backward(losses, features=[deep, shallow], retain_graph=True)
    report = optimizer.last
    assert report is not None
    rows = [torch.autograd.grad(loss, deep, retain_graph=True)[0] for loss in losses.values()]
    expected = torch.tensor([[(a * b).sum() for b in rows] for a in rows])
    torch.testing.assert_close(report.gram, expected, **CLOSE)
    assert_gradients(gradients(model), weighted(model, losses, report.weights))


def test_shared_parameters_beside_features_get_the_weights() -> None:
    model = Net()
    optimizer = plugin(model)
    z = model.features(0)
    losses = model.losses(z, between=True)
    optimizer.backward(losses, features=z, retain_graph=True)
    assert optimizer.last is not None
    assert_gradients(gradients(model), weighted(model, losses, optimizer.last.weights))


def test_features_with_every_and_with_weights_from_losses() -> None:
    model = Net()
    optimizer = plugin(model, every=2)
    for step in range(3):
        optimizer.zero_grad()
        z = model.features(step)
        losses = model.losses(z)
        optimizer.backward(losses, features=z, retain_graph=True)
        assert optimizer.last is not None
        assert_gradients(gradients(model), weighted(model, losses, optimizer.last.weights))
    optimizer = plugin(model, method=FromLosses())
    optimizer.zero_grad()
    z = model.features(9)
    losses = model.losses(z)
    optimizer.backward(losses, features=z, retain_graph=True)
    assert optimizer.last is not None
    assert_gradients(gradients(model), weighted(model, losses, optimizer.last.weights))


def test_hooks_see_a_heads_gradient_and_graphs_are_freed() -> None:
    model = Net()
    optimizer = plugin(model)
    seen: list[Tensor] = []
    bias = model.heads[0].bias
    bias.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    z = model.features(0)
    losses = model.losses(z)
    optimizer.backward(losses, features=z)
    assert len(seen) == 1
    assert torch.equal(seen[0], bias.grad)
    with pytest.raises(RuntimeError, match="second time"):
        losses["a"].backward()


def _other(model: Net) -> Any:
    return model.features(7)


WRONG_FEATURES: dict[str, tuple[Callable[[Net, Tensor], Any], type[Exception], str]] = {
    "a number": (lambda model, z: 3, TypeError, "int"),
    "a string": (lambda model, z: "z", TypeError, "str"),
    "a list of numbers": (lambda model, z: [z, 3], TypeError, r"features\[1\]"),
    "detached": (lambda model, z: z.detach(), ValueError, "does not require grad"),
    "twice": (lambda model, z: [z, z], ValueError, "twice"),
    "unused": (lambda model, z: _other(model), ValueError, "no loss depends"),
    "empty": (lambda model, z: [], ValueError, "no loss depends"),
}


@pytest.mark.parametrize("name", WRONG_FEATURES)
def test_wrong_features(name: str) -> None:
    make, kind, message = WRONG_FEATURES[name]
    model = Net()
    optimizer = plugin(model)
    z = model.features(0)
    losses = model.losses(z)
    with pytest.raises(kind, match=message):
        optimizer.backward(losses, features=make(model, z))
    assert all(p.grad is None for p in model.parameters())
    assert optimizer.last is None
    optimizer.backward(losses, features=z)


def test_features_that_lead_to_each_other() -> None:
    model = Net()
    z = model.features(0)
    deeper = model.between(z)
    losses = [deeper.mean(), deeper.square().mean() + z.mean()]
    with pytest.raises(ValueError, match=r"features\[0\] leads"):
        plugin(model).backward(losses, features=[z, deeper])


@pytest.mark.parametrize(
    "arguments", [{"granularity": "group"}, {"metric": "optimizer"}], ids=["granularity", "metric"]
)
def test_features_measure_no_parameters(arguments: dict[str, Any]) -> None:
    model = Net()
    z = model.features(0)
    with pytest.raises(ValueError, match=next(iter(arguments))):
        plugin(model, **arguments).backward(model.losses(z), features=z)


def test_features_and_micro_batches() -> None:
    model = Net()
    optimizer = plugin(model)
    z = model.features(0)
    losses = model.losses(z)
    with pytest.raises(ValueError, match="micro-batches"):
        optimizer.backward(losses, features=z, accumulate=True)
    optimizer.backward(losses, accumulate=True, retain_graph=True)
    with pytest.raises(ValueError, match="micro-batches"):
        optimizer.backward(losses, features=z)


def test_an_error_in_the_trunk_takes_everything_back() -> None:
    model = Net()
    optimizer = plugin(model, method="gradvac")
    optimizer.backward(model.losses(model.features(0)))
    before, state = gradients(model), optimizer.state_dict()

    def fail(gradient: Tensor) -> None:
        raise RuntimeError("on purpose")

    handle = model.trunk[0].weight.register_hook(fail)
    z = model.features(1)
    with pytest.raises(RuntimeError, match="on purpose"):
        optimizer.backward(model.losses(z), features=z)
    handle.remove()
    after = optimizer.state_dict()
    key = "gradient_surgery"
    assert (
        after["param_groups"][0][key]["method_state"]
        == state["param_groups"][0][key]["method_state"]
    )
    for name, value in gradients(model).items():
        assert (value is None) == (before[name] is None)
        assert value is None or torch.equal(value, before[name])
