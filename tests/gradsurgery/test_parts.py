"""Surgery part by part (`granularity`) and in the optimizer's own geometry (`metric`)."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradsurgery import AdaptiveGradientSurgery, methods
from gradsurgery.kernels import native

# float64 sums of the same terms in another order.
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh())
        self.decoder = nn.Linear(8, 6)
        self.heads = nn.ModuleList(nn.Linear(6, 2) for _ in range(3))
        self.to(dtype)

    def losses(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(5, 4, generator=generator).to(self.decoder.weight.dtype)
        z = self.decoder(self.encoder(x)).tanh()
        a, b, c = (head(z) for head in self.heads)
        return {"a": (a - 1).square().mean(), "b": (b + 2).square().mean(), "c": 3 * c.mean()}


LEVELS = ["model", "group", "parameter", "modules"]


def parts_of(model: Net, level: str) -> list[tuple[str, list[str]]]:
    """Part -> names of its parameters."""
    names = [name for name, _ in model.named_parameters()]
    if level == "model":
        return [("", names)]
    if level == "parameter":
        return [(name, [name]) for name in names]
    cut = {
        "encoder": [n for n in names if n.startswith("encoder")],
        "decoder": [n for n in names if n.startswith("decoder")],
        "rest": [n for n in names if n.startswith("heads")],
    }
    return list(cut.items())


def plugin(model: Net, level: str, kind: Any = torch.optim.SGD, **arguments: Any) -> Any:
    """With `level` as granularity; groups are the encoder, the decoder and the heads."""
    options = {"lr": 0.01} | arguments.pop("options", {})
    groups = [
        {"params": list(part.parameters())} for part in (model.encoder, model.decoder, model.heads)
    ]
    granularity: Any = level
    if level == "modules":
        granularity = {"encoder": model.encoder, "decoder": list(model.decoder.parameters())}
    base = kind(groups, **options)
    return AdaptiveGradientSurgery(base, granularity=granularity, **arguments)


def by_definition(
    model: Net,
    losses: dict[str, Tensor],
    level: str,
    method: str,
    *,
    scope: str = "shared",
    factors: dict[str, Tensor] | None = None,
    weights: Tensor | None = None,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """g, M and w of every part, one parameter at a time."""
    names = [name for name, _ in model.named_parameters()]
    each = [
        torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
        for loss in losses.values()
    ]
    rows = {name: [None if g[i] is None else g[i] for g in each] for i, name in enumerate(names)}
    operated = {
        name: sum(g is not None for g in own) > (1 if scope == "shared" else 0)
        for name, own in rows.items()
    }
    rule = methods.resolve(method)
    grams = []
    for _, members in parts_of(model, level):
        total = torch.zeros(3, 3, dtype=torch.float64)
        for name in members:
            if not operated[name]:
                continue
            scale = torch.ones(()) if factors is None else factors[name]
            filled = [torch.zeros(()) if g is None else g for g in rows[name]]
            wide = torch.stack(
                [
                    (g * scale.sqrt()).expand(scale.shape).flatten()
                    if factors
                    else g.expand(model.get_parameter(name).shape).flatten()
                    for g in filled
                ]
            ).double()
            total += wide @ wide.T
        grams.append(total)
    stacked = torch.stack(grams)
    if weights is None:
        weights = rule.weights(stacked, generator=torch.Generator().manual_seed(0))
    found = {}
    for index, (_, members) in enumerate(parts_of(model, level)):
        for name in members:
            terms = [
                (w, g) for w, g in zip(weights[index], rows[name], strict=True) if g is not None
            ]
            if operated[name]:
                found[name] = sum(w * g for w, g in terms)
            else:
                found[name] = sum(g for _, g in terms)
    return found, stacked, weights


@pytest.fixture(params=["native", "torch"])
def version(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(native, "takes", lambda rows: False)
    elif not native.available():
        pytest.skip("was built without a C compiler")
    return request.param


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scope", ["shared", "all"])
@pytest.mark.parametrize("method", ["ags", "pcgrad", "gradvac"])
def test_each_part_has_its_own_surgery(method: str, scope: str, level: str) -> None:
    model = Net()
    optimizer = plugin(model, level, method=method, scope=scope)
    losses = model.losses(0)
    optimizer.backward(losses, retain_graph=True)
    wanted, gram, weights = by_definition(model, losses, level, method, scope=scope)
    report = optimizer.last
    found = (
        (report.gram, report.weights)
        if level != "model"
        else (
            report.gram[None],
            report.weights[None],
        )
    )
    torch.testing.assert_close(found[0], gram, **CLOSE)
    torch.testing.assert_close(found[1], weights, **CLOSE)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name], **CLOSE, msg=name)


@pytest.mark.parametrize("level", ["group", "parameter"])
def test_float32_by_both_versions(version: str, level: str) -> None:
    model = Net(torch.float32)
    optimizer = plugin(model, level, method="pcgrad")
    losses = model.losses(0)
    optimizer.backward(losses, retain_graph=True)
    wanted, _, _ = by_definition(model, losses, level, "pcgrad")
    for name, p in model.named_parameters():
        # float32 products and sums; weights amplify where gradients oppose each other.
        torch.testing.assert_close(p.grad, wanted[name], rtol=1e-4, atol=1e-6, msg=name)


def test_names_of_parts() -> None:
    model = Net()
    losses = model.losses(0)
    seen = {}
    for level in LEVELS:
        optimizer = plugin(model, level)
        optimizer.backward(losses, retain_graph=True)
        seen[level] = optimizer.last.parts
    assert seen["model"] == ()
    assert seen["group"] == ("group 0", "group 1", "group 2")
    assert seen["modules"] == ("encoder", "decoder", "rest")
    assert len(seen["parameter"]) == 12
    named = torch.optim.SGD(
        [{"params": list(model.encoder.parameters()), "name": "front", "lr": 0.1}], lr=0.1
    )
    other = AdaptiveGradientSurgery(named, granularity="group")
    other.backward(losses)
    assert other.last is not None
    assert other.last.parts == ("front",)


def test_a_method_with_state_keeps_it_for_each_part_and_resumes() -> None:
    model = Net()
    optimizer = plugin(model, "group", method="gradvac", seed=2)
    for step in range(3):
        optimizer.zero_grad()
        optimizer.backward(model.losses(step))
        optimizer.step()
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    twin = Net()
    other = plugin(twin, "group", method="gradvac")
    twin.load_state_dict(weights)
    other.load_state_dict(state)
    for step in range(3, 6):
        for trained, stepper in ((model, optimizer), (twin, other)):
            stepper.zero_grad()
            stepper.backward(trained.losses(step))
            stepper.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    with pytest.raises(ValueError, match="3, 3"):
        plugin(twin, "model", method=other.method).backward(twin.losses(0))


def test_micro_batches_part_by_part() -> None:
    model = Net()
    optimizer = plugin(model, "parameter", method="pcgrad")
    first, second = model.losses(0), model.losses(1)
    optimizer.backward(first, accumulate=True, retain_graph=True)
    optimizer.backward(second, retain_graph=True)
    both = {key: first[key] + second[key] for key in first}
    wanted, _, _ = by_definition(model, both, "parameter", "pcgrad")
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name], **CLOSE, msg=name)


@pytest.mark.parametrize("level", ["group", "parameter", "modules"])
def test_a_parameter_frozen_between_micro_batches_stays_in_its_part(level: str) -> None:
    model = Net()
    optimizer = plugin(model, level, method="mgda")
    # The last one of the encoder, and the first: neither is the last part.
    frozen = [model.encoder[0].weight, model.encoder[2].bias]
    first = model.losses(0)
    optimizer.backward(first, accumulate=True, retain_graph=True)
    for p in frozen:
        p.requires_grad_(False)
    second = model.losses(1)
    optimizer.backward(second, retain_graph=True)
    for p in frozen:
        p.requires_grad_(True)
    both = {key: first[key] + second[key] for key in first}
    wanted, gram, _ = by_definition(model, both, level, "mgda")
    assert optimizer.last is not None
    torch.testing.assert_close(optimizer.last.gram, gram, **CLOSE)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name], **CLOSE, msg=name)


def test_a_part_that_only_one_task_reaches_has_nothing_to_solve() -> None:
    model = Net()
    optimizer = plugin(model, "modules")
    optimizer.backward(model.losses(0))
    assert not optimizer.last.gram[2].any()


def test_a_parameter_in_two_modules_is_refused() -> None:
    model = Net()
    both = {"all": model, "encoder": model.encoder}
    with pytest.raises(ValueError, match="'all' and in 'encoder'"):
        AdaptiveGradientSurgery(torch.optim.SGD(model.parameters(), lr=0.1), granularity=both)


def test_a_group_that_is_added_later() -> None:
    model = Net()
    base = torch.optim.SGD(model.encoder.parameters(), lr=0.1)
    optimizer = AdaptiveGradientSurgery(base, granularity="group")
    optimizer.backward(model.losses(0))
    optimizer.add_param_group({"params": list(model.decoder.parameters())})
    optimizer.zero_grad()
    optimizer.backward(model.losses(0))
    assert optimizer.last is not None
    assert optimizer.last.gram.shape == (2, 3, 3)


# ------------------------------------------------------------------ metric="optimizer"


def denominators(optimizer: Any, model: Net) -> dict[str, Tensor]:
    """1 / h of every coordinate, from the optimizer's own formulae, one parameter at a time."""
    base = optimizer._surgery.optimizer
    kind = type(base).__name__
    found = {}
    names = {id(p): name for name, p in model.named_parameters()}
    for group in base.param_groups:
        for p in group["params"]:
            state = base.state[p]
            if kind in ("Adam", "AdamW", "NAdam", "RAdam"):
                key = "max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"
                corrected = state[key] / (1 - group["betas"][1] ** float(state["step"]))
                value = corrected.sqrt() + group["eps"]
                if kind == "RAdam" and float(state["step"]) < 6:
                    value = torch.ones_like(value)
            elif kind == "Adamax":
                value = state["exp_inf"]
            elif kind == "RMSprop":
                square = state["square_avg"]
                if group["centered"]:
                    square = square - state["grad_avg"].square()
                value = square.sqrt() + group["eps"]
            elif kind == "Adagrad":
                value = state["sum"].sqrt() + group["eps"]
            else:
                value = torch.ones_like(p)
            largest = max(g["lr"] for g in base.param_groups)
            found[names[id(p)]] = value.detach() / (group["lr"] / largest)
    return found


GEOMETRIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "Adam": (torch.optim.Adam, {}),
    "Adam amsgrad": (torch.optim.Adam, {"amsgrad": True}),
    "AdamW": (torch.optim.AdamW, {"foreach": True}),
    "NAdam": (torch.optim.NAdam, {}),
    "RAdam": (torch.optim.RAdam, {}),
    "Adamax": (torch.optim.Adamax, {}),
    "RMSprop": (torch.optim.RMSprop, {}),
    "RMSprop centered": (torch.optim.RMSprop, {"centered": True}),
    "Adagrad": (torch.optim.Adagrad, {}),
    "SGD": (torch.optim.SGD, {}),
}


@pytest.mark.parametrize("level", ["model", "parameter"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_gram_matrix_in_the_optimizers_own_geometry(name: str, level: str) -> None:
    kind, options = GEOMETRIES[name]
    model = Net()
    optimizer = plugin(model, level, kind, method="pcgrad", metric="optimizer", options=options)
    optimizer.param_groups[1]["lr"] = 0.005
    for step in range(8):
        losses = model.losses(step)
        if step in (0, 1, 7):
            scale = denominators(optimizer, model) if step else None
            optimizer.zero_grad()
            optimizer.backward(losses, retain_graph=True)
            if step:
                factors = {key: 1 / value for key, value in scale.items()}
                found = optimizer.last.gram
                # In its own random order.
                taken = optimizer.last.weights.view(-1, 3)
                wanted, gram, _ = by_definition(
                    model, losses, level, "pcgrad", factors=factors, weights=taken
                )
                torch.testing.assert_close(found.view(gram.shape), gram, rtol=1e-6, atol=0)
                for key, p in model.named_parameters():
                    torch.testing.assert_close(p.grad, wanted[key], rtol=1e-5, atol=1e-9)
        else:
            optimizer.zero_grad()
            optimizer.backward(losses)
        optimizer.step()


def test_the_first_step_of_adam_has_no_geometry_yet() -> None:
    found = []
    for metric in ("euclidean", "optimizer"):
        model = Net()
        optimizer = plugin(model, "model", torch.optim.Adam, metric=metric)
        optimizer.backward(model.losses(0))
        found.append(optimizer.last.gram)
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", [torch.optim.Rprop, torch.optim.Adafactor, torch.optim.LBFGS])
def test_optimizers_without_second_moments_are_refused_by_name(kind: Any) -> None:
    with pytest.raises(ValueError, match=f"geometry of {kind.__name__}"):
        AdaptiveGradientSurgery(kind(Net().parameters()), metric="optimizer")


def test_complex_and_16_bit_parameters_have_a_geometry() -> None:
    torch.manual_seed(0)
    wave = nn.Parameter(torch.randn(5, dtype=torch.complex64))
    half = nn.Parameter(torch.randn(7, dtype=torch.bfloat16))
    optimizer = AdaptiveGradientSurgery(torch.optim.Adam([wave, half], lr=0.01), metric="optimizer")
    for _ in range(2):
        optimizer.zero_grad()
        size = torch.view_as_real(wave).square().sum()
        optimizer.backward([size + half.float().sum(), 2 * wave.real.sum() - half.float().sum()])
        before = copy.deepcopy(optimizer.state_dict())["state"]
        optimizer.step()
    rows = [2 * wave.detach(), torch.full_like(wave.detach(), 2)]
    v = before[0]["exp_avg_sq"]
    h = torch.view_as_real(v) / (1 - 0.999 ** float(before[0]["step"]))
    assert optimizer.last is not None
    assert optimizer.last.gram.isfinite().all()
    assert h.shape == torch.view_as_real(rows[0]).shape


# ------------------------------------------------------------------ what the step does


STEPS: dict[str, tuple[Any, dict[str, Any]]] = {
    "RMSprop": (torch.optim.RMSprop, {"alpha": 0.999}),
    "Adam without momentum": (torch.optim.Adam, {"betas": (0.0, 0.999)}),
    "Adagrad": (torch.optim.Adagrad, {}),
}


def changes(metric: str, method: str, name: str) -> list[float]:
    """First-order change of each task's loss, g_i·Δθ, by one step after a warm-up.

    The warm-up leaves second moments ten times as large in the second coordinate as in the first,
    in which the two tasks disagree.
    """
    kind, options = STEPS[name]
    p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    rows = torch.tensor([[1.0, 1.0], [-2.0, 1.0]], dtype=torch.float64)
    optimizer = AdaptiveGradientSurgery(kind([p], lr=0.01, **options), method=method, metric=metric)
    warm = torch.tensor([0.1, 1.0], dtype=torch.float64)
    for _ in range(1000):
        optimizer.zero_grad()
        optimizer.backward([warm @ p])
        optimizer.step()
    optimizer.zero_grad()
    optimizer.backward([row @ p for row in rows])
    before = p.detach().clone()
    optimizer.step()
    moved = p.detach() - before
    return (rows @ moved).tolist()


@pytest.mark.parametrize("method", ["pcgrad", "ags"])
@pytest.mark.parametrize("name", STEPS)
def test_euclidean_surgery_raises_a_loss_that_the_optimizers_metric_lowers(
    name: str, method: str
) -> None:
    """The combined gradient agrees with both tasks either way; the step only in its own metric."""
    euclidean = changes("euclidean", method, name)
    assert max(euclidean) > 5e-4
    own = changes("optimizer", method, name)
    assert max(own) < 0
