"""The design's ten invariants, each by name with a test that can fail."""

from __future__ import annotations

import gc
import inspect
import io
import resource
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from contract import MEASURING
from inside import arrange, operate, rows_of
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from gradsurgery import AdaptiveGradientSurgery, aggregate, methods
from gradsurgery.kernels import _backend, blocked, tasks
from gradsurgery.methods._projection import draw_orders

NAMES = MEASURING
# What makes the host wait for the device, or needs a result to go on.
WAITS = (
    "_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "unique", "masked_select",
    "eigh", "svd", "lstsq", "_linalg_check_errors", "multinomial",
)  # fmt: skip


class Recorder(TorchDispatchMode):
    """Notes every operation that reaches the dispatcher: name, tensors in, tensors out."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[Tensor], list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = [a for a in (*args, *(kwargs or {}).values()) if isinstance(a, Tensor)]
        outputs = [o for o in (out if isinstance(out, tuple) else (out,)) if isinstance(o, Tensor)]
        self.calls.append((func.name(), inputs, outputs))
        return out

    def names(self) -> list[str]:
        return [name for name, _, _ in self.calls]


@contextmanager
def recorded() -> Iterator[Recorder]:
    with Recorder() as recorder:
        yield recorder


class Shared(nn.Module):
    """A trunk of `depth` layers and a head for each of `tasks` tasks."""

    def __init__(self, tasks: int = 2, depth: int = 2, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(*[nn.Linear(width, width) for _ in range(depth)])
        self.heads = nn.ModuleList([nn.Linear(width, 1) for _ in range(tasks)])
        self.x = torch.randn(8, width)

    def losses(self) -> list[Tensor]:
        features = self.trunk(self.x).tanh()
        # Every second task wants the opposite: there is always a conflict.
        return [
            (head(features) - (-1) ** t * (t + 1)).square().mean()
            for t, head in enumerate(self.heads)
        ]


def prepared(model: nn.Module, **kwargs: Any) -> AdaptiveGradientSurgery:
    return AdaptiveGradientSurgery(torch.optim.SGD(model.parameters(), lr=0.01), **kwargs)


def added_ops(tasks: int, depth: int, method: str) -> Counter[str]:
    """What a call of backward runs beyond the backward passes, once everything is in place."""
    model = Shared(tasks, depth)
    optimizer = prepared(model, method=method)
    for _ in range(2):
        optimizer.zero_grad()
        losses = model.losses()
        with recorded() as ours:
            optimizer.backward(losses)
    # The same passes by hand: into gradients that are there for the trunk, fresh ones for heads.
    model.zero_grad()
    for p in model.trunk.parameters():
        p.grad = torch.zeros_like(p)
    losses = model.losses()
    with recorded() as plain:
        for loss in losses:
            loss.backward(retain_graph=True)
    counted = Counter(ours.names())
    counted.subtract(Counter(plain.names()))
    return +counted


def test_invariant_1_methods_see_nothing_of_size_d() -> None:
    """The one way in takes [..., T, T] and refuses anything else."""
    for name in NAMES:
        with pytest.raises(ValueError, match="T, T"):
            methods.resolve(name).weights(torch.ones(2, 1000))
        accepted = inspect.signature(methods.resolve(name).weights).parameters
        assert list(accepted) == ["gram", "losses", "generator", "relative_error"]


@pytest.mark.parametrize("method", NAMES)
def test_invariant_2_rows_are_read_twice_and_written_once(method: str) -> None:
    """From filled rows to p.grad: one gram, one combine, and nothing else of size D."""
    model = Shared(tasks=4, depth=3)
    optimizer = prepared(model, method=method, scope="all")
    optimizer.backward(model.losses())
    size = sum(p.numel() for p in model.parameters())
    with recorded() as ours:
        operate(optimizer, 4, torch.device("cpu"))
    touching = [
        name
        for name, inputs, outputs in ours.calls
        if any(t.numel() >= size for t in (*inputs, *outputs))
        and not all(o._is_view() for o in outputs or [torch.ones(())])
    ]
    assert touching == ["gradsurgery::gram", "gradsurgery::combine_into"]
    buffer = rows_of(optimizer).buffers[0]
    for p in model.parameters():
        assert p.grad is not None
        assert p.grad.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()


def test_invariant_2_combine_needs_no_second_row() -> None:
    """In place in row 0: the kernel's temporaries stay below a row."""
    gradients = torch.randn(3, 4_000_000)
    with recorded() as ours:
        blocked.combine_into(gradients, torch.ones(3, dtype=torch.float64), gradients[0])
    fresh = [o.numel() for name, i, out in ours.calls for o in out if not o._is_view()]
    assert max(fresh) <= blocked._COMBINE_CHUNK


@pytest.mark.parametrize("tasks", [2, 4])
@pytest.mark.parametrize("scope", ["shared", "all"])
def test_invariant_3_extra_memory(tasks: int, scope: str) -> None:
    """T rows in all, of which p.grad is one; heads have no rows of their own where shared."""
    model = Shared(tasks, depth=4, width=32)
    optimizer = prepared(model, scope=scope)
    for _ in range(3):
        optimizer.zero_grad()
        optimizer.backward(model.losses())
    under = model.trunk if scope == "shared" else model
    elements = sum(b.numel() for b in rows_of(optimizer).buffers)
    # Each parameter starts at a multiple of 64 bytes.
    padding = 16 * tasks * len(list(under.parameters()))
    assert elements <= tasks * sum(p.numel() for p in under.parameters()) + padding


@pytest.mark.parametrize("tasks", [2, 4])
@pytest.mark.parametrize("habit", ["set to zero", "two calls"])
def test_invariant_3_a_gradient_that_is_there_costs_itself(tasks: int, habit: str) -> None:
    """zero_grad(set_to_none=False), or two calls for one step: T rows and the old gradient."""
    model = Shared(tasks, depth=4, width=32)
    optimizer = prepared(model, scope="all")
    for _ in range(4):
        optimizer.zero_grad(set_to_none=habit != "set to zero")
        for _ in range(2 if habit == "two calls" else 1):
            optimizer.backward(model.losses())
    alive = {b.untyped_storage()._cdata: b for b in rows_of(optimizer).buffers}
    for p in model.parameters():
        assert p.grad is not None
        alive.setdefault(p.grad.untyped_storage()._cdata, p.grad)
    elements = sum(t.untyped_storage().nbytes() // 4 for t in alive.values())
    size = sum(p.numel() for p in model.parameters())
    padding = 16 * tasks * len(list(model.parameters()))
    assert elements <= (tasks + 1) * size + padding


@pytest.mark.parametrize("method", NAMES)
def test_invariant_4_nothing_waits_on_the_cpu(method: str) -> None:
    """backward() and everything after it up to the base's own step, as the dispatcher sees it."""
    model = Shared(tasks=4)
    optimizer = prepared(model, method=method)
    with recorded() as ours:
        for _ in range(2):
            optimizer.zero_grad()
            optimizer.backward(model.losses())
    assert not [name for name in ours.names() if name.split("::")[1].startswith(WAITS)]


def crossings(recorder: Recorder) -> list[str]:
    """Operations that carry data from the (fake) CUDA device to the host."""
    return [
        name
        for name, inputs, outputs in recorder.calls
        if any(i.device.type == "cuda" for i in inputs)
        and any(o.device.type == "cpu" for o in outputs)
    ]


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("tasks", [2, 3, 8])
def test_invariant_4_nothing_waits_on_fake_cuda(method: str, tasks: int) -> None:
    """From filled rows to p.grad on fake CUDA tensors, where a read of a value raises."""
    with FakeTensorMode():
        parameters = [
            nn.Parameter(torch.zeros(5, 7, device="cuda", dtype=dtype))
            for dtype in (torch.float32, torch.bfloat16, torch.complex64)
        ]
        plugin = AdaptiveGradientSurgery(torch.optim.SGD(parameters, lr=0.1), method)
        for _ in range(2):
            arrange(plugin, parameters, tasks)
            with recorded() as ours:
                operate(plugin, tasks, torch.device("cuda"))
        assert crossings(ours) == []
        assert all(p.grad is not None and p.grad.device.type == "cuda" for p in parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_invariant_4_inside_of_the_kernels_on_fake_cuda(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the custom ops hide from the test above: the torch ops, as Triton takes no fakes."""
    monkeypatch.setattr(_backend, "_refused", "fake tensors")
    with FakeTensorMode(), recorded() as ours:
        rows = torch.zeros(4, 5_000_000, device="cuda", dtype=dtype)
        blocked.gram(rows)
        blocked.combine_into(rows, torch.ones(4, device="cuda", dtype=torch.float64), rows[0])
        gram = torch.zeros(8, 8, device="cuda", dtype=torch.float64)
        orders = draw_orders(gram.shape[:1], gram.device, shared=False, generator=None)
        for numbers in ((), (2.0, 1e-15)):
            tasks.solve._init_fn("ags" if numbers else "project", gram, [orders], list(numbers))
        tasks._solve_moving._init_fn("vaccinate", gram, [orders], gram, [0.01, 0.99])
    assert crossings(ours) == []


@pytest.mark.parametrize("method", NAMES)
def test_invariant_5_no_growth_with_parameters_nor_tasks(method: str) -> None:
    base = added_ops(4, 2, method)
    assert added_ops(4, 20, method) == base
    # 4 and 9 tasks: beyond the passes themselves the same calls (with 2 no order is drawn).
    assert added_ops(9, 2, method) == base
    assert base.total() <= 80


@pytest.mark.parametrize("method", NAMES)
def test_invariant_5_the_same_calls_on_fake_cuda(method: str) -> None:
    """From filled rows to p.grad, whatever T (from 3 on an order is drawn) and the parameters."""
    found = []
    for rows, count in ((3, 2), (3, 40), (17, 2)):
        with FakeTensorMode():
            parameters = [nn.Parameter(torch.zeros(4, 4, device="cuda")) for _ in range(count)]
            plugin = AdaptiveGradientSurgery(torch.optim.SGD(parameters, lr=0.1), method)
            for _ in range(2):
                arrange(plugin, parameters, rows)
                with recorded() as ours:
                    operate(plugin, rows, torch.device("cuda"))
        # prim: questions that fake tensors answer without running anything.
        found.append(Counter(n for n in ours.names() if not n.startswith("prim::")))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("scope", ["shared", "all"])
def test_invariant_6_gradients_as_autograd_leaves_them(scope: str) -> None:
    """None, dtype, device, shape, strides; and what was there is added to."""
    plain, ours = Shared(), Shared()
    for model in (plain, ours):
        model.unused = nn.Linear(2, 2)
        model.image = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)

    def losses(model: Any) -> list[Tensor]:
        picture = torch.ones(2, 3, 5, 5).to(memory_format=torch.channels_last)
        return [loss + model.image(picture).mean() for loss in model.losses()]

    optimizer = prepared(ours, method="sum", scope=scope)
    for zero in (True, False, True):
        sum(losses(plain)).backward()
        optimizer.backward(losses(ours))
        for p, q in zip(plain.parameters(), ours.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None and q.grad is not None:
                assert q.grad.dtype == p.grad.dtype
                assert q.grad.stride() == p.grad.stride()
                torch.testing.assert_close(q.grad, p.grad)
        if zero:
            plain.zero_grad()
            optimizer.zero_grad()


@pytest.mark.parametrize("method", NAMES)
def test_invariant_7_same_bits_also_across_a_resume(method: str) -> None:
    def run(interrupt: bool) -> list[Tensor]:
        model = Shared(tasks=5)
        optimizer = prepared(model, method=method, seed=3)
        for step in range(8):
            optimizer.zero_grad()
            optimizer.backward(model.losses())
            optimizer.step()
            if interrupt and step == 3:
                file = io.BytesIO()
                torch.save((model.state_dict(), optimizer.state_dict()), file)
                file.seek(0)
                weights, state = torch.load(file, weights_only=True)
                model = Shared(tasks=5)
                model.load_state_dict(weights)
                optimizer = prepared(model, method=method, seed=99)
                optimizer.load_state_dict(state)
        return list(model.parameters())

    first, again, resumed = run(False), run(False), run(True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, resumed, strict=True))


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_invariant_8_not_finite_stays_not_finite(method: str, bad: float) -> None:
    model = Shared(tasks=3)
    optimizer = prepared(model, method=method)
    losses = model.losses()
    losses[1] = losses[1] * bad
    optimizer.backward(losses)
    assert not all(p.grad.isfinite().all() for p in model.trunk.parameters())  # type: ignore[union-attr]


def test_invariant_9_accuracy() -> None:
    """More of it in test_kernels.py."""
    gradients = torch.randn(8, 1_000_003, generator=torch.Generator().manual_seed(0))
    found = aggregate(gradients, generator=torch.Generator().manual_seed(1))
    exact = aggregate(gradients.double(), generator=torch.Generator().manual_seed(1))
    assert float((found.double() - exact).norm() / exact.norm()) <= 1e-5


@pytest.mark.parametrize("method", NAMES)
def test_invariant_10_state_is_complete_and_plain(method: str) -> None:
    model = Shared(tasks=3)
    optimizer = AdaptiveGradientSurgery(torch.optim.Adam(model.parameters()), method)
    optimizer.backward(model.losses())
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    # Not a view that drags the whole of G along: Adam's two moments, and a little.
    weights = sum(p.numel() for p in model.parameters())
    assert len(file.getvalue()) < 2 * 4 * weights + 40_000
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    plain = torch.optim.Adam(model.parameters(), lr=0.5)
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.5


def current_rss_mib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


@pytest.mark.slow
def test_ten_thousand_steps_leave_memory_flat() -> None:
    """Neither memory nor the number of Python objects grows."""
    model = Shared(tasks=3)
    optimizer = prepared(model, method="ags")

    def train(steps: int) -> tuple[float, int]:
        for _ in range(steps):
            optimizer.zero_grad()
            optimizer.backward(model.losses())
            optimizer.step()
        gc.collect()
        return current_rss_mib(), len(gc.get_objects())

    memory, objects = train(1000)
    memory_later, objects_later = train(9000)
    assert objects_later - objects <= 50
    assert memory_later - memory <= 16


def test_graph_is_freed_with_the_call() -> None:
    """Nothing of the library keeps a graph, or a loss, alive."""
    model = Shared()
    optimizer = prepared(model)
    freed: list[str] = []

    class Marker:
        def __del__(self) -> None:
            freed.append("graph")

    def with_marker() -> Callable[[], None]:
        losses = model.losses()
        marker = Marker()
        losses[0].grad_fn.metadata["marker"] = marker  # type: ignore[union-attr]
        del marker
        optimizer.backward(losses)
        return lambda: None

    with_marker()
    gc.collect()
    assert freed == ["graph"]
