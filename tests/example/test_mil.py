"""Aggregators against their equations in explicit loops; training, its choices and its errors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from slam_ags_example.config import InputError, TrainingFailedError
from slam_ags_example.mil import (
    AGGREGATORS,
    BagSet,
    Standardise,
    build_aggregator,
    load_aggregator,
    predict,
    train_mil,
)
from slam_ags_example.mil.aggregators import FEATURE_RMS, GatedAttention
from slam_ags_example.mil.concept import find_concept
from slam_ags_example.mil.pamil import PrototypeAttention, initial_prototypes

DIM = 5
OPTIONS = [(False, False), (True, False), (False, True), (True, True)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def roughen(model, seed=1):
    """Every weight away from the zeros that training starts from, in float64."""
    random = generator(seed)
    with torch.no_grad():
        for weight in model.double().parameters():
            weight.add_(0.5 * torch.randn(weight.shape, generator=random))
    return model


def normal(*shape, seed=2):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


# The equations


@torch.no_grad()
def test_gated_attention_is_the_published_equation():
    model = roughen(GatedAttention(DIM, 4, generator=generator()))
    bag = normal(7, DIM)
    scores = []
    for h in bag:
        value = model.value.weight @ h + model.value.bias
        gate = model.gate.weight @ h + model.gate.bias
        gated = [math.tanh(v) / (1 + math.exp(-g)) for v, g in zip(value, gate, strict=True)]
        scores.append(sum(w * x for w, x in zip(model.score.tolist(), gated, strict=True)))
    total = sum(math.exp(score) for score in scores)
    weights = [math.exp(score) / total for score in scores]
    pooled = sum(weight * h for weight, h in zip(weights, bag, strict=True))
    logit, attention, auxiliary = model(bag)
    # float64 sums of a few terms: 1e-10 is far above their rounding, far below any slip.
    assert attention.tolist() == pytest.approx(weights, rel=1e-10)
    assert float(logit) == pytest.approx(
        float(model.classifier @ pooled + model.intercept), rel=1e-10
    )
    assert float(auxiliary) == 0


def softmax(values):
    total = sum(value.exp() for value in values)
    return [value.exp() / total for value in values]


def mean(values):
    return sum(values) / len(values)


def prototype_features(model, row):
    z = [(w @ row + b).clamp_min(0) for w, b in zip(*layer(model.project), strict=True)]
    spread = mean([(value - mean(z)) ** 2 for value in z])
    return torch.stack([(value - mean(z)) / (spread + 1e-5).sqrt() for value in z])


def layer(linear):
    return linear.weight, linear.bias


def written_out_pamil(model, bag, label):
    """Logit, positive attention and auxiliary of one bag, one scalar after another."""
    h = [prototype_features(model, row) for row in bag]
    q = [prototype_features(model, row) for row in model.prototypes]
    S = [
        [
            sum(
                torch.sigmoid(bg @ h_n + bb) * torch.tanh(av @ q_j + ab)
                for bg, bb, av, ab in zip(*layer(model.gate), *layer(model.value), strict=True)
            )
            for q_j in q
        ]
        for h_n in h
    ]
    intercepts = [0.0, model.intercept]
    classes, attention = [], []
    for c in (0, 1):
        a = softmax([sum(s * model.mix[j, c] for j, s in enumerate(row)) for row in S])
        z = sum(weight * h_n for weight, h_n in zip(a, h, strict=True))
        v = model.direction[c]
        classes.append(model.magnitude[c] * (v @ z) / (v @ v).sqrt() + intercepts[c])
        attention.append(a)
    R = [softmax(row) for row in S]
    auxiliary = 0.005 * (1 - mean([max(row) for row in R]))
    auxiliary += 0.005 * (1 - mean([max(row[j] for row in R) for j in range(len(q))]))
    if model.vote is not None:
        r = softmax([max(row[j] for row in S) for j in range(len(q))])
        best = sum(weight * q_j for weight, q_j in zip(r, q, strict=True))
        voted = [model.vote.weight[c] @ best + intercepts[c] for c in (0, 1)]
        target, said = softmax([v.detach() for v in voted]), softmax(classes)
        auxiliary += 0.1 * sum(t * (t.log() - s.log()) for t, s in zip(target, said, strict=True))
        classes = [(s + v) / 2 for s, v in zip(classes, voted, strict=True)]
    if model.instance is not None:
        per_class = []
        for c in (0, 1):
            u = [model.instance.weight[c] @ h_n + model.instance.bias[c] for h_n in h]
            order = sorted(range(len(h)), key=lambda n, c=c: attention[c][n].item())
            top, bottom = order[-8:], order[:8]
            if label == c:
                of_top = mean([(1 + (-u[n]).exp()).log() for n in top])
                of_bottom = mean([(1 + u[n].exp()).log() for n in bottom])
                per_class.append((of_top + of_bottom) / 2)
            else:
                per_class.append(mean([(1 + u[n].exp()).log() for n in top]))
        auxiliary += 0.5 * mean(per_class)
    return classes[1] - classes[0], torch.stack(attention[1]), auxiliary


def small_pamil(prototype_prediction=False, instance_loss=False):
    return roughen(
        PrototypeAttention(
            normal(3, DIM, seed=3).float(),
            generator=generator(),
            feature_dim=6,
            attention_dim=4,
            prototype_prediction=prototype_prediction,
            instance_loss=instance_loss,
        )
    )


@pytest.mark.parametrize(("prototype_prediction", "instance_loss"), OPTIONS)
@pytest.mark.parametrize("n", [1, 6, 11])  # fewer and more than the 8 that are labelled
def test_prototype_attention_is_its_equation_written_out(n, prototype_prediction, instance_loss):
    model = small_pamil(prototype_prediction, instance_loss)
    bags, labels = normal(2, n, DIM), torch.tensor([0.0, 1.0], dtype=torch.float64)
    fast = model(bags, labels)
    weights = dict(model.named_parameters())
    written = [
        written_out_pamil(model, bag, int(label)) for bag, label in zip(bags, labels, strict=True)
    ]
    for got, expected in zip(fast, zip(*written, strict=True), strict=True):
        # float64, features standardised by layer norm: 1e-9 leaves room for its small divisors.
        torch.testing.assert_close(got, torch.stack(expected), rtol=1e-9, atol=1e-12)
    gradients = [
        torch.autograd.grad(
            sum((x * k).sum() for x, k in loss), weights.values(), allow_unused=True
        )
        for loss in (
            list(zip([fast.logit, fast.auxiliary], (1.0, 3.0), strict=True)),
            [(x, k) for row in written for x, k in ((row[0], 1.0), (row[2], 3.0))],
        )
    ]
    for name, got, expected in zip(weights, *gradients, strict=True):
        # With one instance attention is 1 whatever its weights: loops and tensors round apart.
        torch.testing.assert_close(
            got, expected, rtol=1e-8, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}"
        )


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 12), seed=st.integers(0, 2**16))
@torch.no_grad()
def test_mean_and_max_pool_the_instances_logits(n, seed):
    bag = normal(n, DIM, seed=seed)
    for name, pool in [("mean", np.mean), ("max", np.max)]:
        model = roughen(build_aggregator(name, DIM, generator=generator()), seed)
        weight, constant = model.classifier.numpy(), float(model.intercept)
        own = [float(weight @ row) + constant for row in bag.numpy()]
        logit, scores, _ = model(bag)
        # Sums of five float64 terms of order 1; absolute, since they can cancel.
        assert scores.tolist() == pytest.approx(own, abs=1e-12)
        assert float(logit) == pytest.approx(pool(own), abs=1e-12)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**16))
def test_one_more_instance_never_lowers_the_maximum(seed):
    model = roughen(build_aggregator("max", DIM, generator=generator()), seed)
    bag = normal(6, DIM, seed=seed)
    assert model(bag).logit >= model(bag[:5]).logit - 1e-12  # the product may round by its shape


# What all aggregators share


@pytest.mark.parametrize("name", AGGREGATORS)
@torch.no_grad()
def test_an_aggregator_is_blind_to_order_and_to_the_bags_beside(name):
    model = roughen(build_aggregator(name, DIM, generator=generator()))
    bags = normal(2, 3, 7, DIM)
    logit, scores, auxiliary = model(bags)
    assert (logit.shape, scores.shape, auxiliary.shape) == ((2, 3), (2, 3, 7), (2, 3))
    order = torch.randperm(7, generator=generator(1))
    shuffled = model(bags[:, :, order])
    torch.testing.assert_close(shuffled.logit, logit)
    torch.testing.assert_close(shuffled.scores, scores[..., order])
    torch.testing.assert_close(shuffled.auxiliary, auxiliary)
    alone = model(bags[1, 2])
    torch.testing.assert_close(alone.logit, logit[1, 2])
    torch.testing.assert_close(alone.scores, scores[1, 2])
    assert model.attends == (name in ("pamil", "abmil"))
    if model.attends:
        torch.testing.assert_close(scores.sum(dim=-1), torch.ones_like(logit))


@pytest.mark.parametrize("name", ["pamil", "abmil"])
def test_untrained_attention_is_even(name):
    model = build_aggregator(name, DIM, generator=generator())
    torch.testing.assert_close(model(normal(3, 7, DIM).float()).scores, torch.full((3, 7), 1 / 7))


@pytest.mark.parametrize("name", AGGREGATORS)
def test_weights_come_from_the_generator_alone(name):
    before = torch.get_rng_state()
    first, again, other = (
        build_aggregator(name, DIM, generator=generator(seed)).state_dict() for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], again[key]) for key in first)
    if name in ("pamil", "abmil"):
        assert not torch.equal(first["gate.weight"], other["gate.weight"])


def test_the_transform_centres_and_scales_by_what_it_was_fitted_on():
    embeddings = 3 * normal(4, 6, DIM) + 100
    transform = Standardise(DIM).double()
    transform.fit(embeddings)
    out = transform(embeddings)
    torch.testing.assert_close(out.mean(dim=(0, 1)), torch.zeros(DIM, dtype=torch.float64))
    assert float(out.square().mean().sqrt()) == pytest.approx(FEATURE_RMS)
    # One scale for all features: their spreads keep their ratio.
    spread = embeddings.std(dim=(0, 1))
    torch.testing.assert_close(out.std(dim=(0, 1)) / spread, (1 / transform.scale).expand(DIM))
    transform.fit(torch.full((2, 3, DIM), 7.0))
    assert torch.equal(transform(torch.full((3, DIM), 7.0)), torch.zeros(3, DIM).double())


def test_prototypes_are_the_clusters_of_the_embeddings():
    centres = 10 * normal(3, DIM)
    instances = (centres.repeat(20, 1) + 0.01 * normal(60, DIM, seed=4)).view(6, 10, DIM)
    found = initial_prototypes(instances, 3, seed=0)
    assert torch.equal(found, initial_prototypes(instances, 3, seed=0))
    # A mean of 20 with noise 0.01 is off by about 0.01·sqrt(5/20) = 0.005.
    assert float(torch.cdist(centres, found).min(dim=1).values.max()) < 0.02
    assert initial_prototypes(instances[:1, :2], 10, seed=0).shape == (2, DIM)
    same = torch.ones(2, 6, DIM)
    assert torch.equal(initial_prototypes(same, 4, seed=0), torch.ones(4, DIM))


# Training


def marked_bags(n_bags, random, n=10, dim=6, mark=1.0):
    """Noise, and in every second bag one instance that carries a mark along the first feature."""
    instances = 0.1 * torch.randn(n_bags, n, dim, generator=random)
    labels = torch.arange(n_bags) % 2.0
    instances[labels == 1, n // 3, 0] += mark
    return BagSet(instances, labels)


def train(train_bags, validation_bags, aggregator="abmil", epochs=3, seed=0, **options):
    return train_mil(
        train_bags, validation_bags, aggregator=aggregator, epochs=epochs, seed=seed, **options
    )


@pytest.fixture(scope="module")
def splits():
    random = generator()
    return marked_bags(40, random), marked_bags(20, random), marked_bags(20, random)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_training_finds_the_marked_instance(name, splits):
    train_bags, validation, test = splits
    epochs = 10 if name == "pamil" else 60
    model = train(train_bags, validation, name, epochs, learning_rate=1e-2).model
    probabilities, scores = predict(model, test.instances)
    # Mean pooling sees a mark of 0.1 in noise of 0.1/sqrt(10): 3.2 standard deviations.
    assert roc_auc_score(test.labels, probabilities) > (0.9 if name == "mean" else 0.99)
    assert (scores[test.labels == 1].argmax(dim=1) == 3).all()


def test_the_kept_model_is_the_one_of_the_best_validation_epoch(splits):
    train_bags, validation, _ = splits
    seen = []
    trained = train(train_bags, validation, epochs=12, learning_rate=0.3, on_epoch=seen.append)
    assert trained.records == seen
    assert [record.epoch for record in seen] == list(range(1, 13))
    losses = [record.validation_loss for record in seen]
    assert trained.epoch == 1 + losses.index(min(losses))
    assert trained.epoch < 12  # the rate is high, so that the choice matters
    logit = trained.model(validation.instances).logit.detach().double()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logit, validation.labels.double())
    # The intercept is stored in float32, and the loss was taken from the same logits in float64.
    assert float(loss) == pytest.approx(min(losses), rel=1e-3, abs=1e-6)


def test_the_intercept_fits_the_validation_bags():
    """Maximum likelihood of an intercept: the mean probability is the share of positive bags."""
    labels = torch.tensor([0.0, 0.0, 0.0, 1.0] * 3)
    instances = torch.randn(12, 5, 4, generator=generator()) + labels[:, None, None]
    for name in AGGREGATORS:
        model = train(BagSet(instances, labels), BagSet(instances + 0.5, labels), name).model
        probabilities, _ = predict(model, instances + 0.5)
        assert float(probabilities.mean()) == pytest.approx(0.25, abs=1e-5)  # float32 logits


@pytest.mark.parametrize("name", AGGREGATORS)
def test_the_same_seed_gives_the_same_bits_also_after_saving(name, splits, tmp_path):
    before = torch.get_rng_state()
    options = {"prototype_prediction": True, "instance_loss": True, "n_prototypes": 4}
    first, second = (train(*splits[:2], name, 2, **options).model for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    state = first.state_dict()
    assert all(torch.equal(state[key], second.state_dict()[key]) for key in state)
    torch.save(state, tmp_path / "mil.pt")
    loaded = load_aggregator(name, torch.load(tmp_path / "mil.pt", weights_only=True))
    raw = splits[2].instances
    for got, expected in zip(predict(loaded, raw), predict(first, raw), strict=True):
        assert torch.equal(got, expected)


def test_the_scale_of_the_embeddings_does_not_matter(splits):
    said = []
    for factor in (1.0, 256.0):  # a power of two changes no rounding
        scaled = [BagSet(bags.instances * factor, bags.labels) for bags in splits]
        said.append(predict(train(*scaled[:2]).model, scaled[2].instances))
    assert torch.equal(said[0][0], said[1][0])
    assert torch.equal(said[0][1], said[1][1])


@pytest.mark.parametrize("name", AGGREGATORS)
@pytest.mark.parametrize("n", [1, 3])
def test_tiny_bags_can_be_trained_on(name, n):
    random = generator()
    bags = [marked_bags(2, random, n=n, dim=8) for _ in range(3)]
    probabilities, scores = predict(train(*bags[:2], name).model, bags[2].instances)
    assert probabilities.isfinite().all()
    assert scores.shape == (2, n)


def test_one_abnormal_instance_of_a_hundred_is_found():
    """The case in which attention without the concept settles on what is absent."""
    random = generator()
    bags = [marked_bags(size, random, n=100, dim=32, mark=0.6) for size in (40, 20, 40)]
    model = train(*bags[:2], epochs=60, learning_rate=3e-3).model
    probabilities, scores = predict(model, bags[2].instances)
    truth = np.arange(100) == 33
    precision = np.mean([average_precision_score(truth, row) for row in scores[1::2]])
    # Six standard deviations: the true direction itself ranks the instance first in each bag.
    assert roc_auc_score(bags[2].labels, probabilities) > 0.9
    assert precision > 0.8


def test_the_concept_is_the_direction_that_marks_positive_bags(splits):
    train_bags, validation, test = splits
    concept = find_concept(
        train_bags.instances,
        train_bags.labels,
        validation.instances,
        validation.labels,
        random=generator(),
    )
    logits = concept.logits(test.instances)
    assert ((logits.logsumexp(dim=1) > 0) == (test.labels == 1)).all()
    assert (logits[test.labels == 1].argmax(dim=1) == 3).all()


@pytest.mark.parametrize("name", AGGREGATORS)
def test_a_curriculum_starts_from_the_weights_and_not_from_the_transform(name, splits):
    start = train(*splits[:2], name, 5, learning_rate=1e-2).model.state_dict()
    moved = [BagSet(2 * bags.instances + 1, bags.labels) for bags in splits]
    # A rate of 0 leaves the weights that it starts from, intercept apart.
    after = train(*moved[:2], name, 1, learning_rate=0.0, weight_decay=0.0, init=start).model
    for key, value in after.state_dict().items():
        same = torch.equal(value, start[key])
        assert same == (not key.startswith("standardise")) or key == "intercept", key
    expected = Standardise(6)
    expected.fit(moved[0].instances)
    assert torch.equal(after.standardise.centre, expected.centre)
    assert torch.equal(after.standardise.scale, expected.scale)


# Errors


@pytest.mark.parametrize("name", ["pamil", "mean"])
def test_a_start_from_another_model_is_refused(name, splits):
    abmil = train(*splits[:2], epochs=1).model.state_dict()
    with pytest.raises(InputError, match=f"is not one of aggregator {name}"):
        train(*splits[:2], name, init=abmil)
    wide = marked_bags(6, generator(), dim=9)
    with pytest.raises(InputError, match="takes embeddings of 6 features, these have 9"):
        train(wide, wide, init=abmil)


def test_unusable_bags_and_unknown_aggregators_are_refused(splits):
    good = splits[0]
    one_kind = BagSet(good.instances, torch.ones_like(good.labels))
    with pytest.raises(InputError, match="training bags must hold both labels"):
        train(one_kind, good)
    with pytest.raises(InputError, match="validation bags must hold both labels"):
        train(good, one_kind)
    broken = BagSet(good.instances.clone().index_fill_(1, torch.tensor(0), math.nan), good.labels)
    with pytest.raises(InputError, match="validation bags hold embeddings that are not finite"):
        train(good, broken)
    with pytest.raises(InputError, match="did you mean pamil"):
        train(good, good, "pamill")


@pytest.mark.parametrize("name", AGGREGATORS)
def test_a_loss_that_is_not_finite_ends_training_in_one_line(name, splits):
    with pytest.raises(TrainingFailedError, match="no longer finite in epoch") as caught:
        train(*splits[:2], name, learning_rate=1e30)
    assert "\n" not in str(caught.value)
