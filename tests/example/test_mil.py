"""Gated attention pooling: its equation, its symmetry, its weights; the choice of the epoch."""

import math
from dataclasses import replace

import pytest
import torch

from slam_ags_example.config import RunConfig
from slam_ags_example.mil import BagSet, GatedAttentionMIL, train_mil


def model_and_bags(n_bags=3, n=7, d=5):
    random = torch.Generator().manual_seed(0)
    model = GatedAttentionMIL(d, 4, generator=random).double()
    for weight in (model.score.weight, model.classifier.weight):  # they start at zero
        torch.nn.init.normal_(weight, generator=random)
    return model, torch.randn(n_bags, n, d, generator=random, dtype=torch.float64)


@torch.no_grad()
def test_forward_is_the_published_equation():
    model, bags = model_and_bags(n_bags=1)
    logits, attention = model(bags)
    scores = []
    for h in bags[0]:
        value = model.value.weight @ h + model.value.bias
        gate = model.gate.weight @ h + model.gate.bias
        gated = [math.tanh(v) / (1 + math.exp(-g)) for v, g in zip(value, gate, strict=True)]
        pairs = zip(model.score.weight[0].tolist(), gated, strict=True)
        scores.append(sum(w * x for w, x in pairs) + float(model.score.bias))
    total = sum(math.exp(score) for score in scores)
    weights = [math.exp(score) / total for score in scores]
    pooled = sum(weight * h for weight, h in zip(weights, bags[0], strict=True))
    logit = float(model.classifier.weight[0] @ pooled + model.classifier.bias)
    assert attention[0].tolist() == pytest.approx(weights, rel=1e-10)
    assert float(logits) == pytest.approx(logit, rel=1e-10)


@torch.no_grad()
def test_attention_sums_to_one_and_follows_its_instances():
    model, bags = model_and_bags()
    logits, attention = model(bags)
    torch.testing.assert_close(attention.sum(dim=1), torch.ones(3, dtype=torch.float64))
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    logits_after, attention_after = model(bags[:, order])
    torch.testing.assert_close(logits_after, logits)
    torch.testing.assert_close(attention_after, attention[:, order])


@torch.no_grad()
def test_a_bag_does_not_depend_on_the_bags_beside_it():
    model, bags = model_and_bags()
    together = model(bags)
    for row, bag in enumerate(bags):
        alone = model(bag)
        torch.testing.assert_close(alone[0], together[0][row])
        torch.testing.assert_close(alone[1], together[1][row])


@torch.no_grad()
def test_an_untrained_model_attends_to_all_instances_alike():
    model = GatedAttentionMIL(5, 4, generator=torch.Generator().manual_seed(0))
    logits, attention = model(torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(attention, torch.full((3, 7), 1 / 7))
    torch.testing.assert_close(logits, torch.zeros(3))


def marked_bags(n_bags, random):
    """Noise, and in every second bag one instance that carries a mark along the first feature."""
    instances = 0.1 * torch.randn(n_bags, 10, 6, generator=random)
    labels = torch.arange(n_bags) % 2.0
    instances[labels == 1, 3, 0] += 1.0
    return BagSet(instances, labels)


def test_training_finds_the_marked_instance_and_keeps_the_best_validation_epoch():
    random = torch.Generator().manual_seed(0)
    train, validation = marked_bags(40, random), marked_bags(20, random)
    config = RunConfig(mil_epochs=60, mil_learning_rate=1e-2)
    model, records, epoch = train_mil(train, validation, config)
    assert [record.epoch for record in records] == list(range(1, 61))
    losses = [record.validation_loss for record in records]
    assert epoch == 1 + losses.index(min(losses))
    with torch.no_grad():
        logits, attention = model(validation.instances)
    # The model is the one of that epoch: training that ends there leaves the same.
    stopped, _, last = train_mil(train, validation, replace(config, mil_epochs=epoch))
    assert last == epoch
    assert torch.equal(stopped(validation.instances)[1], attention)
    # And its intercept is not worse on the bags that chose it.
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, validation.labels)
    assert float(loss) <= min(losses) * (1 + 1e-6)
    assert ((logits > 0) == (validation.labels == 1)).all()
    assert (attention[validation.labels == 1].argmax(dim=1) == 3).all()


def test_same_seed_same_bits():
    random = torch.Generator().manual_seed(0)
    train, validation = marked_bags(12, random), marked_bags(6, random)
    config = RunConfig(mil_epochs=3)
    first, second = (train_mil(train, validation, config)[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_intercept_fits_the_validation_bags() -> None:
    """Maximum likelihood of an intercept: the mean probability is the share of positive bags."""
    random = torch.Generator().manual_seed(0)
    labels = torch.tensor([0.0, 0.0, 0.0, 1.0] * 3)
    instances = torch.randn(12, 5, 4, generator=random) + 3 * labels[:, None, None]
    config = RunConfig(mil_epochs=3)
    model, _, _ = train_mil(BagSet(instances, labels), BagSet(instances + 0.5, labels), config)
    with torch.no_grad():
        logits, _ = model(instances + 0.5)
    assert float(logits.sigmoid().mean()) == pytest.approx(0.25, abs=1e-5)
