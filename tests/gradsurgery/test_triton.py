"""The Triton kernels against the reference: on a GPU, or in Triton's interpreter on the CPU.

Without a GPU `test_triton_builds.py` runs this file in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from inside import arrange, operate
from span_checks import check as check_spans

from gradsurgery import AdaptiveGradientSurgery, aggregate, kernels, methods
from gradsurgery.kernels import (
    _backend,
    blocked,
    reference,
    spans,
    tasks,
    triton_rows,
    triton_tasks,
)
from gradsurgery.methods import ags, gradvac, pcgrad
from gradsurgery.methods._projection import draw_orders

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.skipif(
        not (INTERPRETED or torch.cuda.is_available()),
        reason="needs a CUDA device, or TRITON_INTERPRET=1",
    ),
    # The interpreter computes with NumPy, which warns: of infinity minus infinity, of old habits.
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]
DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter takes milliseconds for a program.
WIDTHS = [0, 1, 127, 700] if INTERPRETED else [0, 1, 7, 127, 65_537, 3_000_001]
COUNTS = [1, 2, 3, 5, 8, 9, 32, 64]
# Relative to the product of two norms: what `relative_error` promises on tensor cores, see there.
GRAM_TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 1e-6,
    torch.bfloat16: 1e-6,
    torch.float16: 1e-6,
}
RESULT_TOLERANCE = {
    torch.float64: 1e-14,
    torch.float32: 1e-7,
    # The interpreter rounds to bfloat16 towards zero: one unit, not half of one.
    torch.bfloat16: 2**-7 if INTERPRETED else 2**-8,
    torch.float16: 2**-11,
}


@pytest.fixture(autouse=True)
def no_fallback(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A kernel that fails would be replaced by torch ops, and its test would pass."""
    monkeypatch.setattr(_backend, "_refused", None)
    yield
    assert _backend._refused is None


def rows(count: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    exact = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return exact.to(dtype).to(DEVICE)


def gram_error(found: Tensor, gradients: Tensor) -> float:
    wanted = reference.gram(gradients)
    norms = wanted.diagonal().sqrt()
    lengths = norms[:, None] * norms
    return float(((found - wanted).abs() / lengths.where(lengths > 0, 1.0)).max())


def check(gradients: Tensor) -> None:
    dtype = gradients.dtype
    found = kernels.gram(gradients, backend="triton")
    assert found.dtype == torch.float64
    assert gram_error(found, gradients) <= GRAM_TOLERANCE[dtype]
    assert gram_error(found, gradients) <= max(kernels.relative_error(gradients), 1e-13)
    assert torch.equal(found, kernels.gram(gradients, backend="triton"))
    weights = torch.linspace(-2, 3, len(gradients), dtype=torch.float64, device=DEVICE)
    wanted = reference.combine(gradients, weights)
    size = float(reference.combine(gradients.abs(), weights.abs()).norm())
    combined = kernels.combine(gradients, weights, backend="triton")
    assert float((combined.double() - wanted).norm()) <= RESULT_TOLERANCE[dtype] * size
    in_place = kernels.combine(gradients, weights, out=gradients[0], backend="triton")
    assert torch.equal(in_place, combined)


@pytest.mark.parametrize("dtype", list(GRAM_TOLERANCE), ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("count", COUNTS)
def test_both_agree_with_the_definition(count: int, width: int, dtype: torch.dtype) -> None:
    check(rows(count, width, dtype))


@pytest.mark.parametrize("count", [2, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wide_rows_are_summed_in_float32_first(count: int, dtype: torch.dtype) -> None:
    check(rows(count, 66_001, dtype))


@pytest.mark.parametrize("layout", ["padded", "columns", "strided", "unaligned"])
@pytest.mark.parametrize("count", [3, 16])
def test_any_stride(count: int, layout: str) -> None:
    gradients = rows(count, 500, torch.float32)
    if layout == "padded":
        gradients = torch.nn.functional.pad(gradients, (2, 3), value=torch.nan)[:, 2:-3]
    elif layout == "columns":
        gradients = gradients.T.contiguous().T
    elif layout == "strided":
        gradients = torch.stack([gradients, gradients * torch.nan], -1).flatten(1)[:, ::2]
    else:
        memory = torch.zeros(gradients.numel() + 1, device=DEVICE)
        memory[1:] = gradients.flatten()
        gradients = memory[1:].view(count, -1)
    check(gradients)


@pytest.mark.parametrize("cosine", [-0.9999, -0.999, 0.999])
@pytest.mark.parametrize("ratio", [1.0, 3.0, 1e12])
def test_accuracy_of_the_whole_surgery(cosine: float, ratio: float) -> None:
    """Invariant 9, for near-opposite and near-parallel gradients, and norms far apart."""
    first, other = rows(2, 70_000, torch.float64)
    other = other - (first @ other) / (first @ first) * first
    second = cosine * first / first.norm() + (1 - cosine**2) ** 0.5 * other / other.norm()
    gradients = torch.stack([first, ratio * first.norm() * second]).float()
    weights = methods.AGS().weights(reference.gram(gradients))
    wanted = reference.combine(gradients, weights)
    found = aggregate(gradients).double()
    assert float((found - wanted).norm() / wanted.norm()) <= 1e-5


def test_what_is_not_finite_stays_so() -> None:
    for bad in (torch.nan, torch.inf):
        for count in (3, 12):
            gradients = rows(count, 300, torch.float32)
            gradients[1, 7] = bad
            for name in WITH_KERNELS:
                assert not aggregate(gradients, name).isfinite().all()


# The others' T×T work runs on torch ops on CUDA.
WITH_KERNELS = ("ags", "gradvac", "mean", "pcgrad", "sum")


def grams(count: int, *, opposing: bool) -> Tensor:
    """[2, 2, T, T]: random, with zero and, where asked for, opposing gradients among them."""
    g = torch.randn(2, 2, count, count + 4, generator=torch.Generator().manual_seed(count)).double()
    g[0, 0, 0] = 0
    if opposing:
        g[0, 1, -1] = -g[0, 1, 0]
    g[1, 0] *= torch.logspace(-6, 6, count)[:, None]
    return (g @ g.mT).to(DEVICE)


@pytest.mark.parametrize("count", [1, 2, 3, 9, 17] if INTERPRETED else [1, 2, 3, 9, 33, 64])
def test_the_small_kernels_against_torch_ops(count: int) -> None:
    gram = grams(count, opposing=True)
    orders = draw_orders(gram.shape[:-1], gram.device, shared=False, generator=None)
    projected = tasks.run("project", gram, orders)
    # float64 sums of T terms in another order, amplified by projections in a row.
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(projected, pcgrad.project_conflicts(gram, orders), **close)
    for limit in (math.inf, 0.5, 2.0):
        found = tasks.run("rescale", gram, projected, numbers=(limit, 1e-15))
        torch.testing.assert_close(found, ags.rescale(gram, projected, limit, 1e-15), **close)
    target = torch.rand(gram.shape, generator=torch.Generator().manual_seed(0)).double() - 0.5
    target = target.to(DEVICE)
    # Opposing gradients leave rounding noise, whose cosine is anything.
    gram = grams(count, opposing=False)
    gram[1, 1, 0, 0] = torch.nan
    moved = target.clone()
    numbers = (0.01, gradvac._MAX_TARGET_COSINE)
    found = tasks.run_moving("vaccinate", gram, moved, orders, numbers=numbers)
    wanted = gradvac.vaccinate(gram, orders, target, *numbers)
    finite = gram.isfinite().all(-1).all(-1)
    torch.testing.assert_close(found[finite], wanted[0][finite], **close)
    torch.testing.assert_close(moved[finite], wanted[1][finite], **close)
    assert torch.equal(moved[1, 1], target[1, 1])
    assert torch.equal(found.isnan().any(-1), ~finite)


@pytest.mark.parametrize("shared", [True, False])
def test_orders_are_permutations_and_every_one_is_drawn(shared: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shape, device = torch.Size([40, 3]), torch.device(DEVICE)
    orders = draw_orders(shape, device, shared=shared, generator=generator)
    assert torch.equal(orders.sort(-1).values, torch.arange(3, device=device).expand(40, 3, 3))
    assert len({tuple(row) for row in orders[:, 0].tolist()}) == 6
    assert (orders[:, 0] == orders[:, 1]).all() == shared
    again = draw_orders(shape, device, shared=shared, generator=generator)
    assert not torch.equal(orders, again)
    repeated = draw_orders(shape, device, shared=shared, generator=torch.Generator().manual_seed(0))
    assert torch.equal(orders, repeated)


@pytest.mark.parametrize("tasks", [2, 3, 12])
@pytest.mark.parametrize("name", WITH_KERNELS)
def test_at_most_six_launches_between_backward_and_step(
    name: str, tasks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels of this library, counted where they are launched, and whatever else torch runs."""
    launched: list[str] = []

    def launch(kernel: Any, *arguments: Any, **constants: Any) -> None:
        launched.append(kernel.__name__)
        original(kernel, *arguments, **constants)

    original = triton_rows.launch
    for module in (triton_rows, triton_tasks):
        monkeypatch.setattr(module, "launch", launch)
    moved: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            name = func.name()
            outs = [o for o in (out if isinstance(out, tuple) else (out,)) if isinstance(o, Tensor)]
            if not name.startswith("gradsurgery::") and not all(o._is_view() for o in outs):
                moved.append(name)
            return out

    parameters = [torch.nn.Parameter(torch.zeros(5, 7, device=DEVICE)) for _ in range(20)]
    plugin = AdaptiveGradientSurgery(torch.optim.SGD(parameters, lr=0.1), name)
    for _ in range(2):
        arrange(plugin, parameters, tasks)
        launched.clear()
        moved.clear()
        with Watch():
            operate(plugin, tasks, torch.device(DEVICE))
    # Memory, views, and the seed, which is drawn on the host.
    free = ("empty", "alias", "select", "slice", "detach", "expand", "randint")
    others = [name for name in moved if not name.removeprefix("aten::").startswith(free)]
    assert len(launched) + len(others) <= 6, (launched, others)
    assert len(launched) >= (0 if not methods.resolve(name).reads_gram else 4)


@pytest.mark.parametrize("dtype", [*GRAM_TOLERANCE, torch.complex64], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 8] if INTERPRETED else [1, 2, 3, 8, 9, 40, 64])
def test_segments(count: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(count)
    gradients = torch.randn(count, 4096, generator=generator).to(dtype).to(DEVICE)
    tolerance = max(spans.relative_error(gradients), 1e-13)
    # Neighbours, an empty one, gaps before, between and behind, and one of several chunks.
    check_spans(gradients, [(32, 64), (64, 64), (64, 1088), (1152, 1184), (1184, 4064)], tolerance)


@pytest.mark.parametrize("count", [2, 16])
def test_long_segments_are_shared_out(count: int) -> None:
    unit = 320 if INTERPRETED else 16_000
    gradients = rows(count, 200 * unit, torch.float32)
    bounds = [(0, 16), (16, 130 * unit), (130 * unit, 130 * unit + 16), (150 * unit, 200 * unit)]
    check_spans(gradients, bounds, 1e-12)


def test_a_forced_backend_is_loud() -> None:
    with pytest.raises(ValueError, match="up to 64 rows"):
        kernels.gram(torch.ones(65, 3, device=DEVICE), backend="triton")
    # "auto" takes them all the same.
    gradients = rows(65, 300, torch.float32)
    torch.testing.assert_close(kernels.gram(gradients), blocked.gram(gradients))
