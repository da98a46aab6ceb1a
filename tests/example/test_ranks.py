"""What processes exchange: losses, gradients and batch norm of a joined batch, in float64."""

import functools

import pytest
import torch
from test_objectives import make

from slam_ags_example.augment import DigitViews, SmearViews
from slam_ags_example.data import images as image_sets
from slam_ags_example.data import open_images, open_source
from slam_ags_example.losses import nt_xent_loss, similarity_loss
from slam_ags_example.objectives import OBJECTIVES, Batch
from slam_ags_example.ranks import gather, own_rows
from slam_ags_example.sync_norm import SyncNorm, synchronise_norms


def losses_of_a_linear_map():
    """Two losses of z = x W on this process's rows of 5 patches, and their gradients to W."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(5, 2, 7, generator=random, dtype=torch.float64)
    weight = torch.randn(7, 4, generator=random, dtype=torch.float64).requires_grad_()
    found = []
    for loss in (nt_xent_loss, similarity_loss):
        value = loss(*gather(x[own_rows(5)] @ weight).unbind(1))
        found += [value.detach(), *torch.autograd.grad(value, weight)]
    return found


@pytest.mark.parametrize("processes", ["two", pytest.param("three", marks=pytest.mark.slow)])
def test_gathered_losses_have_the_value_and_the_mean_gradient_of_one_process(processes, request):
    expected = losses_of_a_linear_map()
    for alone, *by_rank in zip(
        expected, *request.getfixturevalue(processes)(losses_of_a_linear_map), strict=True
    ):
        if alone.ndim == 0:  # the same value everywhere
            assert all(torch.equal(value, by_rank[0]) for value in by_rank)
        mean = torch.stack(by_rank).mean(dim=0)
        # At most 30 terms are added in another order.
        torch.testing.assert_close(mean, alone, rtol=1e-13, atol=1e-14)


def normalised(shape, synchronised):
    """Batch norm of this process's rows: what comes out, gradients, running statistics."""
    random = torch.Generator().manual_seed(0)
    x, weights, wanted = (
        torch.randn(size, generator=random, dtype=torch.float64)
        for size in (shape, (2, shape[1]), shape)
    )
    own = own_rows(len(x))
    x = (100 + x[own]).requires_grad_()  # far from 0, where one-pass variances lose digits
    kind = torch.nn.BatchNorm1d if len(shape) == 2 else torch.nn.BatchNorm2d
    module = torch.nn.Sequential(kind(shape[1])).double()
    with torch.no_grad():
        module[0].weight.copy_(weights[0])
        module[0].bias.copy_(weights[1])
    synchronise_norms(module)
    assert isinstance(module[0], SyncNorm) == synchronised
    y = module(x)
    gradients = torch.autograd.grad((y - wanted[own]).square().sum(), [x, *module.parameters()])
    return [y.detach(), *gradients, *module.buffers()]


@pytest.mark.parametrize("shape", [(7, 4), (5, 3, 4, 4)], ids=["rows", "images"])
def test_batch_norm_takes_the_statistics_of_all_rows(shape, two):
    y, to_x, to_scale, to_shift, mean, variance, n = normalised(shape, False)
    first, second = two(normalised, shape, True)
    close = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    close(torch.cat([first[0], second[0]]), y)
    close(torch.cat([first[1], second[1]]), to_x)
    close(first[2] + second[2], to_scale)
    close(first[3] + second[3], to_shift)
    for ours in (first, second):
        close(ours[4:6], [mean, variance])
        assert ours[6] == n == 1


def losses_and_gradients(method, encoder):
    """An objective on this process's part of a batch: losses, each one's gradients, buffers."""
    objective, _, batch = make(method, encoder)
    synchronise_norms(objective)

    def own(views):
        pairs = views.unflatten(0, (2, -1))
        return pairs[:, own_rows(pairs.shape[1])].flatten(0, 1)

    losses = objective(Batch(own(batch.positive), own(batch.negative), own(batch.abnormal)))
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    found = {}
    for name, loss in losses.items():
        found[name] = loss.detach()
        gradients = torch.autograd.grad(loss, list(trained.values()), retain_graph=True)
        found |= {f"{name} to {n}": g for n, g in zip(trained, gradients, strict=True)}
    return found | dict(objective.named_buffers())


@pytest.mark.parametrize(
    ("method", "encoder"), [*((method, "small") for method in OBJECTIVES), ("slam-ags", "resnet18")]
)
def test_every_objective_has_the_mean_gradient_of_one_process(method, encoder, two):
    """Through batch norm, whose statistics and running ones are those of the whole batch."""
    alone = losses_and_gradients(method, encoder)
    by_rank = two(losses_and_gradients, method, encoder)
    assert any(name.endswith("running_var") for name in alone)
    assert alone.keys() == by_rank[0].keys()
    for name, value in alone.items():
        if "running" in name:  # the same bits everywhere
            assert torch.equal(by_rank[0][name], by_rank[1][name]), name
        mean = torch.stack([found[name].double() for found in by_rank]).mean(dim=0)
        # Sums over at most 18 · 64 values a channel in another order, through five layers; weights
        # in front of a batch norm have gradients that cancel, hence the absolute part.
        torch.testing.assert_close(mean, value.double(), rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("views", [DigitViews(), SmearViews()], ids=["digits", "smears"])
def test_a_part_of_a_batch_gets_the_views_that_it_has_in_the_batch(views):
    random = torch.Generator().manual_seed(0)
    shape = (9, 1 if isinstance(views, DigitViews) else 3, 16, 16)
    images = torch.randint(256, shape, generator=random, dtype=torch.uint8)
    whole = views.random(images, 0, "key")
    for start, stop in [(0, 5), (5, 9), (9, 9)]:
        part = views.random(images[start:stop], 0, "key", first=start, n=9)
        # The last bit may depend on the number of images, as work is spread over vectors by it.
        torch.testing.assert_close(part, whole[start:stop], rtol=0, atol=1e-6)


def test_processes_share_the_memory_for_images(monkeypatch):
    source = open_source("digits")
    monkeypatch.setattr(image_sets, "_available_bytes", lambda: 4 * 100 * 64)
    for sharers, held in [(1, True), (2, True), (3, False)]:
        images = open_images(source, source.references[:100], image_px=8, sharers=sharers)
        assert images.cached == held
