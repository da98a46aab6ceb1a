"""`parallelize_module`: layers whose weights are spread over processes, beside plain ones."""

from __future__ import annotations

import warnings

import pytest
import torch
from launch import Processes
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from gradsurgery import AdaptiveGradientSurgery

# float32, three steps: sums in another order.
TOLERANCE = 1e-6


class Net(nn.Module):
    """Two layers to be spread, one plain layer, and heads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 6)
        self.plain = nn.Linear(6, 5)
        self.heads = nn.ModuleList(nn.Linear(5, 1) for _ in range(3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.plain(self.second(self.first(x).tanh())).tanh()
        return {str(t): (h(z) - (-2.0) ** t).square().mean() for t, h in enumerate(self.heads)}


def train(mesh_shape: tuple[int, ...], method: str, options: dict[str, object]) -> Tensor:
    """Every gradient of the third step, whole; without a mesh, of one process."""
    model = Net()
    if mesh_shape:
        names = ("data", "tensor")[-len(mesh_shape) :]
        mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
        plan = {"first": ColwiseParallel(), "second": RowwiseParallel()}
        parallelize_module(model, mesh["tensor"], plan)
        if len(mesh_shape) == 2:
            fully_shard(model, mesh=mesh["data"])
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = AdaptiveGradientSurgery(base, method, **options)  # type: ignore[arg-type]
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        optimizer.zero_grad()
        optimizer.backward(model(x))
        optimizer.step()
    with warnings.catch_warnings():
        # torch's own, of the order in which a part of a part is gathered.
        warnings.simplefilter("ignore")
        grads = [p.grad for p in model.parameters()]
        whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]
    return torch.cat([g.flatten() for g in whole])


OPTIONS: dict[str, dict[str, object]] = {
    "shared": {},
    "all": {"scope": "all"},
    "parts": {"granularity": "parameter"},
    "every": {"every": 2},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("method", ["sum", "ags", "mgda"])
def test_as_one_process(two: Processes, method: str, options: str) -> None:
    wanted = train((), method, OPTIONS[options])
    first, second = two(train, (2,), method, OPTIONS[options])
    assert torch.equal(first, second)
    assert (first - wanted).norm() <= TOLERANCE * wanted.norm()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sum", "ags", "mgda"])
def test_beside_fully_shard(four: Processes, method: str) -> None:
    wanted = train((), method, {})
    found = four(train, (2, 2), method, {})
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert (found[0] - wanted).norm() <= TOLERANCE * wanted.norm()
