"""torch.compile and activation checkpointing around the plugin."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from bare_loop import Net, assert_same, bare_loop, epochs
from bare_loop import one_thread as one_thread
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.utils.checkpoint import checkpoint

from gradsurgery import AdaptiveGradientSurgery

pytestmark = [
    # Says that the caches are off, which is what the fixture wants.
    pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled"),
    # The compiler looks at .grad of whatever it is given, also of features and losses.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    # torch's own, while inductor is imported.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning"),
]
BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def _compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A compiler without memory: what an earlier run left in its cache hides donated buffers."""
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    torch.compiler.reset()
    with functorch_config.patch(donated_buffer=False):
        yield
    torch.compiler.reset()


def plugin(model: Net, scope: str) -> AdaptiveGradientSurgery:
    """SGD, which does not make rounding grow; AGS, whose weights depend on every norm."""
    base = torch.optim.SGD(model.parameters(), lr=0.05)
    return AdaptiveGradientSurgery(base, scope=scope)


def reference(scope: str) -> Net:
    """Six eager steps."""
    model = Net()
    bare_loop(epochs(1), model=model, optimizer=plugin(model, scope))
    return model


def assert_close(model: Net, expected: Net) -> None:
    """To rounding: a compiler may order sums in its own way."""
    for p, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_trunk_keeps_heads_apart(backend: str) -> None:
    """Trunk and heads compiled one by one: the default scope, as without a compiler."""
    model = Net()
    model.trunk.compile(backend=backend)
    for head in model.heads:
        head.compile(backend=backend)
    bare_loop(epochs(1), model=model, optimizer=plugin(model, "shared"))
    assert_close(model, reference("shared"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scope", ["shared", "all"])
def test_a_model_compiled_whole_is_under_surgery_whole(backend: str, scope: str) -> None:
    """One node that gives zeros, not None, to heads of other tasks: every parameter is shared."""
    model = Net()
    model.compile(backend=backend)
    bare_loop(epochs(1), model=model, optimizer=plugin(model, scope))
    expected = reference("all")
    assert_close(model, expected)
    gap = (expected.trunk.weight - reference("shared").trunk.weight).abs().max()
    assert gap > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_training_step(backend: str) -> None:
    """Forward, losses and the optimizer's step in one compiled function; backward stays outside."""
    model = Net()
    optimizer = plugin(model, "all")

    @torch.compile(backend=backend)
    def step(x: Tensor) -> None:
        losses = model.losses(x)
        optimizer.zero_grad()
        optimizer.backward(losses)
        optimizer.step()

    for x in epochs(1):
        step(x)
    assert_close(model, reference("all"))


def test_a_plain_backward_before_surgery() -> None:
    """The trap: compiled for plain training first, saved tensors are given away; the error says."""
    model = Net()
    optimizer = plugin(model, "all")
    with functorch_config.patch(donated_buffer=True):
        compiled: Any = torch.compile(model, backend="aot_eager")
        for donated in (True, False):
            functorch_config.donated_buffer = donated
            torch.compiler.reset()
            torch.stack(list(Net.losses_of(compiled(epochs(1)[0])).values())).sum().backward()
            losses = Net.losses_of(compiled(epochs(1)[0]))
            if donated:
                with pytest.raises(RuntimeError, match="donated_buffer = False before the model"):
                    optimizer.backward(losses)
            else:
                optimizer.backward(losses)


# ------------------------------------------------------------------ activation checkpointing


class Checkpointed(Net):
    """The trunk's activations are computed again at each task's backward pass."""

    reentrant = False

    def forward(self, x: Tensor) -> list[Tensor]:
        """As in `Net`."""
        # Reentrant checkpoints give no gradient unless an input wants one.
        x = x.detach().requires_grad_(self.reentrant)
        shared = checkpoint(lambda t: torch.tanh(self.trunk(t)), x, use_reentrant=self.reentrant)
        return [head(shared) for head in self.heads]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool, precision: torch.dtype) -> None:
    """Training with AdamW and GradVac in micro-batches: the same bits as without checkpoints."""
    model = Checkpointed()
    model.reentrant = reentrant
    _, optimizer = bare_loop(epochs(2), model=model, micro=2, clip=0.5, precision=precision)
    twin, plain = bare_loop(epochs(2), micro=2, clip=0.5, precision=precision)
    assert_same(model.state_dict(), twin.state_dict())
    assert_same(optimizer.state_dict(), plain.state_dict())


def test_a_checkpointed_trunk_compiled() -> None:
    """Both together."""
    model = Checkpointed()
    expected = reference("shared")

    def trunk(t: Tensor) -> Tensor:
        return checkpoint(lambda u: torch.tanh(model.trunk(u)), t, use_reentrant=False)

    compiled = torch.compile(trunk, backend="aot_eager")
    optimizer = plugin(model, "shared")
    for x in epochs(1):
        shared = compiled(x)
        optimizer.zero_grad()
        optimizer.backward(Net.losses_of([head(shared) for head in model.heads]))
        optimizer.step()
    assert_close(model, expected)
