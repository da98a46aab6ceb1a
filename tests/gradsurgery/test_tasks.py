"""The T×T steps: C and plain torch ops give the same, on every family."""

from __future__ import annotations

import pytest
import torch
from families import COUNTS, FAMILIES, gradients_of
from torch import Tensor

from gradsurgery.kernels import native, tasks
from gradsurgery.methods._projection import draw_orders
from gradsurgery.methods.gradvac import _MAX_TARGET_COSINE

needs_native = pytest.mark.skipif(not native.available(), reason="was built without a C compiler")


def gram_of(family: str, count: int) -> Tensor:
    gradients = torch.stack([gradients_of(family, count, seed) for seed in range(2)])
    return gradients @ gradients.mT


def orders_of(gram: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return draw_orders(gram.shape[:-1], gram.device, shared=False, generator=generator)


def assert_same_gradient(gram: Tensor, found: Tensor, wanted: Tensor) -> None:
    """Differences are judged by the gradients that they stand for, n∘w, beside the largest term.

    Both versions add up the same float64 terms in another order; a walk over T tasks multiplies
    what the first of them is off by, and gradients that cancel leave noise: 1e-7 of the largest.
    """
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    size = (wanted.abs() * norms).amax(-1, keepdim=True)
    assert ((found - wanted).abs() * norms <= 1e-7 * size).all()


@needs_native
@pytest.mark.parametrize("family", FAMILIES)
def test_c_gives_what_torch_ops_give(family: str) -> None:
    for count in COUNTS:
        if "opposite" in family or family in ("stationary", "all zero", "equal", "parallel"):
            # Dot products are 0 up to rounding, and projections walk by their sign.
            continue
        gram = gram_of(family, count)
        orders = orders_of(gram)
        projected = tasks._plain["project"](gram, orders)
        assert_same_gradient(gram, tasks.run("project", gram, orders), projected)
        for limit in (torch.inf, 0.5):
            numbers = (limit, 1e-15)
            found = tasks.run("rescale", gram, projected, numbers=numbers)
            wanted = tasks._plain["rescale"](gram, projected, *numbers)
            # The factor loses what 1ᵀM1 and wᵀMw, sums of T² terms, lose where these cancel.
            lost = torch.zeros(2, dtype=torch.float64)
            for w in (torch.ones_like(projected), projected):
                terms = w[:, None, :] * gram * w[:, :, None]
                lost += 1e-15 * terms.abs().sum((-1, -2)) / terms.sum((-1, -2)).abs()
            assert ((found / wanted - 1).abs() <= 1e-12 + lost[:, None]).all()
        target = torch.rand(gram.shape, generator=torch.Generator().manual_seed(0)).double() - 0.5
        moved, numbers = target.clone(), (0.01, _MAX_TARGET_COSINE)
        found = tasks.run_moving("vaccinate", gram, moved, orders, numbers=numbers)
        wanted, new = tasks._plain["vaccinate"](gram, orders, target, *numbers)
        assert_same_gradient(gram, found, wanted)
        torch.testing.assert_close(moved, new, rtol=0, atol=1e-7)


@needs_native
def test_what_is_not_finite_gives_nan_and_moves_nothing() -> None:
    gram = gram_of("conflicting", 3)
    gram[0, 1, 1] = torch.inf
    orders, moved = orders_of(gram), torch.zeros_like(gram)
    found = tasks.run_moving("vaccinate", gram, moved, orders, numbers=(0.1, 0.9))
    assert found[0].isnan().all()
    assert found[1].isfinite().all()
    assert not moved[0].any()
    assert moved[1].any()


def test_more_tasks_than_c_takes_run_on_torch_ops() -> None:
    gram = gram_of("conflicting", 70)
    assert tasks.run("project", gram, orders_of(gram)).isfinite().all()


def test_threads_do_not_change_the_bits(restore_threads: None) -> None:
    gradients = torch.randn(600, 8, 20, dtype=torch.float64)
    gram = gradients @ gradients.mT
    orders = orders_of(gram)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(tasks.run("project", gram, orders))
    assert torch.equal(*found)


@pytest.fixture
def restore_threads() -> object:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
