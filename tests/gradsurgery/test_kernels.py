"""gram and combine against the float64 definition: shapes, dtypes, strides, accuracy."""

from __future__ import annotations

import pytest
import torch
from contract import MEASURING
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradsurgery import aggregate, kernels, methods
from gradsurgery.kernels import reference

# Sums are taken in float32 or float64, so what is left is the rounding of the result to the dtype
# (half an ulp) and, for float32, of the weights and of T products.
RESULT_TOLERANCE = {
    torch.float64: 1e-14,
    torch.float32: 1e-6,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-11,
}
# The Gram matrix itself: float64 exact to rounding; everything else to float32 sums over blocks of
# 512. One such sum is off by sqrt(512 / 3) · 2^-24 = 8e-7 on random rounding; over many blocks that
# averages out for float32 rows, and less for 16-bit ones, whose products fall on a coarse grid
# (1.9e-7 with an MKL that adds up one after the other). 16-bit rows themselves resolve 1e-3.
GRAM_TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 1e-7,
    torch.bfloat16: 4e-7,
    torch.float16: 4e-7,
}
DTYPES = list(RESULT_TOLERANCE)


def rows(count: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64).to(dtype)


def relative(found: Tensor, wanted: Tensor) -> float:
    scale = float(wanted.norm())
    return float((found.double() - wanted.double()).norm()) / (scale or 1.0)


def gram_error(found: Tensor, gradients: Tensor) -> float:
    wanted = reference.gram(gradients)
    norms = wanted.diagonal().sqrt()
    lengths = norms[:, None] * norms
    return float(((found - wanted).abs() / lengths.where(lengths > 0, 1.0)).max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [0, 1, 7, 511, 512, 513, 65535, 65537, 200_001])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_both_agree_with_the_definition(count: int, width: int, dtype: torch.dtype) -> None:
    gradients = rows(count, width, dtype)
    weights = rows(count, 1, torch.float64, seed=1)[:, 0]
    assert gram_error(kernels.gram(gradients), gradients) <= GRAM_TOLERANCE[dtype]
    combined = kernels.combine(gradients, weights)
    assert combined.dtype == dtype
    assert combined.shape == (width,)
    wanted = reference.combine(gradients, weights)
    assert relative(combined, wanted) <= RESULT_TOLERANCE[dtype] * max(1, count**0.5)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(
    count=st.integers(1, 64),
    width=st.integers(0, 3000),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["rows", "padded", "columns", "strided", "flipped"]),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_stride(
    count: int, width: int, dtype: torch.dtype, layout: str, seed: int
) -> None:
    gradients = rows(count, width, dtype, seed)
    if layout == "padded":
        wide = torch.full((count, width + 5), torch.nan, dtype=dtype)
        wide[:, 2 : 2 + width] = gradients
        gradients = wide[:, 2 : 2 + width]
    elif layout == "columns":
        gradients = gradients.T.contiguous().T
    elif layout == "strided":
        gradients = torch.stack([gradients, gradients * torch.nan], -1).flatten(1)[:, ::2]
    elif layout == "flipped":
        gradients = torch.cat([gradients, gradients])[::2]
    count = gradients.shape[0]
    weights = torch.linspace(-2, 3, count, dtype=torch.float64)
    wanted_gram, wanted = reference.gram(gradients), reference.combine(gradients, weights)
    # float64 is compared with a float64 product of the same sums: rounding of D terms.
    assert gram_error(kernels.gram(gradients), gradients) <= max(GRAM_TOLERANCE[dtype], 1e-13)
    assert kernels.gram(gradients).dtype == torch.float64
    assert torch.equal(kernels.gram(gradients), kernels.gram(gradients).T.contiguous()) or (
        relative(kernels.gram(gradients), wanted_gram) < 1e-6
    )
    # Cancellation among the terms: measure against their size, not against the sum's.
    size = reference.combine(gradients.abs(), weights.abs())
    error = float((kernels.combine(gradients, weights).double() - wanted).norm())
    assert error <= RESULT_TOLERANCE[dtype] * float(size.norm())
    row = gradients[0]
    assert kernels.combine(gradients, weights, out=row) is row
    assert float((row.double() - wanted).norm()) <= RESULT_TOLERANCE[dtype] * float(size.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_any_row_may_be_the_output(dtype: torch.dtype) -> None:
    weights = torch.tensor([1.5, -2.0, 0.5])
    for index in range(3):
        gradients = rows(3, 1000, dtype)
        wanted = reference.combine(gradients, weights)
        kernels.combine(gradients, weights, out=gradients[index])
        assert relative(gradients[index], wanted) <= 2 * RESULT_TOLERANCE[dtype]


@pytest.mark.parametrize("shift", [1, 3, 1_000_000])
def test_an_output_that_overlaps_the_rows(shift: int) -> None:
    """As if it did not."""
    memory = torch.randn(3 * 2_000_000 + shift, generator=torch.Generator().manual_seed(0))
    gradients = memory[: 3 * 2_000_000].view(3, -1)
    weights = torch.tensor([1.0, -2.0, 0.5])
    wanted = reference.combine(gradients, weights)
    found = kernels.combine(gradients, weights, out=memory[shift : 2_000_000 + shift])
    assert relative(found, wanted) <= 1e-6


def test_complex_rows_count_as_real_and_imaginary_parts() -> None:
    gradients = torch.complex(rows(3, 50, torch.float64), rows(3, 50, torch.float64, seed=1))
    real = torch.view_as_real(gradients).flatten(1)
    assert torch.equal(kernels.gram(gradients), kernels.gram(real))
    weights = torch.tensor([1.0, 2.0, -0.5])
    combined = kernels.combine(gradients, weights)
    assert combined.is_complex()
    torch.testing.assert_close(combined, weights.to(combined.dtype) @ gradients)
    kernels.combine(gradients, weights, out=gradients[0])
    torch.testing.assert_close(gradients[0], combined)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_reduced_matmul_precision_and_autocast_change_nothing(precision: str) -> None:
    gradients = rows(4, 200_000, torch.float32)
    weights = torch.ones(4)
    wanted = reference.combine(gradients, weights)
    torch.set_float32_matmul_precision(precision)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert gram_error(kernels.gram(gradients), gradients) <= 1e-7
            assert relative(kernels.combine(gradients, weights), wanted) <= 1e-7
            half = gradients.bfloat16()
            assert gram_error(kernels.gram(half), half) <= 1e-7
            wanted = reference.combine(half, weights)
            assert relative(kernels.combine(half, weights), wanted) <= 2**-8
    finally:
        torch.set_float32_matmul_precision("highest")


def test_reference_backend_is_the_definition() -> None:
    gradients = rows(3, 300, torch.float32)
    weights = torch.tensor([0.3, -1.0, 2.0])
    assert torch.equal(kernels.gram(gradients, backend="reference"), reference.gram(gradients))
    combined = kernels.combine(gradients, weights, backend="reference")
    assert torch.equal(combined, reference.combine(gradients, weights).float())


@pytest.mark.parametrize("width", [1_000, 100_000, 3_000_000])
@pytest.mark.parametrize("cosine", [-0.999, -0.9, 0.0, 0.999])
def test_accuracy_of_the_whole_surgery(width: int, cosine: float) -> None:
    """Invariant 9: 1e-5 relative in float32, also for near-opposite and near-parallel gradients."""
    first, other = rows(2, width, torch.float64)
    other = other - (first @ other) / (first @ first) * first
    second = cosine * first / first.norm() + (1 - cosine**2) ** 0.5 * other / other.norm()
    gradients = torch.stack([first, 3 * first.norm() * second]).float()
    weights = methods.AGS().weights(reference.gram(gradients))
    assert relative(aggregate(gradients), reference.combine(gradients, weights)) <= 1e-5


@pytest.mark.parametrize("count", [2, 16, 64])
def test_accuracy_with_many_tasks(count: int) -> None:
    gradients = rows(count, 300_000, torch.float32)
    for name in MEASURING:
        generator = torch.Generator().manual_seed(3)
        weights = methods.resolve(name).weights(reference.gram(gradients), generator=generator)
        generator.manual_seed(3)
        found = aggregate(gradients, name, generator=generator)
        assert relative(found, reference.combine(gradients, weights)) <= 1e-5, name


def test_norms_far_apart() -> None:
    """1e-12 beside 1e12: squares stay inside float32's range and nothing is lost."""
    gradients = rows(3, 100_000, torch.float32)
    gradients *= torch.tensor([1e-12, 1.0, 1e12])[:, None] / gradients.norm(dim=1, keepdim=True)
    assert gram_error(kernels.gram(gradients), gradients) <= 1e-7


@pytest.mark.slow
def test_accuracy_at_a_hundred_million() -> None:
    gradients = torch.randn(2, 100_000_000, generator=torch.Generator().manual_seed(0))
    gradients[1] -= 0.9 * gradients[0]
    gram = torch.zeros(2, 2, dtype=torch.float64)
    for part in gradients.split(1 << 22, dim=1):
        gram += reference.gram(part)
    found = kernels.gram(gradients)
    assert float(((found - gram).abs() / gram.diagonal().max()).max()) <= 1e-8
    weights = methods.AGS().weights(gram)
    wanted = [reference.combine(part, weights) for part in gradients.split(1 << 22, dim=1)]
    assert relative(aggregate(gradients), torch.cat(wanted)) <= 1e-5
