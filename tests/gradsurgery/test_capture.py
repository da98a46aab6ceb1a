"""How gradients get from autograd into the rows and back into p.grad: the special cases."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import pytest
import reference
import torch
import torch._functorch.config as functorch_config
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradsurgery import AdaptiveGradientSurgery

# float64 throughout unless a test says otherwise: T roundings of 1e-16, with room.
EXACT = 1e-12
# float32 with T = 2: two products, one sum, the weights' own rounding and a Gram matrix exact
# to 1e-7, each relative to the longest of the gradients.
SINGLE = 2e-6


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def plugin(
    parameters: Sequence[Tensor] | nn.Module, method: str = "ags", **options: object
) -> AdaptiveGradientSurgery:
    """The plugin over SGD, learning rate 0.1."""
    if isinstance(parameters, nn.Module):
        parameters = list(parameters.parameters())
    return AdaptiveGradientSurgery(torch.optim.SGD(parameters, lr=0.1), method, **options)


def by_backward(losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> reference.Gradients:
    """One row per task from plain backward passes, hooks and reentrant nodes included."""
    saved = [p.grad for p in parameters]
    rows: reference.Gradients = []
    for loss in losses:
        for p in parameters:
            p.grad = None
        loss.backward(retain_graph=True)
        rows.append([None if p.grad is None else reference.widen(p.grad) for p in parameters])
    for p, grad in zip(parameters, saved, strict=True):
        p.grad = grad
    return rows


def expect(
    rows: reference.Gradients,
    parameters: Sequence[Tensor],
    method: str = "ags",
    scope: str = "shared",
) -> list[Tensor | None]:
    """The definition's gradients (T = 2, where the order of tasks does not matter)."""
    orders = [list(range(len(rows)))] * len(rows)
    rule = reference.METHODS[method]
    return reference.surgery(rows, parameters, rule, scope=scope, orders=orders).gradients


def assert_gradients(
    parameters: Sequence[Tensor], expected: Sequence[Tensor | None], tolerance: float = EXACT
) -> None:
    """p.grad as expected: None where None is, and values within tolerance of the largest."""
    sizes = [float(e.abs().max()) for e in expected if e is not None and e.numel()]
    allowed = tolerance * max([1.0, *sizes])
    for p, wanted in zip(parameters, expected, strict=True):
        assert (p.grad is None) == (wanted is None)
        if wanted is not None:
            assert p.grad.dtype == p.dtype
            assert p.grad.shape == p.shape
            error = (reference.widen(p.grad) - wanted).abs()
            assert error.numel() == 0 or float(error.max()) <= allowed


def run_and_compare(
    parameters: Sequence[Tensor],
    losses: Sequence[Tensor],
    *,
    method: str = "ags",
    scope: str = "shared",
    tolerance: float = EXACT,
) -> AdaptiveGradientSurgery:
    """The plugin's backward against the definition on the same graph, through autograd.grad."""
    rows = reference.task_gradients(losses, parameters)
    expected = expect(rows, parameters, method, scope)
    optimizer = plugin(parameters, method, scope=scope)
    optimizer.backward(losses)
    assert_gradients(parameters, expected, tolerance)
    return optimizer


class TwoHeads(nn.Module):
    """A trunk, two heads, and losses whose gradients conflict on the trunk."""

    def __init__(self, trunk: nn.Module | None = None) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(3, 4), nn.Tanh()) if trunk is None else trunk
        self.first = nn.Linear(4, 1)
        self.second = nn.Linear(4, 1)
        self.double()

    def losses(self, x: Tensor) -> list[Tensor]:
        """Two losses of different sizes that pull the trunk apart."""
        h = self.trunk(x)
        push = h.sum(1).mean()
        return [
            self.first(h).square().mean() + push,
            3 * self.second(h).square().mean() - 2 * push,
        ]


def batch(rows: int = 5, width: int = 3) -> Tensor:
    """Random inputs in float64."""
    return torch.randn(rows, width, dtype=torch.float64)


def grads(parameters: Sequence[Tensor] | nn.Module) -> list[Tensor | None]:
    """The p.grad objects as they are."""
    if isinstance(parameters, nn.Module):
        parameters = list(parameters.parameters())
    return [p.grad for p in parameters]


# ------------------------------------------------------------------ what the tasks have in common


@pytest.mark.parametrize("method", ["sum", "mean", "ags", "pcgrad"])
@pytest.mark.parametrize("scope", ["shared", "all"])
def test_tasks_on_one_graph_with_heads(method: str, scope: str) -> None:
    model = TwoHeads()
    optimizer = run_and_compare(
        list(model.parameters()), model.losses(batch()), method=method, scope=scope
    )
    assert int(optimizer.last.conflicts) == 1


def test_scope_shared_leaves_heads_their_plain_gradient_and_scope_all_does_not() -> None:
    model, x = TwoHeads(), batch()
    heads = [*model.first.parameters(), *model.second.parameters()]
    plain = by_backward(model.losses(x), heads)
    plugin(model).backward(model.losses(x))
    for index, p in enumerate(heads):
        assert torch.equal(p.grad, plain[index // 2][index])
    model.zero_grad()
    plugin(model, scope="all").backward(model.losses(x))
    assert not torch.allclose(heads[0].grad, plain[0][0], rtol=1e-3)


def test_disjoint_graphs_over_the_same_parameters() -> None:
    model = TwoHeads()
    first, second = model.losses(batch())[0], model.losses(batch())[1]
    run_and_compare(list(model.parameters()), [first, second])


def test_two_tasks_share_a_graph_and_a_third_does_not() -> None:
    model = TwoHeads()
    shared = model.losses(batch())
    other = model.losses(batch())[1]
    rows = reference.task_gradients([shared[0], other, shared[1]], list(model.parameters()))
    expected = expect(rows, list(model.parameters()), "sum")
    plugin(model, "sum").backward([shared[0], other, shared[1]])
    assert_gradients(list(model.parameters()), expected)


def test_tasks_that_share_nothing_get_plain_gradients() -> None:
    one, two = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()
    x = batch()
    losses = [one(x).sum(), -two(x).square().sum()]
    with pytest.warns(UserWarning, match="is reached by two of the tasks, so there is nothing"):
        run_and_compare([*one.parameters(), *two.parameters()], losses)


def test_a_loss_that_reaches_nothing_is_named_once() -> None:
    model = TwoHeads()
    optimizer = plugin(model)
    stray = torch.ones((), dtype=torch.float64, requires_grad=True)
    losses = {"near": model.losses(batch())[0], "stray": stray * 2}
    with pytest.warns(UserWarning, match="the loss of 'stray' reaches none of the parameters"):
        optimizer.backward(losses, retain_graph=True)
    optimizer.backward(losses)


def test_plain_steps_all_the_time_are_noticed_once() -> None:
    """As by frameworks that call loss.backward() and optimizer.step() themselves."""
    model = TwoHeads()
    optimizer = plugin(model)

    def step() -> None:
        optimizer.zero_grad()
        sum(model.losses(batch())).backward()
        optimizer.step()

    step()
    step()
    with pytest.warns(UserWarning, match=r"backward\(losses\) of this optimizer was never called"):
        step()
    step()


def test_the_same_loss_twice() -> None:
    model = TwoHeads()
    loss = model.losses(batch())[0]
    run_and_compare(list(model.parameters()), [loss, loss])


def test_a_loss_that_is_itself_a_parameter() -> None:
    scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    run_and_compare([scale], [scale, -3 * scale.square()])


def test_losses_from_unbind_give_zero_gradients_to_each_others_heads() -> None:
    model = TwoHeads()
    losses = torch.stack(model.losses(batch())).unbind()
    run_and_compare(list(model.parameters()), losses)


def test_a_loss_computed_from_another_loss() -> None:
    model = TwoHeads()
    first, second = model.losses(batch())
    run_and_compare(list(model.parameters()), [first * second.exp(), first])


# ------------------------------------------------------------------------ kinds of parameters


def test_frozen_parameters_stay_without_gradient() -> None:
    model = TwoHeads()
    model.trunk[0].weight.requires_grad_(False)
    model.second.bias.requires_grad_(False)
    alive = [p for p in model.parameters() if p.requires_grad]
    optimizer = plugin(model)
    losses = model.losses(batch())
    expected = expect(reference.task_gradients(losses, alive), alive)
    optimizer.backward(losses)
    assert_gradients(alive, expected)
    assert model.trunk[0].weight.grad is None
    assert model.second.bias.grad is None


def test_unused_parameters_keep_none_or_what_they_had() -> None:
    model = TwoHeads()
    unused, had = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    before = had.grad = torch.full((2,), 5.0)
    optimizer = plugin([*model.parameters(), unused, had])
    optimizer.backward(model.losses(batch()))
    assert unused.grad is None
    assert had.grad is before
    assert had.grad.tolist() == [5.0, 5.0]


def test_tied_parameters_get_one_gradient() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    model[2].weight = model[0].weight
    out = model(batch())
    run_and_compare(list(model.parameters()), [out[:, 0].mean(), -out.square().mean()])


def test_a_parameter_in_one_group_twice_is_counted_once() -> None:
    p = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    with pytest.warns(UserWarning, match="duplicate"):
        base = torch.optim.SGD([p, p], lr=0.1)
    optimizer = AdaptiveGradientSurgery(base, "pcgrad")
    losses = [p[0] + p[1], p[0] - 2 * p[1]]
    expected = expect(reference.task_gradients(losses, [p]), [p], "pcgrad")
    optimizer.backward(losses)
    assert_gradients([p], expected)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_zero_size_parameters(shape: tuple[int, ...]) -> None:
    empty = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
    run_and_compare([empty, scale], [scale + empty.sum(), scale.square() - empty.sum()])


@pytest.mark.parametrize(
    "empty",
    [
        pytest.param(torch.zeros(0, 3).t(), id="transposed"),
        pytest.param(
            torch.zeros(0, 3, 2, 2).to(memory_format=torch.channels_last), id="channels_last"
        ),
    ],
)
def test_zero_size_parameters_keep_their_strides(empty: Tensor) -> None:
    p = nn.Parameter(empty)
    scale = nn.Parameter(torch.tensor(1.5))
    p.sum().backward()
    left_by_autograd = p.grad.stride()
    p.grad = None
    plugin([p, scale]).backward([scale + p.sum(), scale.square() - p.sum()])
    assert p.grad.stride() == left_by_autograd


def test_only_zero_size_parameters() -> None:
    empty = nn.Parameter(torch.zeros(0, 3))
    run_and_compare([empty], [empty.sum(), -empty.sum()])


def test_expanded_parameters() -> None:
    base = torch.randn(1, dtype=torch.float64)
    p = nn.Parameter(base.expand(4))
    weight = nn.Parameter(torch.randn(4, dtype=torch.float64))
    out = p * weight
    run_and_compare([p, weight], [out.sum(), -out.square().sum()])
    assert p.grad.is_contiguous()


@pytest.mark.parametrize(
    "tensor",
    [
        pytest.param(torch.randn(4, 3).t(), id="transposed"),
        pytest.param(torch.randn(4, 6)[:, ::2], id="holes"),
        pytest.param(torch.randn(2, 3, 4).permute(2, 0, 1), id="permuted"),
        pytest.param(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), id="nhwc"),
        pytest.param(
            torch.randn(2, 3, 2, 2, 2).to(memory_format=torch.channels_last_3d), id="ndhwc"
        ),
        pytest.param(torch.randn(3)[1], id="scalar-in-a-vector"),
    ],
)
def test_strides_are_those_that_autograd_leaves(tensor: Tensor) -> None:
    p = nn.Parameter(tensor.double())
    (p.square().sum() * 0.5).backward()
    left_by_autograd = p.grad.stride()
    p.grad = None
    run_and_compare([p], [p.sum(), -2 * p.square().sum()])
    assert p.grad.stride() == left_by_autograd


def test_complex_parameters_count_as_real_and_imaginary_parts() -> None:
    p = nn.Parameter(torch.randn(3, dtype=torch.complex128))
    q = nn.Parameter(torch.randn(3, dtype=torch.float64))
    out = p * q
    run_and_compare([p, q], [out.real.sum(), -(out.abs().square().sum()) + out.imag.sum()])


@pytest.mark.parametrize("method", ["sum", "ags", "pcgrad"])
def test_several_dtypes_in_one_model_share_one_gram_matrix(method: str) -> None:
    dtypes = (torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.float16)
    parameters = [nn.Parameter(torch.ones(3).to(dtype)) for dtype in dtypes]
    rows = [sum((k + 1) * p.real.double().sum() for k, p in enumerate(parameters))]
    rows.append(-sum((9 - 2 * k) * p.real.double()[:2].sum() for k, p in enumerate(parameters)))
    # One rounding to bfloat16, the coarsest of them, has a relative error of 2**-9.
    run_and_compare(parameters, rows, method=method, tolerance=2**-8)


def test_a_layer_wide_enough_for_the_blocked_kernels() -> None:
    model = nn.Sequential(nn.Linear(3, 3000), nn.Tanh(), nn.Linear(3000, 2))
    out = model(batch().float())
    losses = [out[:, 0].mean() + out.mean(), -out.square().mean() - 2 * out[:, 0].mean()]
    run_and_compare(list(model.parameters()), losses, tolerance=SINGLE)


def test_sparse_gradients_are_refused_by_name_and_nothing_is_changed() -> None:
    table = nn.Embedding(6, 3, sparse=True)
    head = nn.Linear(3, 2)
    named = [*table.named_parameters(prefix="table"), *head.named_parameters(prefix="head")]
    optimizer = AdaptiveGradientSurgery(torch.optim.SGD(named, lr=0.1))
    before = head.weight.grad = torch.ones(2, 3)
    out = head(table(torch.tensor([1, 2])))
    losses = [out.sum(), out.square().sum()]
    with pytest.raises(ValueError, match=r"table\.weight.*sparse"):
        optimizer.backward(losses)
    assert table.weight.grad is None
    assert head.weight.grad is before
    assert torch.equal(before, torch.ones(2, 3))
    assert optimizer.last is None
    # The graph has not been touched either.
    sum(losses).backward()
    assert table.weight.grad.is_sparse


def test_sparse_gradients_without_names_are_refused_by_position() -> None:
    table = nn.EmbeddingBag(6, 3, sparse=True, mode="sum")
    optimizer = plugin(table)
    out = table(torch.tensor([[1, 2]]))
    with pytest.raises(ValueError, match=r"0 of param_groups\[0\].*\[6, 3\].*sparse"):
        optimizer.backward([out.sum(), out.square().sum()])


def test_a_sparse_embedding_of_another_optimizer_gets_the_plain_sum() -> None:
    table = nn.Embedding(6, 3, sparse=True).double()
    head = nn.Linear(3, 2).double()
    optimizer = plugin(head)
    for turn in (1, 2):
        out = head(table(torch.tensor([1, 2, 1])))
        losses = [out.sum(), -3 * out.square().sum()]
        rows = reference.task_gradients(losses, [table.weight])
        optimizer.zero_grad()
        before = torch.zeros(6, 3) if turn == 1 else table.weight.grad.to_dense()
        optimizer.backward(losses)
        assert table.weight.grad.is_sparse
        wanted = before + rows[0][0] + rows[1][0]
        torch.testing.assert_close(table.weight.grad.to_dense(), wanted)


# ---------------------------------------------------------------------------- channels_last


FUSED: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
}


@pytest.mark.parametrize("name", sorted(FUSED))
def test_channels_last_with_fused_optimizers(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3))
    model = model.to(memory_format=torch.channels_last)
    twin = copy.deepcopy(model)
    optimizer = AdaptiveGradientSurgery(FUSED[name](model.parameters()))
    plain = FUSED[name](twin.parameters())
    for _ in range(3):
        x = torch.randn(4, 3, 6, 6).to(memory_format=torch.channels_last)
        optimizer.zero_grad()
        optimizer.backward(_image_losses(model(x)))
        rows = reference.task_gradients(_image_losses(twin(x)), list(twin.parameters()))
        for p, g in zip(twin.parameters(), expect(rows, list(twin.parameters())), strict=True):
            p.grad = torch.empty_like(p).copy_(g)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert p.grad.stride() == p.stride() == q.grad.stride()
        optimizer.step()
        plain.step()
    # Adam divides by the gradient's own size, so that a bias in front of batch norm, whose true
    # gradient is zero, takes a step made of rounding alone: it is left out.
    pairs = dict(model.named_parameters())
    for label, q in twin.named_parameters():
        if label != "0.bias":
            torch.testing.assert_close(pairs[label], q, rtol=1e-3, atol=1e-4)


def _image_losses(out: Tensor) -> list[Tensor]:
    return [out[:, 0].mean() + out.mean(), out[:, 1].square().mean() - 2 * out.mean()]


# ---------------------------------------------------------------------------- batch norm, hooks


def test_batch_norm_statistics_are_those_of_the_forward_alone() -> None:
    trunk = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model = TwoHeads(trunk)
    losses = model.losses(batch())
    before = copy.deepcopy(dict(model.named_buffers()))
    run_and_compare(list(model.parameters()), losses)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])
    assert int(before["trunk.1.num_batches_tracked"]) == 1


def test_tensor_hooks_on_parameters_act_on_each_tasks_gradient() -> None:
    model = TwoHeads()
    calls: list[Tensor] = []
    model.trunk[0].weight.register_hook(lambda g: g.clamp(-0.1, 0.1) * 3)
    model.trunk[0].bias.register_hook(lambda g: calls.append(g))
    losses = model.losses(batch())
    rows = by_backward(losses, list(model.parameters()))
    calls.clear()
    expected = expect(rows, list(model.parameters()))
    plugin(model).backward(losses)
    assert len(calls) == 2
    assert_gradients(list(model.parameters()), expected)


def test_tensor_hooks_on_activations_act_on_each_tasks_gradient() -> None:
    model, x = TwoHeads(), batch()
    h = model.trunk(x)
    h.register_hook(lambda g: g * 5)
    losses = [model.first(h).sum(), -model.second(h).square().sum()]
    run_and_compare(list(model.parameters()), losses)


def test_post_accumulate_hooks_fire_once_per_reaching_task_with_its_gradient_alone() -> None:
    model = TwoHeads()
    losses = model.losses(batch())
    weight, head = model.trunk[0].weight, model.first.weight
    rows = reference.task_gradients(losses, [weight, head])
    seen: dict[int, list[Tensor]] = {id(weight): [], id(head): []}
    for p in (weight, head):
        p.register_post_accumulate_grad_hook(lambda q: seen[id(q)].append(q.grad.clone()))
    plugin(model).backward(losses)
    assert len(seen[id(weight)]) == 2
    assert len(seen[id(head)]) == 1
    for index, gradient in enumerate(seen[id(weight)]):
        torch.testing.assert_close(gradient, rows[index][0], rtol=1e-12, atol=0)
    torch.testing.assert_close(seen[id(head)][0], rows[0][1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_post_accumulate_hook_may_change_or_replace_the_gradient(*, in_place: bool) -> None:
    model = TwoHeads()

    def halve(p: Tensor) -> None:
        if in_place:
            p.grad.mul_(0.5)
        else:
            p.grad = p.grad * 0.5

    for p in (model.trunk[0].weight, model.second.weight):
        p.register_post_accumulate_grad_hook(halve)
    losses = model.losses(batch())
    expected = expect(by_backward(losses, list(model.parameters())), list(model.parameters()))
    plugin(model).backward(losses)
    assert_gradients(list(model.parameters()), expected)


def test_a_post_accumulate_hook_may_take_the_gradient_away() -> None:
    model = TwoHeads()
    gone = [model.trunk[0].bias, model.first.bias]
    for p in gone:
        p.register_post_accumulate_grad_hook(lambda q: setattr(q, "grad", None))
    losses = model.losses(batch())
    expected = expect(by_backward(losses, list(model.parameters())), list(model.parameters()))
    plugin(model).backward(losses)
    assert all(p.grad is None for p in gone)
    assert_gradients(list(model.parameters()), expected)


@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("keeper", ["itself", "detached", "slice"])
def test_a_gradient_that_a_hook_took_for_itself_stays_what_it_was(
    keeper: str, *, replace: bool
) -> None:
    model = TwoHeads()
    taken: list[tuple[Tensor, Tensor]] = []

    def take(p: Tensor) -> None:
        kept = KEEPERS[keeper](p.grad)
        taken.append((kept, kept.clone()))
        p.grad = torch.zeros_like(p) if replace else None

    model.trunk[0].weight.register_post_accumulate_grad_hook(take)
    optimizer = plugin(model)
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.backward(model.losses(batch()))
    assert len(taken) == 4
    for mine, copied in taken:
        assert torch.equal(mine, copied)


def test_a_hook_that_takes_the_second_micro_batchs_gradient_away_leaves_none() -> None:
    model = TwoHeads()
    optimizer = plugin(model)
    optimizer.backward(model.losses(batch()), accumulate=True)
    bias = model.trunk[0].bias
    bias.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    optimizer.backward(model.losses(batch()))
    assert bias.grad is None


# ------------------------------------------------------- graphs that hide what they reach


class Checkpointed(nn.Module):
    """A layer whose activations are computed again in the backward pass."""

    def __init__(self, layer: nn.Module, *, reentrant: bool) -> None:
        super().__init__()
        self.layer = layer
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        """The layer, checkpointed."""
        return checkpoint(self.layer, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", ["sum", "ags"])
def test_activation_checkpointing(method: str, *, reentrant: bool) -> None:
    model, x = TwoHeads(), batch().requires_grad_()
    parameters = list(model.parameters())
    expected = expect(reference.task_gradients(model.losses(x), parameters), parameters, method)
    model.trunk = Checkpointed(model.trunk, reentrant=reentrant)
    optimizer = plugin(model, method)
    for _ in range(2):
        # The second time the layout already knows what the first one met.
        optimizer.zero_grad()
        optimizer.backward(model.losses(x))
        assert_gradients(parameters, expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("scope", ["shared", "all"])
def test_a_checkpointed_head_of_one_task(scope: str, *, reentrant: bool) -> None:
    model, x = TwoHeads(), batch()
    parameters = list(model.parameters())
    rows = reference.task_gradients(model.losses(x), parameters)
    model.second = Checkpointed(model.second, reentrant=reentrant)
    plugin(model, scope=scope).backward(model.losses(x))
    assert_gradients(parameters, expect(rows, parameters, scope=scope))


class ScaleWithoutGradient(torch.autograd.Function):
    """x * w, which gives w a gradient only where asked."""

    @staticmethod
    def forward(ctx: object, x: Tensor, w: Tensor, give: bool) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.give = give
        return x * w

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        return grad * w, grad * x if ctx.give else None, None


@pytest.mark.parametrize("given", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("scope", ["shared", "all"])
def test_a_function_that_returns_none_for_a_parameter(given: tuple[bool, bool], scope: str) -> None:
    w = nn.Parameter(torch.randn(3, dtype=torch.float64))
    v = nn.Parameter(torch.randn(3, dtype=torch.float64))
    losses = [
        factor * (ScaleWithoutGradient.apply(v, w, give) + w.detach()).square().sum()
        for factor, give in zip((1.0, -2.0), given, strict=True)
    ]
    rows = by_backward(losses, [w, v])
    plugin([w, v], scope=scope).backward(losses)
    assert (w.grad is None) == (given == (False, False))
    assert_gradients([w, v], expect(rows, [w, v], scope=scope))


class Reversible(torch.autograd.Function):
    """Runs its layer without a graph, and again with one inside its own backward."""

    @staticmethod
    def forward(ctx: object, x: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        with torch.no_grad():
            return layer(x)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            torch.autograd.backward(ctx.layer(x), grad)
        return x.grad, None


@pytest.mark.parametrize("scope", ["shared", "all"])
def test_a_function_that_runs_a_backward_inside_its_backward(scope: str) -> None:
    layer, head = nn.Linear(3, 3).double(), nn.Linear(3, 2).double()
    x = batch().requires_grad_()
    parameters = [*layer.parameters(), *head.parameters()]

    def losses(h: Tensor) -> list[Tensor]:
        out = head(h)
        return [out[:, 0].sum() + h.sum(), out[:, 1].square().sum() - 2 * h.sum()]

    rows = reference.task_gradients(losses(layer(x)), parameters)
    plugin(parameters, scope=scope).backward(losses(Reversible.apply(x, layer)))
    assert_gradients(parameters, expect(rows, parameters, scope=scope))


def test_inputs_and_a_reentrant_checkpoint_are_refused_as_by_torch() -> None:
    """A backward pass inside of a node knows nothing of the leaves that were chosen outside."""
    one, two = nn.Linear(3, 3).double(), nn.Linear(3, 2).double()
    x = batch().requires_grad_()
    out = checkpoint(lambda t: two(one(t).tanh()), x, use_reentrant=True)
    optimizer = plugin(one)
    with pytest.raises(RuntimeError, match=r"incompatible with \.grad"):
        optimizer.backward(_pair(out), inputs=[*one.parameters(), x])
    assert x.grad is None
    assert grads(one) == grads(two) == [None, None]


def _pair(out: Tensor) -> list[Tensor]:
    return [out[:, 0].sum() + out.sum(), out[:, 1].square().sum() - 2 * out.sum()]


# ---------------------------------------------------------------------------------- compiled


@pytest.fixture(name="compiler")
def _compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A compiler without memory of earlier tests: a cache can hide the donated buffers."""
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    torch.compiler.reset()
    yield
    torch.compiler.reset()


BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


def _small() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


@pytest.mark.usefixtures("compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shared", [True, False])
def test_a_compiled_model(backend: str, *, shared: bool) -> None:
    model = _small()
    parameters = list(model.parameters())
    x, y = torch.randn(5, 3), torch.randn(5, 3)
    first, second = _pair(model(x)), _pair(model(x if shared else y))
    expected = expect(reference.task_gradients([first[0], second[1]], parameters), parameters)
    optimizer = plugin(parameters)
    with functorch_config.patch(donated_buffer=False):
        compiled = torch.compile(model, backend=backend)
        for _ in range(2):
            optimizer.zero_grad()
            out = compiled(x)
            other = out if shared else compiled(y)
            optimizer.backward([_pair(out)[0], _pair(other)[1]])
            assert_gradients(parameters, expected, SINGLE)


@pytest.mark.usefixtures("compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_donated_buffers_are_explained_and_p_grad_stays(backend: str) -> None:
    model, x = _small(), torch.randn(5, 3)
    with functorch_config.patch(donated_buffer=True):
        compiled = torch.compile(model, backend=backend)
        # Compiled by a plain backward, which lets it give its saved tensors away.
        compiled(x).square().sum().backward()
        before = grads(model)
        values = [g.clone() for g in before]
        losses = _pair(compiled(x))
        with pytest.raises(RuntimeError, match="donated_buffer = False before the model is"):
            plugin(model).backward(losses)
    for now, then, value in zip(grads(model), before, values, strict=True):
        assert now is then
        assert torch.equal(now, value)


# --------------------------------------------------------------------- who else is reached


def test_two_plugins_on_disjoint_parts_of_one_model() -> None:
    model = TwoHeads()
    trunk, heads = (
        list(model.trunk.parameters()),
        [*model.first.parameters(), *model.second.parameters()],
    )
    losses = model.losses(batch())
    expected = [
        *expect(reference.task_gradients(losses, trunk), trunk),
        *expect(reference.task_gradients(losses, heads), heads, "pcgrad", "all"),
    ]
    first, second = plugin(trunk), plugin(heads, "pcgrad", scope="all")
    first.backward(losses, retain_graph=True, inputs=trunk)
    assert all(p.grad is None for p in heads)
    kept = grads(trunk)
    second.backward(losses, inputs=heads)
    assert all(p.grad is g for p, g in zip(trunk, kept, strict=True))
    assert_gradients([*trunk, *heads], expected)


def test_two_optimizers_that_share_losses_and_micro_batches() -> None:
    model = TwoHeads()
    trunk, heads = list(model.trunk.parameters()), list(model.first.parameters())
    batches = [model.losses(batch()), model.losses(batch())]
    rows = reference.add_gradients(
        *(reference.task_gradients(losses, [*trunk, *heads]) for losses in batches)
    )
    expected = [
        *expect([row[:2] for row in rows], trunk),
        *expect([row[2:] for row in rows], heads),
    ]
    first, second = plugin(trunk), plugin(heads)
    for losses, waiting in zip(batches, (True, False), strict=True):
        first.backward(losses, retain_graph=True, accumulate=waiting, inputs=trunk)
        # Only the first loss reaches what the second optimizer holds, and that is said.
        said = (
            nullcontext() if waiting else pytest.warns(UserWarning, match="'task_1' reaches none")
        )
        with said:
            second.backward(losses, accumulate=waiting, inputs=heads)
    assert_gradients([*trunk, *heads], expected)


def test_the_rest_of_a_model_gets_the_plain_sum() -> None:
    model = TwoHeads()
    trunk = list(model.trunk.parameters())
    rest = [*model.first.parameters(), *model.second.parameters()]
    there = rest[0].grad = torch.ones_like(rest[0])
    losses = model.losses(batch())
    rows = reference.task_gradients(losses, rest)
    total = [reference.add(a, b) for a, b in zip(*rows, strict=True)]
    total[0] = total[0] + 1
    expected = expect(reference.task_gradients(losses, trunk), trunk)
    optimizer, plain = plugin(trunk), torch.optim.SGD(rest, lr=0.1)
    optimizer.backward(losses)
    assert rest[0].grad is there
    assert_gradients([*trunk, *rest], [*expected, *total])
    before = rest[1].detach().clone()
    plain.step()
    torch.testing.assert_close(rest[1], before - 0.1 * total[1])


def test_inputs_and_retained_activations_get_the_plain_sum() -> None:
    model, x = TwoHeads(), batch().requires_grad_()
    h = model.trunk(x)
    losses = [model.first(h).sum(), -model.second(h).square().sum()]
    rows = reference.task_gradients(losses, [x, h])
    h.retain_grad()
    plugin(model).backward(losses)
    torch.testing.assert_close(x.grad, rows[0][0] + rows[1][0])
    torch.testing.assert_close(h.grad, rows[0][1] + rows[1][1])


# ------------------------------------------------------------------- lifetime of the graphs


class Packed:
    """A saved tensor, in a box of its own whose life can be watched."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def test_a_graph_is_freed_before_the_next_tasks_backward() -> None:
    model = TwoHeads()
    boxes: list[list[weakref.ref[Packed]]] = [[], []]
    losses: list[Tensor] = []
    for task in range(2):

        def pack(tensor: Tensor, task: int = task) -> Packed:
            box = Packed(tensor)
            boxes[task].append(weakref.ref(box))
            return box

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
            losses.append(model.losses(batch())[task] * torch.tensor(2.0, requires_grad=True))
    alive: list[int] = []
    losses[1].register_hook(lambda g: alive.append(_count_alive(boxes[0])))
    gc.disable()
    try:
        assert _count_alive(boxes[0]) > 0
        plugin(model).backward(losses)
        assert alive == [0]
        assert _count_alive(boxes[1]) == 0
    finally:
        gc.enable()


def test_a_shared_trunk_is_freed_by_the_last_task_that_needs_it() -> None:
    model, other = TwoHeads(), TwoHeads()
    boxes: list[weakref.ref[Packed]] = []

    def pack(tensor: Tensor) -> Packed:
        box = Packed(tensor)
        boxes.append(weakref.ref(box))
        return box

    x = batch()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        h = model.trunk(x)
    first, second = model.first(h).sum(), -model.second(h).square().sum()
    third = other.losses(x)[0]
    alive: list[int] = []
    second.register_hook(lambda g: alive.append(_count_alive(boxes)))
    third.register_hook(lambda g: alive.append(_count_alive(boxes)))
    plugin([*model.parameters(), *other.parameters()], "sum").backward([first, second, third])
    assert alive[0] > 0
    assert alive[1] == 0


def _count_alive(boxes: list[weakref.ref[Packed]]) -> int:
    return sum(box() is not None for box in boxes)


@pytest.mark.parametrize("number", [0, 1])
def test_a_plain_backward_through_a_used_graph_raises(number: int) -> None:
    model = TwoHeads()
    losses = model.losses(batch())
    plugin(model).backward(losses)
    with pytest.raises(RuntimeError, match="second time"):
        (losses[number] * 1).backward()


def test_retain_graph_keeps_every_graph() -> None:
    model = TwoHeads()
    losses = [*model.losses(batch()), model.losses(batch())[0]]
    optimizer = plugin(model, "sum")
    optimizer.backward(losses, retain_graph=True)
    once = [g.clone() for g in grads(model)]
    optimizer.backward(losses, retain_graph=True)
    for now, before in zip(grads(model), once, strict=True):
        torch.testing.assert_close(now, 2 * before)
    sum(losses).backward()
    for now, before in zip(grads(model), once, strict=True):
        torch.testing.assert_close(now, 3 * before)


LONG_CHAIN = """
import torch
from gradsurgery import AdaptiveGradientSurgery

p = torch.nn.Parameter(torch.ones(()))
h = p
for _ in range(60_000):
    h = h * 1.0
losses = [h, h * 2]
del h
AdaptiveGradientSurgery(torch.optim.SGD([p], lr=0.1), "sum").backward(losses)
assert p.grad == 3
del losses
print("alive")
"""


def test_a_graph_of_sixty_thousand_nodes_in_a_row_does_not_end_the_process() -> None:
    # Nodes that Python has looked at are freed recursively: the stack may not be enough.
    done = subprocess.run([sys.executable, "-c", LONG_CHAIN], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "alive"


# -------------------------------------------------------------------- gradients already there


def test_a_gradient_that_is_there_is_added_to_in_place() -> None:
    model = TwoHeads()
    parameters = list(model.parameters())
    losses = model.losses(batch())
    expected = expect(reference.task_gradients(losses, parameters), parameters)
    there = [torch.full_like(p, 0.25) for p in parameters]
    for p, gradient in zip(parameters, there, strict=True):
        p.grad = gradient
    plugin(model).backward(losses)
    assert all(p.grad is gradient for p, gradient in zip(parameters, there, strict=True))
    assert_gradients(parameters, [g + 0.25 for g in expected])


@pytest.mark.parametrize("owned", [True, False])
def test_a_sparse_gradient_that_is_there_is_added_to_as_autograd_does(*, owned: bool) -> None:
    table = nn.Embedding(6, 3, sparse=True).double()
    head = nn.Linear(3, 2).double()
    table(torch.tensor([1, 2])).sum().backward()
    before = table.weight.grad.to_dense()
    optimizer = plugin([table.weight, *head.parameters()] if owned else head, "sum")
    losses = _pair(head(table.weight))
    rows = reference.task_gradients(losses, [table.weight])
    optimizer.backward(losses)
    torch.testing.assert_close(table.weight.grad.to_dense(), before + rows[0][0] + rows[1][0])
    assert table.weight.grad.layout == torch.strided


KEEPERS: dict[str, Callable[[Tensor], object]] = {
    "itself": lambda g: g,
    "detached": lambda g: g.detach(),
    "slice": lambda g: g[:1],
    "numpy": lambda g: g.numpy(),
    "another-parameters-grad": lambda g: _parameter_with(g),
    "saved-for-backward": lambda g: (g * torch.ones_like(g, requires_grad=True)).sum(),
}


def _parameter_with(gradient: Tensor) -> nn.Parameter:
    p = nn.Parameter(torch.zeros_like(gradient))
    p.grad = gradient
    return p


def _read(kept: object) -> Tensor:
    if isinstance(kept, nn.Parameter):
        return kept.grad
    if isinstance(kept, Tensor) and kept.grad_fn is not None:
        (leaf,) = torch.autograd.grad(kept, _leaf_of(kept), retain_graph=True)
        return leaf
    return torch.as_tensor(kept)


def _leaf_of(kept: Tensor) -> Tensor:
    product = kept.grad_fn.next_functions[0][0]
    return product.next_functions[1][0].variable


@pytest.mark.parametrize("keeper", sorted(KEEPERS))
def test_a_gradient_that_somebody_kept_is_not_overwritten(keeper: str) -> None:
    model = TwoHeads()
    optimizer = plugin(model)
    optimizer.backward(model.losses(batch()))
    # The trunk's gradient is a surgery's outcome, the head's a row of its own.
    for name in ("trunk.0.weight", "first.weight"):
        kept = KEEPERS[keeper](dict(model.named_parameters())[name].grad)
        copied = _read(kept).clone()
        optimizer.zero_grad()
        optimizer.backward(model.losses(batch()))
        assert torch.equal(_read(kept), copied)
        del kept


def test_memory_is_used_again_when_nobody_kept_a_gradient() -> None:
    model = TwoHeads()
    optimizer = plugin(model)
    places = set()
    for _ in range(4):
        optimizer.zero_grad()
        optimizer.backward(model.losses(batch()))
        places.add(model.trunk[0].weight.grad.data_ptr())
    assert len(places) == 1


MEDDLERS: dict[str, Callable[[nn.Module], object]] = {
    "data-replaced": lambda m: [
        setattr(p.grad, "data", p.grad.data / 2) for p in m.trunk.parameters()
    ],
    "set": lambda m: [p.grad.set_(torch.zeros_like(p)) for p in m.trunk.parameters()],
    "another-dtype-and-back": lambda m: m.float().double(),
    "requires-grad": lambda m: [p.grad.requires_grad_() for p in m.trunk.parameters()],
    "resized": lambda m: [p.grad.resize_(0) for p in m.trunk.parameters()],
    "transposed-in-place": lambda m: [p.grad.t_() for p in m.trunk.parameters()],
    "written-to": lambda m: [p.grad.fill_(float("nan")) for p in m.trunk.parameters()],
}


@pytest.mark.parametrize("meddler", sorted(MEDDLERS))
def test_what_the_user_does_to_p_grad_does_not_reach_the_next_step(meddler: str) -> None:
    model, x = TwoHeads(), batch()
    model.float().double()
    parameters = list(model.parameters())
    optimizer = plugin(model)
    expected = expect(reference.task_gradients(model.losses(x), parameters), parameters)
    for _ in range(2):
        optimizer.backward(model.losses(x))
        assert_gradients(parameters, expected, 1e-5 if "dtype" in meddler else EXACT)
        assert not any(p.grad.requires_grad for p in parameters)
        MEDDLERS[meddler](model)
        optimizer.zero_grad()
    optimizer.backward(model.losses(x))
    assert_gradients(parameters, expected, 1e-5 if "dtype" in meddler else EXACT)
    assert not any(p.grad.requires_grad for p in parameters)


def test_a_swapping_conversion_to_another_dtype_and_back() -> None:
    model, x = TwoHeads(), batch()
    parameters = list(model.parameters())
    optimizer = plugin(model)
    optimizer.backward(model.losses(x))
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.float().double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    parameters = list(model.parameters())
    optimizer.zero_grad()
    losses = model.losses(x)
    expected = expect(reference.task_gradients(losses, parameters), parameters)
    optimizer.backward(losses)
    assert_gradients(parameters, expected)


# ------------------------------------------------------------------------------- micro-batches


@pytest.mark.parametrize("scope", ["shared", "all"])
def test_micro_batches_with_different_reach(scope: str) -> None:
    model = TwoHeads()
    parameters = list(model.parameters())
    first, second = model.losses(batch()), model.losses(batch())
    # The other way round: each head is reached by both tasks in the end.
    batches = [[first[0], first[1]], [second[1] * 0.5, second[0]]]
    rows = reference.add_gradients(
        *(reference.task_gradients(losses, parameters) for losses in batches)
    )
    optimizer = plugin(model, scope=scope)
    optimizer.backward(batches[0], accumulate=True)
    assert grads(model) == [None] * len(parameters)
    optimizer.backward(batches[1])
    assert_gradients(parameters, expect(rows, parameters, scope=scope))


def test_a_parameter_frozen_between_micro_batches_keeps_its_first_gradient() -> None:
    model, twin = TwoHeads(), None
    twin = copy.deepcopy(model)
    optimizer = plugin(model, "sum")
    plain = torch.optim.SGD(twin.parameters(), lr=0.1)
    x, y = batch(), batch()
    optimizer.backward(model.losses(x), accumulate=True)
    sum(twin.losses(x)).backward()
    for either in (model, twin):
        either.trunk[0].weight.requires_grad_(False)
    optimizer.backward(model.losses(y))
    sum(twin.losses(y)).backward()
    assert_gradients(list(model.parameters()), grads(twin))
    optimizer.step()
    plain.step()


def test_a_parameter_thawed_or_added_between_micro_batches_joins_in() -> None:
    model = TwoHeads()
    late = nn.Parameter(torch.randn(3, dtype=torch.float64))
    weight = model.trunk[0].weight.requires_grad_(False)
    parameters = [*model.parameters(), late]
    optimizer = plugin(model)
    batches = [model.losses(batch())]
    rows = reference.task_gradients(batches[0], [p for p in parameters if p is not weight][:-1])
    optimizer.backward(batches[0], accumulate=True)
    weight.requires_grad_(True)
    optimizer.add_param_group({"params": [late]})
    losses = [loss * late.sum().exp() for loss in model.losses(batch())]
    alive = [p for p in parameters if p is not weight and p is not late]
    padded = []
    for row in rows:
        found = dict(zip(map(id, alive), row, strict=True))
        padded.append([found.get(id(p)) for p in parameters])
    total = reference.add_gradients(padded, reference.task_gradients(losses, parameters))
    optimizer.backward(losses)
    assert_gradients(parameters, expect(total, parameters))


def test_zero_grad_drops_micro_batches_that_wait() -> None:
    model, x = TwoHeads(), batch()
    optimizer = plugin(model)
    optimizer.backward(model.losses(batch()), accumulate=True)
    optimizer.zero_grad()
    optimizer.backward(model.losses(x))
    parameters = list(model.parameters())
    expected = expect(reference.task_gradients(model.losses(x), parameters), parameters)
    assert_gradients(parameters, expected)


# ---------------------------------------------------------------------------------- exceptions


class Interrupted(KeyboardInterrupt):
    """Told apart from a real one."""


@pytest.mark.parametrize("error", [RuntimeError("boom"), Interrupted("stop"), ValueError("no")])
@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("where", ["activation", "parameter", "post-accumulate", "rest"])
def test_an_exception_in_the_second_backward_leaves_no_trace(
    error: BaseException, where: str, *, there: bool
) -> None:
    model, x = TwoHeads(), batch().requires_grad_()
    rest = nn.Parameter(torch.ones(3, dtype=torch.float64))
    leaves = [*model.parameters(), x, rest]
    optimizer = plugin(model)
    if there:
        optimizer.backward([loss * rest.sum() for loss in model.losses(x)])
    before = [p.grad for p in leaves]
    copies = [None if g is None else g.clone() for g in before]
    handle = _raise_in_second_task(model, rest, where, error)
    with pytest.raises(type(error)) as caught:
        optimizer.backward([loss * rest.sum() for loss in model.losses(x)])
    assert str(error) in str(caught.value)
    for p, gradient, value in zip(leaves, before, copies, strict=True):
        assert p.grad is gradient
        assert gradient is None or torch.equal(gradient, value)
    handle.remove()
    model.zero_grad()
    losses = model.losses(x)
    parameters = list(model.parameters())
    expected = expect(reference.task_gradients(losses, parameters), parameters)
    optimizer.backward(losses)
    assert_gradients(parameters, expected)


def _raise_in_second_task(
    model: TwoHeads, rest: Tensor, where: str, error: BaseException
) -> torch.utils.hooks.RemovableHandle:
    calls: list[int] = []

    def boom(_: Tensor) -> None:
        calls.append(1)
        if len(calls) == 2 or where == "activation":
            raise error

    if where == "activation":
        # Only the second task comes through the second head.
        return model.second.register_forward_hook(
            lambda module, inputs, out: out.register_hook(boom) and None
        )
    if where == "rest":
        return rest.register_hook(boom)
    weight = model.trunk[0].weight
    if where == "parameter":
        return weight.register_hook(boom)
    return weight.register_post_accumulate_grad_hook(boom)


def test_an_exception_drops_the_micro_batches_that_wait() -> None:
    model, x = TwoHeads(), batch()
    optimizer = plugin(model)
    optimizer.backward(model.losses(batch()), accumulate=True)
    handle = model.trunk[0].weight.register_hook(lambda g: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.backward(model.losses(x))
    handle.remove()
    parameters = list(model.parameters())
    assert grads(model) == [None] * len(parameters)
    expected = expect(reference.task_gradients(model.losses(x), parameters), parameters)
    optimizer.backward(model.losses(x))
    assert_gradients(parameters, expected)


def test_a_used_graph_is_reported_and_p_grad_stays() -> None:
    model = TwoHeads()
    losses = model.losses(batch())
    optimizer = plugin(model)
    optimizer.backward(losses)
    before = grads(model)
    copies = [g.clone() for g in before]
    with pytest.raises(RuntimeError, match="second time"):
        optimizer.backward(losses)
    for now, then, value in zip(grads(model), before, copies, strict=True):
        assert now is then
        assert torch.equal(now, value)


# ------------------------------------------------------------ parameters that change in between


@pytest.mark.parametrize("cleared", [True, False])
def test_another_dtype_between_steps(*, cleared: bool) -> None:
    model = TwoHeads().float()
    optimizer = plugin(model)
    optimizer.backward(model.losses(batch().float()))
    before = [torch.zeros_like(p).double() for p in model.parameters()]
    if cleared:
        optimizer.zero_grad()
    else:
        before = [p.grad.double() for p in model.parameters()]
    model.double()
    losses, parameters = model.losses(batch()), list(model.parameters())
    expected = expect(reference.task_gradients(losses, parameters), parameters)
    optimizer.backward(losses)
    wanted = [b + g for b, g in zip(before, expected, strict=True)]
    assert_gradients(parameters, wanted)


def test_another_memory_format_between_steps() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 2, 3)).double()
    optimizer = plugin(model)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    optimizer.backward(_image_losses(model(x)))
    optimizer.zero_grad()
    model.to(memory_format=torch.channels_last)
    losses, parameters = _image_losses(model(x)), list(model.parameters())
    expected = expect(reference.task_gradients(losses, parameters), parameters)
    optimizer.backward(losses)
    assert_gradients(parameters, expected)
    for p in parameters:
        assert p.grad.stride() == p.stride()


def test_a_parameter_whose_shape_changes_between_steps() -> None:
    p = nn.Parameter(torch.randn(3, dtype=torch.float64))
    optimizer = plugin([p])
    optimizer.backward([p.sum(), -2 * p.square().sum()])
    optimizer.zero_grad()
    p.data = torch.randn(2, 5, dtype=torch.float64)
    losses = [p.sum(), -2 * p.square().sum()]
    expected = expect(reference.task_gradients(losses, [p]), [p])
    optimizer.backward(losses)
    assert_gradients([p], expected)


def test_the_number_of_tasks_may_change_between_steps() -> None:
    model = TwoHeads()
    parameters = list(model.parameters())
    optimizer = plugin(model, "sum")
    for count in (2, 3, 1, 2):
        losses = (model.losses(batch()) + model.losses(batch()))[:count]
        expected = expect(reference.task_gradients(losses, parameters), parameters, "sum")
        optimizer.zero_grad()
        optimizer.backward(losses)
        assert_gradients(parameters, expected)


def test_deepcopy_of_model_and_optimizer_together() -> None:
    model = TwoHeads()
    optimizer = plugin(model)
    x = batch()
    optimizer.backward(model.losses(x))
    optimizer.step()
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert one.data_ptr() != other.data_ptr()
    untouched = [p.detach().clone() for p in model.parameters()]
    twin_optimizer.zero_grad()
    twin_optimizer.backward(twin.losses(x))
    twin_optimizer.step()
    for p, value in zip(model.parameters(), untouched, strict=True):
        assert torch.equal(p, value)
    optimizer.zero_grad()
    optimizer.backward(model.losses(x))
    optimizer.step()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)


def test_inside_autocast_and_no_grad() -> None:
    model = TwoHeads().float()
    parameters = list(model.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model.losses(batch().float())
        rows = reference.task_gradients(losses, parameters)
        with torch.no_grad():
            plugin(model).backward(losses)
    assert_gradients(parameters, expect(rows, parameters), SINGLE)


def test_one_loss_is_a_plain_backward() -> None:
    model = TwoHeads()
    twin = copy.deepcopy(model)
    x = batch()
    optimizer = plugin(model)
    for _ in range(2):
        optimizer.backward([model.losses(x)[0]])
        twin.losses(x)[0].backward()
        for one, other in zip(grads(model), grads(twin), strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)


def test_two_plugins_with_one_loss_each_fill_nothing_twice():
    """`inputs` means the same for a single loss as for several."""
    encoder, head = nn.Linear(3, 4), nn.Linear(4, 1)
    first = AdaptiveGradientSurgery(torch.optim.SGD(encoder.parameters(), lr=0.1))
    second = AdaptiveGradientSurgery(torch.optim.SGD(head.parameters(), lr=0.1))
    loss = head(encoder(torch.ones(2, 3))).square().mean()
    wanted = torch.autograd.grad(
        loss, [*encoder.parameters(), *head.parameters()], retain_graph=True
    )
    first.backward([loss], retain_graph=True, inputs=list(encoder.parameters()))
    assert all(p.grad is None for p in head.parameters())
    second.backward([loss], inputs=list(head.parameters()))
    found = [p.grad for p in (*encoder.parameters(), *head.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch has no grad_dtype")
def test_gradients_of_another_dtype_are_refused():
    """Before anything is changed, and by name."""
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    p.grad_dtype = torch.float32
    optimizer = AdaptiveGradientSurgery(torch.optim.SGD([("weight", p)], lr=0.1))
    with pytest.raises(ValueError, match=r"'weight' .* grad_dtype torch.float32"):
        optimizer.backward([p.sum(), p.square().sum()])
    assert p.grad is None
