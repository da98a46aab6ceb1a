"""Many spans of columns at once, against one call of the kernels for each."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from span_checks import check
from torch._subclasses.fake_tensor import FakeTensorMode

from gradsurgery.kernels import native, spans

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64]


@pytest.fixture(params=["native", "torch"])
def version(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "native" and not native.available():
        pytest.skip("was built without a C compiler")
    if request.param == "torch":
        monkeypatch.setattr(native, "takes", lambda rows: False)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 8, 40])
def test_each_span_for_itself(version: str, count: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(count)
    rows = torch.randn(count, 4096, generator=generator, dtype=dtype)
    # Neighbours, an empty one, gaps before, between and behind, and one that is split into pieces.
    check(rows, [(32, 64), (64, 64), (64, 1088), (1152, 1184), (1184, 4064)], 2e-7)


def test_long_spans_are_shared_out(version: str) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(2, 700_000, generator=generator)
    check(rows, [(0, 16), (16, 600_000), (600_000, 600_016)], 2e-7)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_cut(data: st.DataObject) -> None:
    ends = data.draw(st.lists(st.integers(0, 60), min_size=2, max_size=20).map(sorted))
    bounds = [(16 * a, 16 * b) for a, b in zip(ends[::2], ends[1::2], strict=False)]
    rows = torch.randn(3, 960, generator=torch.Generator().manual_seed(2))
    check(rows, bounds, 2e-7)


def test_the_number_of_operations_does_not_grow_with_the_spans() -> None:
    """Neighbouring spans are one piece, whatever their number."""
    rows = torch.zeros(2, 32_000)
    for number in (1, 10, 1000):
        width = 32_000 // number // 16 * 16
        bounds = [end for i in range(number) for end in (i * width, (i + 1) * width)]
        assert len(list(spans._tiles(rows, bounds))) == 1


def test_nothing_waits_on_a_device() -> None:
    with FakeTensorMode():
        rows = torch.zeros(3, 4096, device="cuda")
        bounds = [0, 64, 64, 4096]
        assert spans._gram_plain(rows, bounds).shape == (2, 3, 3)
        weights = torch.zeros(2, 3, device="cuda", dtype=torch.float64)
        spans._combine_plain(rows, weights, bounds, rows[0])
