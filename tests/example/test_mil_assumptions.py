"""Which aggregators keep to the multiple-instance assumption: positive because of an instance.

After Raff and Holt 2023 (arXiv 2310.17867), "algorithmic unit tests": data sets in which a cue that
the assumption forbids is easier to learn than the one that it allows. Test bags carry the forbidden
cue the other way round. A model that relies on it more than on the allowed one ranks test bags
below chance; the witness alone allows an AUROC of 1.

Max pooling gets it. Gated attention is hurt by the frequency (0.73 to 0.91 over five seeds) and
broken by absence; prototype attention and mean pooling are broken by both. Such a case is an
expected failure.
"""

import functools
import itertools

import pytest
import torch
from sklearn.metrics import roc_auc_score

from slam_ags_example.mil import AGGREGATORS, BagSet, predict, train_mil

N, DIM = 20, 16
CONCEPT, MARKER = 0, 1  # features that carry the witness and the benign marker
EPOCHS = {"pamil": 30, "abmil": 100, "mean": 200, "max": 100}


def bags(n_bags, markers, random):
    """Bags of noise with ``markers[label]`` benign markers; positive ones have a witness too."""
    instances = torch.randn(n_bags, N, DIM, generator=random)
    labels = torch.arange(n_bags) % 2.0
    for label, count in enumerate(markers):
        instances[label::2, 1 : 1 + count, MARKER] += 10
    instances[1::2, 0, CONCEPT] += 8  # eight standard deviations: no excuse not to find it
    return BagSet(instances, labels)


@functools.cache
def aurocs(aggregator, markers, seed):
    """On bags as in training, and on bags with the markers of the labels swapped."""
    random = torch.Generator().manual_seed(seed)
    train, validation = bags(40, markers, random), bags(20, markers, random)
    model = train_mil(
        train, validation, aggregator=aggregator, epochs=EPOCHS[aggregator], seed=seed
    ).model
    sets = bags(40, markers, random), bags(40, markers[::-1], random)
    return [roc_auc_score(s.labels, predict(model, s.instances)[0]) for s in sets]


# Benign markers in a negative bag and in a positive one.
MARKERS = {"frequency": (8, 2), "absence": (1, 0)}
BREAKS = {
    ("mean", "frequency"): "a mean cannot tell few markers from a witness",
    ("mean", "absence"): "a mean cannot tell a missing marker from a witness",
    ("abmil", "absence"): "attention may move to a marker, and its logit may be low",
    ("pamil", "frequency"): "the negative class has attention of its own, which takes the markers",
    ("pamil", "absence"): "the negative class has attention of its own, which takes the marker",
}


def cases():
    for aggregator, cue in itertools.product(AGGREGATORS, MARKERS):
        reason = BREAKS.get((aggregator, cue))
        # How far below chance depends on rounding, but for one, which ranks every bag wrongly.
        strict = (aggregator, cue) == ("mean", "frequency")
        marks = [pytest.mark.xfail(reason=reason, strict=strict)] if reason else []
        yield pytest.param(aggregator, cue, marks=marks)


@pytest.mark.parametrize(("aggregator", "cue"), list(cases()))
def test_an_aggregator_goes_by_the_witness_and_not_by_what_is_absent(aggregator, cue):
    swapped = [aurocs(aggregator, MARKERS[cue], seed)[1] for seed in range(2)]
    # Raff and Holt's criterion, below chance is broken, on the worse of two seeds.
    assert min(swapped) > 0.5


@pytest.mark.parametrize("aggregator", AGGREGATORS)
@pytest.mark.parametrize("cue", MARKERS)
def test_the_cue_is_not_a_handicap_where_it_holds(aggregator, cue):
    """Else a failure above could be one to learn anything at all."""
    assert aurocs(aggregator, MARKERS[cue], 0)[0] > 0.85
