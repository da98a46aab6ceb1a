"""diagnose: the right answer on models that were made for it, and nothing is touched."""

from __future__ import annotations

import copy
import random
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradsurgery import AdaptiveGradientSurgery, diagnose

BATCHES = list(torch.randn(12, 32, 4, generator=torch.Generator().manual_seed(0)))


class Shared(nn.Module):
    """A shared vector; what a batch does is up to the losses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.shared(x))


def pointless(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Two tasks that want nearly the same."""
    out = model.shared(x)
    return [(out - 1).square().mean(), (out - 1.1).square().mean()]


def only_a_rescale(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Gradients a + b and -a + b of one length: AGS is the plain sum."""
    w = model.shared.weight
    noise = 1 + 0.01 * x.mean()
    return [noise * (w[0].sum() + 0.3 * w[1].sum()), noise * (-w[0].sum() + 0.3 * w[1].sum())]


def it_matters(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Conflicts, norms far apart, and each batch another task is the larger one."""
    w = model.shared.weight
    first, second = (5.0, 0.2) if x.mean() > 0 else (0.2, 5.0)
    a = w[0].sum() + 0.5 * w[1].sum()
    b = -w[0].sum() + 0.5 * w[2].sum()
    return [first * a, second * b]


def weights_would_do(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Conflicts and norms far apart, always in the same way."""
    w = model.shared.weight
    noise = 1 + 0.01 * x.mean()
    return [5 * noise * (w[0].sum() + 0.5 * w[1].sum()), noise * (-w[0].sum() + 0.5 * w[2].sum())]


@pytest.mark.parametrize(
    ("losses", "verdict", "says"),
    [
        (pointless, "no", "No: the tasks hardly fight"),
        (only_a_rescale, "rescale", "Only the length"),
        (weights_would_do, "static", "Perhaps not"),
        (it_matters, "maybe", "Maybe: "),
    ],
)
def test_the_answer(losses: Any, verdict: str, says: str) -> None:
    model = Shared()
    found = diagnose(model, losses, BATCHES, torch.optim.Adam(model.parameters(), lr=1e-3))
    assert found.verdict == verdict, str(found)
    assert str(found).startswith(says)
    assert "nan" not in str(found)
    assert set(found.raised) == {"sum", "ags"}
    again = diagnose(model, losses, BATCHES, torch.optim.Adam(model.parameters(), lr=1e-3))
    for name in ("verdict", "conflict_rate", "turned_degrees", "raised"):
        assert getattr(found, name) == getattr(again, name)


def test_a_rescale_is_the_plain_sum_and_pcgrad_is_not_as_long() -> None:
    """The closed form of two equal norms: PCGrad's gradient is 1 + c times the sum's."""
    found = diagnose(Shared(), only_a_rescale, BATCHES)
    # cos = (-1 + 0.09) / (1 + 0.09).
    cosine = -0.91 / 1.09
    assert found.turned_degrees == pytest.approx(0, abs=1e-4)
    assert found.pcgrad_scale == pytest.approx(1 - cosine, rel=1e-5)
    assert float(found.cosine[0, 1]) == pytest.approx(cosine, rel=1e-5)
    assert float(found.sign_agreement[0, 1]) == 1.0
    assert found.raised == {}


@pytest.mark.parametrize("wrapped", [False, True])
def test_nothing_is_touched(wrapped: bool) -> None:
    model = Shared().eval()
    optimizer: Any = torch.optim.Adam(model.parameters(), lr=0.1)
    if wrapped:
        optimizer = AdaptiveGradientSurgery(optimizer)
    model.shared.weight.grad = torch.ones(4, 4)
    optimizer.step()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    gradient, stream = model.shared.weight.grad.clone(), torch.get_rng_state()

    def with_buffers_and_noise(net: nn.Module, x: Tensor) -> list[Tensor]:
        out = nn.functional.dropout(net.train()(x), 0.5)
        return [out.square().mean(), (out - 1).square().mean()]

    diagnose(model, with_buffers_and_noise, BATCHES[:3], optimizer)
    after = (model.state_dict(), optimizer.state_dict())
    assert repr(before) == repr(after)
    for name, value in before[0].items():
        assert torch.equal(value, after[0][name])
    assert torch.equal(gradient, model.shared.weight.grad)
    assert torch.equal(stream, torch.get_rng_state())
    assert not model.training


def test_wrong_input() -> None:
    model = Shared()
    with pytest.raises(ValueError, match="batches is empty"):
        diagnose(model, pointless, [])
    with pytest.raises(ValueError, match="at least two losses"):
        diagnose(model, lambda net, x: [net(x).mean()], BATCHES)
    with pytest.raises(ValueError, match="share no parameter"):
        diagnose(model, lambda net, x: [net.shared.weight.sum(), net.norm.weight.sum()], BATCHES)

    calls: list[int] = []

    def changing(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
        calls.append(1)
        name = "b" if len(calls) < 3 else "c"
        return {"a": net(x).mean(), name: net(x).square().mean()}

    with pytest.raises(ValueError, match="the same for every batch"):
        diagnose(model, changing, BATCHES)


def sometimes(model: nn.Module, x: Tensor) -> list[Tensor]:
    """`weights_would_do` in every fourth batch; no conflict in the others."""
    if any(x is batch for batch in BATCHES[::4]):
        return weights_would_do(model, x)
    w = model.shared.weight
    return [w[0].sum(), w[1].sum()]


def test_surgery_now_and_then_is_not_lost_in_the_median() -> None:
    found = diagnose(Shared(), sometimes, BATCHES)
    assert found.verdict == "maybe"
    assert found.turned_degrees == pytest.approx(0, abs=1e-4)
    assert found.turned_share == pytest.approx(0.25)


def test_the_interval_knows_how_few_batches_there_were() -> None:
    """Wilson's for 3 of 3 is [3 / (3 + z²), 1]."""
    low, high = diagnose(Shared(), only_a_rescale, BATCHES[:3]).conflict_interval
    assert (low, high) == pytest.approx((3 / (3 + 1.96**2), 1))


def test_a_model_from_outside_is_refused_and_its_gradients_stay() -> None:
    model = Shared()

    def half(net: nn.Module, x: Tensor) -> list[Tensor]:
        out = model.norm(net.shared(x))
        return [out.mean(), out.square().mean()]

    with pytest.raises(ValueError, match="must use the model that it is given"):
        diagnose(model, half, BATCHES)
    assert all(p.grad is None for p in model.parameters())


def test_what_the_losses_bring_along_keeps_its_gradient() -> None:
    factor = nn.Parameter(torch.ones(()))
    kept = factor.grad = torch.full((), 3.0)
    stream = random.getstate()

    def scaled(net: nn.Module, x: Tensor) -> list[Tensor]:
        return [factor * random.random() * loss for loss in pointless(net, x)]

    model = Shared()
    diagnose(model, scaled, BATCHES, torch.optim.SGD(model.parameters(), lr=0.1))
    assert factor.grad is kept
    assert float(kept) == 3.0
    assert random.getstate() == stream


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_gradients_that_are_not_finite_have_no_verdict(bad: float) -> None:
    def broken(net: nn.Module, x: Tensor) -> list[Tensor]:
        return [loss * (bad if x is BATCHES[2] else 1) for loss in pointless(net, x)]

    with pytest.raises(ValueError, match="batch 2 are not finite"):
        diagnose(Shared(), broken, BATCHES)


def test_only_what_the_optimizer_holds_is_looked_at() -> None:
    model = Shared()
    for p in model.norm.parameters():
        p.requires_grad_(False)
    whole = diagnose(model, pointless, BATCHES)
    bias = diagnose(model, pointless, BATCHES, torch.optim.SGD([model.shared.bias], lr=0.1))
    assert (bias.norms < whole.norms).all()


def test_batches_are_used_as_they_come() -> None:
    alive: list[Any] = []
    most: list[int] = []

    def stream() -> Iterator[Tensor]:
        for _ in range(6):
            batch = torch.randn(8, 4)
            alive.append(weakref.ref(batch))
            yield batch
            del batch

    def counting(net: nn.Module, x: Tensor) -> list[Tensor]:
        most.append(sum(each() is not None for each in alive))
        return pointless(net, x)

    assert diagnose(Shared(), counting, stream()).batches == 6
    assert max(most) == 1
