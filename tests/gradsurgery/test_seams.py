"""Where two features of the plugin meet, or the plugin and the rest of a process."""

from __future__ import annotations

import io
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradsurgery import AdaptiveGradientSurgery
from gradsurgery.kernels import combine, tasks
from gradsurgery.methods import DWA, GradVac, Method


def net(width: int = 6) -> nn.ModuleDict:
    torch.manual_seed(0)
    heads = nn.ModuleList(nn.Linear(width, 1) for _ in range(3))
    return nn.ModuleDict({"trunk": nn.Linear(4, width), "heads": heads})


def losses_of(model: nn.ModuleDict, step: int = 0) -> dict[str, Tensor]:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
    z = model["trunk"](x).tanh()
    return {
        n: (h(z) - 3.0 * t).square().mean()
        for t, (n, h) in enumerate(zip("abc", model["heads"], strict=True))
    }


def plugin(model: nn.Module, method: Any = "ags", **options: Any) -> AdaptiveGradientSurgery:
    return AdaptiveGradientSurgery(torch.optim.SGD(model.parameters(), lr=0.1), method, **options)


# ------------------------------------------------------------------ tasks and their names


@pytest.mark.parametrize("method", ["gradvac", "famo", "uncertainty", "cr_mogm", "dwa", "ags"])
def test_running_state_follows_the_name_through_a_checkpoint(method: str) -> None:
    """Saved after steps in one order of the mapping, and resumed with the other."""
    rule = {"dwa": lambda: DWA(period=1), "gradvac": lambda: GradVac(beta=0.5)}.get(method)
    made = [(m := net(), plugin(m, rule() if rule else method)) for _ in range(2)]
    (model, optimizer), (twin, other) = made

    def train(model: Any, optimizer: Any, steps: range, names: str) -> None:
        for step in steps:
            optimizer.zero_grad()
            losses = losses_of(model, step)
            optimizer.backward({name: losses[name] for name in names})
            optimizer.step()

    train(model, optimizer, range(3), "cab")
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    twin.load_state_dict(weights)
    other.load_state_dict(state)
    train(model, optimizer, range(3, 6), "cab")
    train(twin, other, range(3, 6), "abc")
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_task_that_comes_later_begins_anew_and_the_others_go_on() -> None:
    """GradVac's targets of two tasks are those of a run that never saw the third."""
    (model, optimizer), (twin, other) = ((m := net(), plugin(m, GradVac(beta=0.5))) for _ in "ab")
    for step in range(3):
        for each, stepper in ((model, optimizer), (twin, other)):
            losses = losses_of(each, step)
            stepper.zero_grad()
            stepper.backward({"a": losses["a"], "b": losses["b"]})
    before = optimizer.method._state["target"].clone()
    optimizer.backward(losses_of(model, 3))
    grown = optimizer.method._state["target"]
    assert grown.shape == (3, 3)
    assert before.shape == (2, 2)
    other.backward(
        {name: loss if name != "c" else None for name, loss in losses_of(twin, 3).items()}
    )
    assert other.last is not None
    assert other.last.names == ("a", "b")
    assert other.method._state["target"].shape == (3, 3)
    assert not other.method._state["target"][2].any()


def test_positions_are_no_names() -> None:
    """In a list another number of tasks stays an error for a method that remembers them."""
    model = net()
    optimizer = plugin(model, "gradvac")
    optimizer.backward(list(losses_of(model).values()))
    with pytest.raises(ValueError, match="number of tasks changes"):
        optimizer.backward(list(losses_of(model).values())[:2])


# --------------------------------------------------------------------- modules that change


def test_parameters_that_replace_others_stay_in_their_module() -> None:
    model = net()
    modules = {"trunk": model["trunk"]}
    optimizer = plugin(model, granularity=modules, scope="all")
    model["trunk"].weight = nn.Parameter(model["trunk"].weight.detach().clone())
    optimizer.param_groups[0]["params"] = list(model.parameters())
    optimizer.backward(losses_of(model))
    assert optimizer.last is not None
    assert optimizer.last.parts == ("trunk", "rest")
    trunk = list(model["trunk"].parameters())
    losses = losses_of(model).values()
    rows = [torch.autograd.grad(loss, trunk, retain_graph=True) for loss in losses]
    flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    torch.testing.assert_close(optimizer.last.gram[0].float(), flat @ flat.T)


# ----------------------------------------------------------------- other objects in a process


def test_an_idle_plugin_on_the_same_parameters_changes_nothing() -> None:
    """p.grad depends on the call alone, not on which other plugins are alive."""
    found = []
    for crowded in (False, True):
        model = net()
        trunk = AdaptiveGradientSurgery(torch.optim.SGD(model["trunk"].parameters(), lr=0.1))
        idle = [plugin(model["heads"]) for _ in range(3)] if crowded else []
        trunk.backward(losses_of(model))
        found.append([p.grad for p in model.parameters()])
        del idle
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_small_gradient_that_is_kept_keeps_no_large_one() -> None:
    """Nor does a file of it hold the others: the bias of a layer of a million weights."""
    model = net(width=260_000)
    optimizer = plugin(model)
    kept = []
    for step in range(3):
        optimizer.zero_grad()
        losses = losses_of(model, step)
        optimizer.backward({"a": losses["a"], "b": losses["b"] + model["trunk"].bias[:3].sum()})
        kept.append(model["heads"][0].bias.grad.detach())
    storages = {g.untyped_storage()._cdata: g.untyped_storage().nbytes() for g in kept}
    assert sum(storages.values()) < 1 << 16


def test_the_library_can_be_imported_under_any_mode() -> None:
    code = (
        "import torch\n"
        "with torch.inference_mode(), torch.device('meta'), torch.no_grad():\n"
        "    import gradsurgery\n"
        "p = torch.nn.Parameter(torch.ones(2))\n"
        "o = gradsurgery.AdaptiveGradientSurgery(torch.optim.SGD([p], lr=1.0))\n"
        "o.backward([p[0] * 2, p.sum()])\n"
        "print(p.grad.tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[3.0, 1.0]"


@pytest.mark.parametrize("name", ["combine", "gram", "launch", "mine"])
def test_a_step_may_have_the_name_of_anything_else(name: str) -> None:
    """Of a kernel in C, or of a function beside Triton's: it is found among steps alone."""

    def ones(gram: Tensor) -> Tensor:
        return torch.ones_like(gram[..., 0])

    tasks.step(name)(ones)
    try:
        assert tasks.run(name, torch.eye(3).double()).tolist() == [1.0, 1.0, 1.0]
        assert combine(torch.ones(3, 70_000), torch.ones(3)).tolist() == [3.0] * 70_000
        with pytest.raises(ValueError, match=f"step '{name}' is"):
            tasks.step(name)(lambda gram: gram[..., 0])
    finally:
        del tasks._plain[name]


# ------------------------------------------------------------------- optimizers around others


class Around(torch.optim.Optimizer):
    """As Lookahead and its like: a state dict of a form of its own."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base = base
        super().__init__(base.param_groups, base.defaults)

    def step(self, closure: Any = None) -> Any:
        """The other one's."""
        return self.base.step(closure)

    def state_dict(self) -> dict[str, Any]:
        """Without param_groups at the top."""
        return {"base": self.base.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.base.load_state_dict(state_dict["base"])


def test_state_of_an_optimizer_around_another() -> None:
    model = net()
    optimizer = AdaptiveGradientSurgery(Around(torch.optim.Adam(model.parameters())), "gradvac")
    optimizer.backward(losses_of(model))
    optimizer.step()
    state = optimizer.state_dict()
    twin = net()
    other = AdaptiveGradientSurgery(Around(torch.optim.Adam(twin.parameters())), "gradvac")
    other.load_state_dict(state)
    assert other.method.state_dict() == optimizer.method.state_dict()
    plain = Around(torch.optim.Adam(net().parameters())).state_dict()
    other.load_state_dict(plain)


def test_damaged_state_of_a_method_changes_nothing() -> None:
    model = net()
    optimizer = plugin(model, "gradvac")
    optimizer.backward(losses_of(model))
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = 7.0
    state["param_groups"][0]["gradient_surgery"]["method_state"]["target"] = "[[0.1, 0.2"
    before = optimizer.method.state_dict()
    with pytest.raises(ValueError, match="method_state in the gradient_surgery state is damaged"):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert optimizer.method.state_dict() == before


def test_an_optimizer_that_differentiates_gradients_says_why_it_cannot() -> None:
    class Second(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            (p,) = self.param_groups[0]["params"]
            torch.autograd.grad(p.grad.sum(), p)

    p = nn.Parameter(torch.ones(3))
    optimizer = AdaptiveGradientSurgery(Second([p], lr=0.1))
    optimizer.backward([p.square().sum(), p.sum()])
    with pytest.raises(RuntimeError, match=r"Second differentiates p\.grad once more"):
        optimizer.step()
    with pytest.raises(ValueError, match="create_graph=True is not supported"):
        optimizer.backward([p.sum()], create_graph=True)


# ------------------------------------------------------------------ weights that are known


class Counting(Method):
    """The plain sum, from a method that asks for no gradients, and counts."""

    name = "counting"
    reads_gram = False
    known_beforehand = True
    asked = 0

    def solve(self, gram: Tensor, *_: Any) -> Tensor:
        """Ones."""
        self.asked += 1
        return torch.ones(gram.shape[:-1], dtype=torch.float64)


class Doubled(torch.autograd.Function):
    """A node written in Python."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Twice x."""
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Twice its gradient."""
        return 2 * gradient


@pytest.mark.parametrize("node", [False, True])
@pytest.mark.parametrize("every", [1, 4])
def test_every_means_the_same_for_all_methods_and_graphs(node: bool, every: int) -> None:
    """Eight steps: asked at every k-th one; one pass through the trunk where weights are known."""
    for method, first in ((Counting(), 1), ("mgda", 3)):
        model = net()
        optimizer = plugin(model, method, every=every, scope="all")
        passes = 0

        def count(_: Tensor) -> None:
            nonlocal passes
            passes += 1

        for step in range(8):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            z = model["trunk"](x)
            z.register_hook(count)
            z = Doubled.apply(z) if node else 2 * z
            optimizer.zero_grad()
            optimizer.backward([(h(z) - t).square().mean() for t, h in enumerate(model["heads"])])
        solved = 8 // every
        assert passes == solved * first + (8 - solved)
        if isinstance(method, Counting):
            assert method.asked == solved
