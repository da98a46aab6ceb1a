"""Which kernels run: what is asked for by name, what "auto" takes, what it says where it cannot."""

from __future__ import annotations

import pytest
import torch
from contract import MEASURING
from torch import Tensor

from gradsurgery import aggregate, kernels, methods
from gradsurgery.kernels import _backend, blocked, native, reference

compiled = pytest.mark.skipif(not native.available(), reason="built without a C compiler")


def rows(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def gram_error(found: Tensor, gradients: Tensor) -> float:
    wanted = reference.gram(gradients)
    norms = wanted.diagonal().sqrt()
    lengths = norms[:, None] * norms
    return float(((found - wanted).abs() / lengths.where(lengths > 0, 1.0)).max())


@compiled
@pytest.mark.parametrize("limit", [0, 1, 2])
@pytest.mark.parametrize("width", [0, 1, 15, 1023, 1025, 70_001])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 17, 64])
def test_compiled_kernels_for_every_instruction_set(
    count: int, width: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_limit", limit)
    gradients = rows(count, width)
    found = kernels.gram(gradients, backend="native")
    # float32 over 64 to 256 terms: sqrt(256 / 3) · 2^-24 for one lane, which few columns do not
    # average out.
    assert gram_error(found, gradients) <= 6e-7
    assert torch.equal(found, found.T)
    weights = torch.linspace(-2, 3, count, dtype=torch.float64)
    wanted = reference.combine(gradients, weights)
    combined = kernels.combine(gradients, weights, backend="native")
    # Summed in float64: what is left is the rounding of the result, half a unit of it.
    torch.testing.assert_close(combined.double(), wanted, rtol=2**-24, atol=1e-14)
    padded = torch.full((count, width + 7), torch.nan)
    padded[:, 3 : 3 + width] = gradients
    view = padded[:, 3 : 3 + width]
    assert torch.equal(kernels.gram(view, backend="native"), found)
    assert torch.equal(kernels.combine(view, weights, out=view[0], backend="native"), combined)


@compiled
def test_the_number_of_threads_changes_no_bit() -> None:
    gradients, before = rows(5, 300_001), torch.get_num_threads()
    weights = torch.ones(5)
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append((kernels.gram(gradients), kernels.combine(gradients, weights)))
    finally:
        torch.set_num_threads(before)
    for gram, combined in found[1:]:
        assert torch.equal(gram, found[0][0])
        assert torch.equal(combined, found[0][1])


@compiled
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_compiled_kernels_keep_what_is_not_finite(bad: float) -> None:
    gradients = rows(3, 70_000)
    gradients[1, -1] = bad
    assert not kernels.gram(gradients, backend="native")[1].isfinite().any()
    for name in MEASURING:
        assert not aggregate(gradients, name).isfinite().all()


@compiled
def test_auto_runs_compiled_kernels_and_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = rows(4, 100_000)
    fast = kernels.gram(gradients)
    assert torch.equal(fast, kernels.gram(gradients, backend="native"))
    monkeypatch.setattr(native, "available", lambda: False)
    plain = kernels.gram(gradients)
    assert torch.equal(plain, kernels.gram(gradients, backend="torch"))
    assert torch.equal(plain, blocked.gram(gradients))


def test_a_backend_by_name_is_loud(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = rows(3, 50)
    with pytest.raises(ValueError, match="backend must be one of auto, torch, triton"):
        kernels.gram(gradients, backend="cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="needs tensors on CUDA; got cpu"):
        kernels.gram(gradients, backend="triton")
    with pytest.raises(RuntimeError, match="needs tensors on CUDA"):
        kernels.combine(gradients, torch.ones(3), backend="triton")
    for bad in (gradients.double(), gradients.T.contiguous().T, rows(65, 3)):
        with pytest.raises(ValueError, match='backend="native" takes up to 64 rows of float32'):
            kernels.gram(bad, backend="native")
    monkeypatch.setattr(native, "available", lambda: False)
    with pytest.raises(RuntimeError, match='backend="native" was not built'):
        kernels.gram(gradients, backend="native")


def test_triton_that_does_not_work_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without the compiler that Triton needs: plain torch ops, one warning."""
    monkeypatch.setattr(_backend, "_refused", None)
    monkeypatch.setattr(_backend, "_runs_triton", lambda device: True)
    gradients = rows(3, 50)
    # No GPU, or none that sees CPU tensors: the launch itself fails.
    with pytest.warns(RuntimeWarning, match="plain torch ops.*since Triton failed") as seen:
        weights = methods.PCGrad().weights(torch.eye(3))
    assert seen[0].filename == __file__
    # From now on without a word: warnings are errors here.
    for _ in range(2):
        torch.testing.assert_close(weights, torch.ones(3).double())
        torch.testing.assert_close(aggregate(gradients, "sum"), gradients.sum(0))
        aggregate(gradients)
        weights = methods.PCGrad().weights(torch.eye(3))


def test_a_kernel_that_fails_is_an_error_where_warnings_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So a kernel's own fault cannot hide behind the torch ops in tests."""
    monkeypatch.setattr(_backend, "_refused", None)
    monkeypatch.setattr(_backend, "_runs_triton", lambda device: True)
    with pytest.raises(RuntimeWarning, match="since Triton failed"):
        kernels.gram(rows(3, 50))


def test_no_triton_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "_refused", None)
    monkeypatch.setattr(_backend, "_runs_triton", lambda device: True)
    monkeypatch.setattr(_backend, "_import_error", lambda: "ImportError: no triton")
    with pytest.warns(RuntimeWarning, match="since Triton failed: ImportError: no triton"):
        aggregate(rows(3, 50))
    aggregate(rows(3, 50))
    with pytest.raises(RuntimeError, match="needs the package triton: ImportError"):
        kernels.gram(rows(3, 50), backend="triton")


@pytest.mark.slow
@pytest.mark.parametrize("cosine", [-0.9999, 0.9999])
def test_a_hundred_million_columns_with_norms_far_apart(cosine: float) -> None:
    """Invariant 9 where it is hardest: D = 1e8, norms 1e-12 and 1e12, nearly (anti-)parallel."""
    width = 100_000_000
    first, other = rows(2, width)
    other -= (first.double() @ other.double() / (first.double() @ first.double())).float() * first
    second = cosine * first / first.norm() + (1 - cosine**2) ** 0.5 * other / other.norm()
    gradients = torch.stack([1e-12 * first / first.norm(), 1e12 * second])
    del first, other, second
    exact = torch.zeros(2, 2, dtype=torch.float64)
    for chunk in gradients.split(10_000_000, dim=1):
        exact += chunk.double() @ chunk.double().T
    weights = methods.AGS().weights(exact)
    found = aggregate(gradients)
    off = size = 0.0
    for chunk, part in zip(
        gradients.split(10_000_000, dim=1), found.split(10_000_000), strict=True
    ):
        wanted = weights @ chunk.double()
        off += float((part - wanted).square().sum())
        size += float(wanted.square().sum())
    assert off**0.5 <= 1e-5 * size**0.5
