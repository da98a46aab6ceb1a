"""Every optimizer of torch in every implementation: the plugin's steps are the plain steps."""

from __future__ import annotations

import inspect
import io
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from contract import OPTIMIZERS, assert_same
from torch import Tensor, nn

from gradsurgery import AdaptiveGradientSurgery

STEPS = 5
# Flags that choose how a step is computed; every one that the signature has is tried.
IMPLEMENTATIONS = ("foreach", "fused", "capturable", "differentiable")
# Crossed with implementations and with each other; every one that the signature has.
VALUES: dict[str, tuple[Any, ...]] = {
    "maximize": (False, True),
    "weight_decay": (0.0, 0.1),
    "amsgrad": (False, True),
    "momentum": (0.0, 0.9),
    "nesterov": (False, True),
    "centered": (False, True),
    "decoupled_weight_decay": (False, True),
}
# Three tasks of which the first two oppose each other.
METHOD = "ags"


class Net(nn.Module):
    """Matrices for those that take nothing else; vectors, float64 and channels_last otherwise."""

    def __init__(self, *, plain: bool) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 5, bias=not plain)
        self.conv = None if plain else nn.Conv2d(2, 2, (2, 1))
        if self.conv is not None:
            self.conv.to(memory_format=torch.channels_last)
            self.gain = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.heads = nn.ModuleList(nn.Linear(5, 2, bias=False) for _ in range(2))

    def losses(self, step: int) -> list[Tensor]:
        """One head rests at every third step: its gradient is None then."""
        x = torch.linspace(-1, 1, 24).add(step).sin().reshape(6, 4)
        if self.conv is not None:
            x = x.reshape(6, 2, 2, 1)
            x = torch.cat([x, self.conv(x)], dim=2).flatten(1)[:, :4]
        h = self.trunk(x).tanh()
        if self.conv is not None:
            h = (h * self.gain).float()
        first = self.heads[0](h)
        second = (self.heads[0] if step % 3 == 2 else self.heads[1])(h)
        return [(first - 1).square().mean(), 3 * (first + 2).square().mean(), second.exp().mean()]


def make_net(name: str) -> Net:
    """The same weights for every call; what the optimizer can train."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        # Muon takes matrices only; LBFGS flattens gradients with .view(-1).
        return Net(plain=name in ("Muon", "LBFGS"))


def make_base(name: str, model: nn.Module, options: dict[str, Any]) -> torch.optim.Optimizer:
    """The plain optimizer with two groups, where it takes them."""
    options = dict(options)
    rate: Any = 0.01
    if options.pop("tensor_lr", False):
        rate = torch.tensor(rate)
    parameters = list(model.parameters())
    if name == "LBFGS":
        return OPTIMIZERS[name](parameters, lr=rate, max_iter=2, **options)
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "lr": rate * 0.5}]
    return OPTIMIZERS[name](groups, lr=rate, **options)


def implementations(name: str) -> Iterator[dict[str, bool]]:
    """The for-loop, which is the default on the CPU, and each flag that the signature has."""
    known = inspect.signature(OPTIMIZERS[name]).parameters
    yield {"foreach": False} if "foreach" in known else {}
    for flag in IMPLEMENTATIONS:
        if flag in known:
            yield {flag: True}


def variants(name: str) -> list[dict[str, Any]]:
    """Implementation × tensor learning rate × every option, as far as torch itself takes them."""
    known = inspect.signature(OPTIMIZERS[name]).parameters
    options = {key: value for key, value in VALUES.items() if key in known}
    options["tensor_lr"] = (False, True)
    found = []
    for how in implementations(name):
        for values in itertools.product(*options.values()):
            chosen = {**how, **dict(zip(options, values, strict=True))}
            if works(name, chosen):
                found.append(chosen)
    return found


def works(name: str, options: dict[str, Any]) -> bool:
    """Whether the plain optimizer takes these options here; SparseAdam takes no dense gradients."""
    model = make_net(name)
    try:
        base = make_base(name, model, options)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        base.step(lambda: torch.zeros(()))
    except (RuntimeError, ValueError, AssertionError):
        return False
    return True


def through_a_file(state: Any) -> Any:
    """Saved, and loaded as `torch.load` does by default."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same_trajectory(name: str, options: dict[str, Any]) -> None:
    """Bit for bit at each of the steps, with both taken from files into new objects midway."""
    model, twin = make_net(name), make_net(name)
    optimizer = AdaptiveGradientSurgery(make_base(name, model, options), METHOD)
    plain = make_base(name, twin, options)
    start = [p.detach().clone() for p in model.parameters()]
    for step in range(STEPS):
        if step == STEPS // 2 + 1:
            saved = through_a_file(optimizer.state_dict())
            optimizer = AdaptiveGradientSurgery(make_base(name, model, options), METHOD, seed=1)
            optimizer.load_state_dict(saved)
            saved = through_a_file(plain.state_dict())
            plain = make_base(name, twin, options)
            plain.load_state_dict(saved)
        optimizer.zero_grad()
        optimizer.backward(model.losses(step))
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        # Their closures compute nothing anew: the gradients are those of above.
        for each in (optimizer, plain):
            each.step(lambda: torch.zeros(()))
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p, q), f"{options}, step {step}"
    state = optimizer.state_dict()
    del state["param_groups"][0]["gradient_surgery"]
    assert_same(state, plain.state_dict(), str(options))
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), start, strict=True))


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"SparseAdam"}))
def test_every_implementation_follows_the_plain_optimizer(name: str) -> None:
    """All that the signature offers and this CPU computes, crossed with each other."""
    found = variants(name)
    for options in found:
        assert_same_trajectory(name, options)
    used = {(key, value) for options in found for key, value in options.items()}
    print(f"\n{name}: {len(found)} variants, {sorted(key for key, value in used if value is True)}")
    assert len(found) >= 2 or name == "LBFGS"


def test_the_matrix_holds_what_torch_computes_on_the_cpu() -> None:
    """Fused, foreach and for-loop steps are among what was found by trying."""
    everywhere = {
        name: {key for how in implementations(name) if works(name, how) for key in how if how[key]}
        for name in OPTIMIZERS
    }
    assert {name for name, flags in everywhere.items() if "fused" in flags} >= {
        "SGD",
        "Adam",
        "AdamW",
        "Adagrad",
    }
    assert sum("foreach" in flags for flags in everywhere.values()) >= 10
    assert not works("SparseAdam", {})


def test_the_gradients_of_the_matrix_are_not_the_plain_sums() -> None:
    """Otherwise the matrix would say little about surgery."""
    model, twin = make_net("SGD"), make_net("SGD")
    optimizer = AdaptiveGradientSurgery(make_base("SGD", model, {}), METHOD)
    optimizer.backward(model.losses(0))
    torch.stack(twin.losses(0)).sum().backward()
    assert int(optimizer.last.conflicts) >= 1
    assert not torch.allclose(model.trunk.weight.grad, twin.trunk.weight.grad, rtol=0.01)
