"""What only a CUDA device can show; skipped without one."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradsurgery import AdaptiveGradientSurgery, kernels, methods
from gradsurgery.kernels import reference
from gradsurgery.methods._projection import draw_orders

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def sync_mode_restored() -> Iterator[None]:
    """Whatever a test switched on, the mode is back to normal after it."""
    yield
    torch.cuda.set_sync_debug_mode("default")


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64))
        self.heads = nn.ModuleList([nn.Linear(64, 1) for _ in range(3)])

    def losses(self, x: Tensor) -> list[Tensor]:
        features = self.trunk(x)
        return [(h(features) - (-2) ** t).square().mean() for t, h in enumerate(self.heads)]


def trained(model: TwoHeads, x: Tensor, method: str, steps: int = 5) -> list[Tensor]:
    plugin = AdaptiveGradientSurgery(torch.optim.SGD(model.parameters(), lr=1e-2), method)
    for _ in range(steps):
        plugin.zero_grad()
        # Two tasks: the order of more is drawn on the device, in another stream than on the CPU.
        plugin.backward(model.losses(x)[:2])
        plugin.step()
    return [p.detach().cpu() for p in model.parameters()]


@pytest.mark.parametrize("method", methods.available())
def test_same_training_as_on_the_cpu(method: str) -> None:
    model, x = TwoHeads().double(), torch.randn(16, 32, dtype=torch.float64)
    twin = copy.deepcopy(model).cuda()
    for a, b in zip(trained(model, x, method), trained(twin, x.cuda(), method), strict=True):
        # float64 on both sides, sums in another order.
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", methods.available())
@pytest.mark.usefixtures("sync_mode_restored")
def test_nothing_waits_for_the_device(method: str) -> None:
    model, x = TwoHeads().cuda(), torch.randn(16, 32, device="cuda")
    base = torch.optim.AdamW(model.parameters(), fused=True)
    plugin = AdaptiveGradientSurgery(base, method)
    for attempt in range(3):
        plugin.zero_grad()
        losses = model.losses(x)
        # The first two calls warm up libraries and fill the layout.
        torch.cuda.set_sync_debug_mode("error" if attempt == 2 else "default")
        plugin.backward(losses)
        plugin.step()
    torch.cuda.set_sync_debug_mode("default")
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("count", [1, 2, 8, 40])
@pytest.mark.parametrize("width", [1, 1000, 3_000_001])
def test_kernels_against_the_definition(count: int, width: int, dtype: torch.dtype) -> None:
    gradients = torch.randn(count, width, device="cuda").to(dtype)
    weights = torch.linspace(-1, 2, count, device="cuda", dtype=torch.float64)
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        gram, combined = kernels.gram(gradients), kernels.combine(gradients, weights)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    lengths = reference.gram(gradients).diagonal().sqrt()
    error = (gram - reference.gram(gradients)).abs() / (lengths[:, None] * lengths)
    assert float(error.max()) <= max(kernels.relative_error(gradients), 1e-12)
    wanted = reference.combine(gradients, weights)
    tolerance = torch.finfo(dtype).eps
    assert float((combined.double() - wanted).norm()) <= tolerance * float(wanted.norm())


@pytest.mark.parametrize("method", methods.available())
def test_a_whole_step_in_a_cuda_graph(method: str) -> None:
    """Surgery and a capturable optimizer's step, captured once: the same as step by step."""
    model, x = TwoHeads().cuda(), torch.randn(16, 32, device="cuda")
    twin = copy.deepcopy(model)

    def stepper(model: TwoHeads) -> Callable[[], None]:
        base = torch.optim.AdamW(model.parameters(), capturable=True)
        plugin = AdaptiveGradientSurgery(base, method)

        def step() -> None:
            plugin.zero_grad()
            plugin.backward(model.losses(x)[:2])
            plugin.step()

        return step

    captured, eager = stepper(model), stepper(twin)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            captured()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured()
    for _ in range(5):
        graph.replay()
    for _ in range(8):
        eager()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_every_replay_of_a_graph_draws_another_order() -> None:
    shape, device = torch.Size([8]), torch.device("cuda", torch.cuda.current_device())
    draw_orders(shape, device, shared=True, generator=None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        orders = draw_orders(shape, device, shared=True, generator=None)
    found = set()
    for _ in range(5):
        graph.replay()
        found.add(tuple(orders[0].tolist()))
    assert len(found) == 5


def test_mixed_precision_with_a_skipped_step() -> None:
    model, x = TwoHeads().cuda(), torch.randn(16, 32, device="cuda")
    plugin = AdaptiveGradientSurgery(torch.optim.AdamW(model.parameters(), fused=True))
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
    before = [p.detach().clone() for p in model.parameters()]
    moved = False
    for _ in range(40):
        with torch.autocast("cuda", dtype=torch.float16):
            losses = [loss.float() for loss in model.losses(x)]
        plugin.zero_grad()
        plugin.backward(scaler.scale(losses))
        scaler.step(plugin)
        scaler.update()
        moved = any(
            not torch.equal(p.detach(), q) for p, q in zip(model.parameters(), before, strict=True)
        )
    assert moved
    assert scaler.get_scale() < 2.0**40
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.fixture
def nccl() -> Iterator[None]:
    """A group of this process alone: what NCCL is asked for, if not what it does between two."""
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("sharded", [False, True], ids=["process_group", "fully_shard"])
@pytest.mark.usefixtures("nccl", "sync_mode_restored")
def test_a_group_of_one(sharded: bool) -> None:
    x = torch.randn(16, 32, device="cuda")
    model = TwoHeads().cuda()
    expected = trained(copy.deepcopy(model), x, "ags")
    if sharded:
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        fully_shard(model)
        register_fsdp_forward_method(model, "losses")
    group = None if sharded else dist.group.WORLD
    base = torch.optim.SGD(model.parameters(), lr=1e-2)
    plugin = AdaptiveGradientSurgery(base, process_group=group)
    for step in range(5):
        plugin.zero_grad()
        losses = model.losses(x)[:2]
        # The first call compares parameters; fully_shard's own backward is not ours to judge.
        if step and not sharded:
            torch.cuda.set_sync_debug_mode("error")
        plugin.backward(losses)
        torch.cuda.set_sync_debug_mode("default")
        plugin.step()
    for p, wanted in zip(model.parameters(), expected, strict=True):
        found = p.full_tensor() if sharded else p
        # Five steps in float32, sums in another order.
        torch.testing.assert_close(found.detach().cpu(), wanted, rtol=1e-5, atol=1e-6)
