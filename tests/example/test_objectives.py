"""Each method's objective against loops over its equation, in float64, and what it may look at."""

import math

import pytest
import torch
from test_losses import cross_entropy_by_loops, nt_xent_by_loops, similarity_by_loops

from slam_ags_example.config import METHODS, RunConfig, generator
from slam_ags_example.encoder import PretrainingModel
from slam_ags_example.objectives import (
    OBJECTIVES,
    Batch,
    TrainingFacts,
    hypersphere_centre,
)

TEMPERATURE = 0.2
N_POSITIVE, N_NEGATIVE = 5, 4  # patches in the batch; the training set has 12 and 10

# Loops and tensors do the same float64 sums in another order, over at most 18 rows of 128 terms.
TOLERANCE = 1e-10


def exact(objective):
    """The objective without the rounding to float32 before its losses."""

    class InDouble(objective):
        def encode(self, module, views):
            return module(views)

    return InDouble


Exact = {method: exact(objective) for method, objective in OBJECTIVES.items()}


def images(n, seed):
    random = torch.Generator().manual_seed(seed)
    return torch.rand(n, 1, 8, 8, generator=random, dtype=torch.float64)


def make(method, encoder="small", **changes):
    """An objective in float64, its model, and a batch for it."""
    model = PretrainingModel(1, 8, encoder=encoder, generator=generator(0, "encoder")).double()
    facts = TrainingFacts(positive_share=12 / 22, abnormal_share=2 / 22, negatives=images(10, 2))
    config = RunConfig(method=method, temperature=TEMPERATURE, **changes)
    objective = Exact[method](model, facts, config).double().train()
    abnormal = (torch.arange(N_POSITIVE) == 1).repeat(2)
    batch = Batch(images(2 * N_POSITIVE, 3), images(2 * N_NEGATIVE, 4), abnormal)
    return objective, model, batch


def two_tasks_by_loops(objective, model, batch, loss):
    both = model(torch.cat([batch.positive, batch.negative]))  # batch norm sees both tasks
    positive, negative = both[: 2 * N_POSITIVE], both[2 * N_POSITIVE :]
    return {
        "nt_xent": nt_xent_by_loops(*positive.chunk(2), TEMPERATURE),
        "similarity": similarity_by_loops(*negative.chunk(2), TEMPERATURE),
    }[loss]


def simclr_by_loops(objective, model, batch, loss):
    n, m = N_POSITIVE, N_NEGATIVE
    first = [*batch.positive[:n], *batch.negative[:m]]
    second = [*batch.positive[n:], *batch.negative[m:]]
    views = model(torch.stack(first + second))
    return nt_xent_by_loops(views[: n + m], views[n + m :], TEMPERATURE)


def ws_sil_by_loops(objective, model, batch, loss):
    logits = objective.classifier(model.encoder(torch.cat([batch.positive, batch.negative])))
    of_a_positive_bag = torch.arange(len(logits)) < 2 * N_POSITIVE
    return cross_entropy_by_loops(logits, of_a_positive_bag, 12 / 22)


def supervised_by_loops(objective, model, batch, loss):
    logits = objective.classifier(model.encoder(torch.cat([batch.positive, batch.negative])))
    labels = torch.tensor([row in (1, 1 + N_POSITIVE) for row in range(len(logits))])
    return cross_entropy_by_loops(logits, labels, 2 / 22)


def one_class_by_loops(objective, model, batch, loss):
    # the centre, from an encoder that has seen nothing yet
    untrained = PretrainingModel(1, 8, generator=generator(0, "encoder")).double().train()
    columns = untrained.encoder(images(10, 2)).T.tolist()
    centre = [math.fsum(column) / len(column) for column in columns]
    centre = [math.copysign(0.1, c) if abs(c) < 0.1 else c for c in centre]
    rows = model.encoder(batch.negative).tolist()
    squares = [(z_k - c_k) ** 2 for row in rows for z_k, c_k in zip(row, centre, strict=True)]
    return math.fsum(squares) / len(rows)


@pytest.mark.parametrize(
    ("method", "loss", "by_loops"),
    [
        ("slam-ags", "nt_xent", two_tasks_by_loops),
        ("slam-ags", "similarity", two_tasks_by_loops),
        ("weaksupcon", "nt_xent", two_tasks_by_loops),
        ("weaksupcon", "similarity", two_tasks_by_loops),
        ("simclr", "nt_xent", simclr_by_loops),
        ("ws-sil", "cross_entropy", ws_sil_by_loops),
        ("supervised", "cross_entropy", supervised_by_loops),
        ("one-class", "distance", one_class_by_loops),
    ],
)
def test_the_objective_is_its_equation(method, loss, by_loops):
    objective, model, batch = make(method)
    value = objective(batch)[loss]
    assert value.shape == ()
    assert float(value.detach()) == pytest.approx(
        by_loops(objective, model, batch, loss), rel=TOLERANCE
    )


def test_every_method_but_the_untrained_encoder_has_an_objective():
    assert [*OBJECTIVES, "random"] == list(METHODS)


@pytest.mark.parametrize(
    ("method", "reads_positive", "reads_negative", "reads_truth"),
    [
        ("slam-ags", True, True, False),
        ("weaksupcon", True, True, False),
        ("simclr", True, True, False),
        ("ws-sil", True, True, False),
        ("supervised", True, True, True),
        ("one-class", False, True, False),
    ],
)
def test_a_method_looks_at_no_more_than_it_may(method, reads_positive, reads_negative, reads_truth):
    objective, _, batch = make(method)

    def losses(**changes):
        other = Batch(**{**vars(batch), **changes})
        return [float(loss.detach()) for loss in objective(other).values()]

    before = losses()
    assert (losses(positive=images(2 * N_POSITIVE, 5)) != before) == reads_positive
    assert (losses(negative=images(2 * N_NEGATIVE, 6)) != before) == reads_negative
    assert (losses(abnormal=~batch.abnormal) != before) == reads_truth


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        ("slam-ags", {"encoder", "head"}),
        ("weaksupcon", {"encoder", "head"}),
        ("simclr", {"encoder", "head"}),
        ("ws-sil", {"encoder", "classifier"}),
        ("supervised", {"encoder", "classifier"}),
        ("one-class", {"encoder"}),
    ],
)
def test_a_method_reaches_all_that_it_trains(method, parts):
    objective, _, batch = make(method)
    torch.autograd.backward(sum(objective(batch).values()))
    trained = {
        name.removeprefix("model.").split(".")[0]: value.grad is not None
        for name, value in objective.named_parameters()
        if value.requires_grad
    }
    assert trained == dict.fromkeys(parts, True)


@pytest.mark.parametrize("method", OBJECTIVES)
def test_every_method_starts_from_the_same_encoder(method):
    _, model, _ = make(method)
    expected = PretrainingModel(1, 8, generator=generator(0, "encoder")).double().state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name])


def test_surgery_is_slam_agss_alone():
    assert make("slam-ags")[0].surgery == "ags"
    assert make("slam-ags", surgery="pcgrad")[0].surgery == "pcgrad"
    for method in set(OBJECTIVES) - {"slam-ags"}:
        assert make(method)[0].surgery == "sum"


def test_a_centre_keeps_away_from_zero_on_its_own_side():
    means = torch.tensor([-2.0, -0.1, -0.03, 0.0, 0.05, 0.1, 0.7], dtype=torch.float64)

    class Fixed(torch.nn.Module):
        def forward(self, patches):
            return means + patches[:, :1] - patches[:, :1].mean()

    centre = hypersphere_centre(Fixed(), torch.tensor([[1.0], [2.0], [6.0]], dtype=torch.float64))
    expected = torch.tensor([-2.0, -0.1, -0.1, 0.1, 0.1, 0.1, 0.7], dtype=torch.float64)
    torch.testing.assert_close(centre, expected)


def test_one_class_cannot_take_the_short_way_to_its_centre():
    # A last batch norm with scale 0 and shift c makes every embedding c and the loss 0: the
    # parameters that would do it are not trained.
    objective, model, batch = make("one-class")
    last = model.encoder[7]
    assert last.num_features == 128
    assert not any(parameter.requires_grad for parameter in last.parameters())
    assert not [
        name
        for name, value in objective.named_parameters()
        if name.endswith("bias") and value.requires_grad
    ]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(objective.centre)
    # every centre component is positive here, as a mean after ReLU, so ReLU lets it through
    assert float(objective(batch)["distance"].detach()) == pytest.approx(0, abs=1e-20)
