"""Pretraining's parts: batches, schedule, views, and the measures of collapse."""

import itertools
import math
import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsurgery import AdaptiveGradientSurgery
from slam_ags_example.augment import DigitViews
from slam_ags_example.checkpoint import BEST, LAST, Checkpoints, read_checkpoint
from slam_ags_example.config import InputError, RunConfig, generator
from slam_ags_example.data import open_images, open_source
from slam_ags_example.embed import effective_rank, feature_std, read_embeddings, write_embeddings
from slam_ags_example.encoder import PretrainingModel
from slam_ags_example.history import observe
from slam_ags_example.objectives import OBJECTIVES, Batch, TrainingFacts
from slam_ags_example.pretrain import TrainingSet, _parts, pretrain
from slam_ags_example.schedule import steps_per_epoch, warm_up_then_cosine
from slam_ags_example.stages import _deterministic

DIGIT_VIEWS = DigitViews()


@settings(deadline=None, max_examples=60)
@given(
    n_positive=st.integers(2, 200),
    n_negative=st.integers(2, 200),
    batch_size=st.integers(4, 300),
    n_micro=st.integers(1, 5),
    seed=st.integers(0, 2**32),
)
def test_an_epoch_sees_every_patch_once(n_positive, n_negative, batch_size, n_micro, seed):
    if min(n_positive, n_negative) < 2 * n_micro:
        return  # too few patches for micro-batches of two
    patches = TrainingSet(
        images=None,
        positive=torch.arange(n_positive),
        negative=torch.arange(1000, 1000 + n_negative),
        held_out_positive=None,
        held_out_negative=None,
        abnormal=None,
    )
    n_steps = steps_per_epoch(n_positive, n_negative, batch_size, n_micro)
    parts = _parts(patches, n_steps, n_micro, seed, epoch=3)
    assert len(parts) == n_steps * n_micro
    assert [part.ends_step for part in parts] == ([False] * (n_micro - 1) + [True]) * n_steps
    assert sum(part.share for part in parts) == pytest.approx(n_steps)
    for rows, first, n in [
        ([part.positive for part in parts], 0, n_positive),
        ([part.negative for part in parts], 1000, n_negative),
    ]:
        assert sorted(torch.cat(rows).tolist()) == list(range(first, first + n))
        sizes = [len(batch) for batch in rows]
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) >= 2


def test_batches_are_as_large_as_asked_for():
    assert steps_per_epoch(420, 420, 256, 1) == 4  # 840 patches in batches of 210


def test_schedule_warms_up_to_one_and_ends_near_zero():
    factor = warm_up_then_cosine(150, 1 / 15)
    values = [factor(step) for step in range(150)]
    assert values[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert values[10] == pytest.approx(1)
    assert all(a > b for a, b in itertools.pairwise(values[10:]))
    assert values[-1] < 1e-3


def test_effective_rank_counts_directions():
    rows = torch.eye(4).repeat(5, 1) - torch.eye(4).mean()  # three equal singular values
    assert float(effective_rank(rows)) == pytest.approx(3, rel=1e-5)
    assert float(effective_rank(torch.ones(6, 3))) == pytest.approx(1)
    line = torch.outer(torch.arange(6.0), torch.tensor([1.0, 2.0, 3.0]))
    assert float(effective_rank(line)) == pytest.approx(1, abs=1e-5)


def test_feature_std_is_one_for_isotropic_directions_and_zero_for_one():
    random = torch.Generator().manual_seed(0)
    isotropic = torch.randn(4000, 16, generator=random)
    assert float(feature_std(isotropic)) == pytest.approx(1, abs=0.02)
    assert float(feature_std(isotropic[:1].repeat(9, 1))) == pytest.approx(0, abs=1e-6)


def test_weights_come_from_the_generator_alone():
    models = [PretrainingModel(1, 8, generator=generator(seed, "encoder")) for seed in (0, 0, 1)]
    weights = [model.encoder[0].weight for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert float(models[0].encoder[3].weight.detach().std()) == pytest.approx(
        math.sqrt(2 / (9 * 32)), rel=0.05
    )


def pretrain_small(
    config, folder=None, resume=False, *, views=DIGIT_VIEWS, dtype=torch.float32, **more
):
    """Pretrain on 40 patches of "positive bags", the first 4 abnormal, and 30 of negative ones."""
    source = open_source("digits")
    images = open_images(source, source.references[:100], image_px=8)
    model = PretrainingModel(1, 8, generator=generator(0, "encoder")).to(dtype)
    patches = TrainingSet(
        images=images,
        positive=torch.arange(40),
        negative=torch.arange(40, 70),
        held_out_positive=torch.arange(70, 85),
        held_out_negative=torch.arange(85, 100),
        abnormal=torch.arange(100) < 4,
    )
    with tempfile.TemporaryDirectory() as elsewhere:
        checkpoints = Checkpoints(folder or Path(elsewhere), {"seed": config.seed}, resume)
        records, _ = pretrain(model, patches, views, config, checkpoints, **more)
    return model, records


def small(**settings):
    return RunConfig(**{"data": "digits", "image_px": 8, "epochs": 2, "batch_size": 32, **settings})


def test_pretraining_records_what_surgery_saw():
    seen = []
    _, records = pretrain_small(small(), on_epoch=seen.append)
    assert seen == records
    assert [record.epoch for record in records] == [1, 2]
    for record in records:
        # the loss's own bounds, for the 10 negative patches of a step
        assert -1 / 0.07 <= record.losses["similarity"] <= 1 / (19 * 0.07)
        assert record.losses["nt_xent"] > 0
        assert -1 <= record.conflict.cosine <= 1
        assert record.conflict.norms["nt_xent"] > 0
        assert record.conflict.norms["similarity"] > 0
        assert 1 <= record.effective_rank <= 30
        assert record.feature_std > 0


def test_a_record_is_one_row_of_numbers():
    _, (record,) = pretrain_small(small(epochs=1))
    assert list(record.row()) == [
        "epoch",
        "nt_xent",
        "similarity",
        "cosine",
        "conflict_rate",
        "norm_nt_xent",
        "norm_similarity",
        "weight_nt_xent",
        "weight_similarity",
        "validation_loss",
        "effective_rank",
        "feature_std",
    ]
    assert record.row()["weight_similarity"] == record.conflict.weights["similarity"]


@pytest.mark.parametrize("method", OBJECTIVES)
def test_every_method_changes_the_encoder_and_repeats_with_the_seed(method):
    config = small(method=method)
    untrained = PretrainingModel(1, 8, generator=generator(0, "encoder"))
    (first, records), (second, again) = (pretrain_small(config) for _ in range(2))
    assert records == again
    start, *ends = (model.encoder.state_dict() for model in (untrained, first, second))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in start)
    assert not torch.equal(ends[0]["0.weight"], start["0.weight"])


@pytest.mark.parametrize("method", ["simclr", "ws-sil", "supervised", "one-class"])
def test_one_task_has_no_conflict(method):
    _, records = pretrain_small(small(method=method))
    for record in records:
        assert record.conflict is None
        assert len(record.losses) == 1
        columns = ["epoch", *record.losses, "validation_loss", "effective_rank", "feature_std"]
        assert list(record.row()) == columns
        assert all(math.isfinite(value) for value in record.row().values())


def test_weaksupcon_is_slam_ags_under_the_plain_sum():
    _, records = pretrain_small(small(method="weaksupcon"))
    assert records == pretrain_small(small(surgery="sum"))[1]
    assert records != pretrain_small(small(surgery="ags"))[1]
    assert records[-1].conflict.weights == {"nt_xent": 1, "similarity": 1}


def test_every_method_meets_the_same_views_in_the_same_order(monkeypatch):
    def batches_of(method):
        met = []

        class Recording(OBJECTIVES[method]):
            def forward(self, batch):
                met.append(batch)
                return super().forward(batch)

        with monkeypatch.context() as patch:
            patch.setitem(OBJECTIVES, method, Recording)
            pretrain_small(small(method=method))
        return met

    reference, *others = (batches_of(method) for method in OBJECTIVES)
    assert len(reference) == 2 * (3 + 1)  # steps of an epoch, and its held-out patches
    assert sum(int(batch.abnormal.sum()) for batch in reference) == 2 * 2 * 4
    for batches in others:
        for one, other in zip(reference, batches, strict=True):
            assert torch.equal(one.positive, other.positive)
            assert torch.equal(one.negative, other.negative)
            assert torch.equal(one.abnormal, other.abnormal)


def test_the_untrained_encoder_is_no_method_to_pretrain_by():
    with pytest.raises(ValueError, match=r"one of slam-ags, .*, got 'random'"):
        pretrain_small(small(method="random"))


def test_one_class_contracts_and_does_not_collapse():
    # Contraction is the aim, so the spread falls; collapse would be one direction, a rank of 1.
    start = PretrainingModel(1, 8, generator=generator(0, "encoder"))
    model, records = pretrain_small(small(method="one-class", epochs=40))
    assert records[-1].losses["distance"] < 0.5 * records[0].losses["distance"]
    assert records[-1].effective_rank > 10
    assert records[-1].feature_std > 0.01
    for name, value in model.encoder.named_parameters():
        if value.ndim == 1:  # batch norm's scales and shifts
            assert torch.equal(value, start.encoder.get_parameter(name))


def stop_after(n_steps):
    """What asks for a stop after so many steps."""
    count = itertools.count(1)
    return lambda: next(count) >= n_steps


@pytest.mark.parametrize("method", OBJECTIVES)
@pytest.mark.parametrize("n_steps", [1, 3, 5])  # an epoch has 3 steps
def test_a_stopped_run_goes_on_to_the_same_bits(method, n_steps, tmp_path):
    config = small(method=method, epochs=3)
    whole, records = pretrain_small(config)
    with pytest.raises(KeyboardInterrupt):
        pretrain_small(config, tmp_path, stop_asked=stop_after(n_steps))
    seen = []
    resumed, again = pretrain_small(config, tmp_path, resume=True, on_epoch=seen.append)
    assert again == seen == records
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_the_best_checkpoint_is_the_one_of_the_lowest_validation_loss(tmp_path):
    _, records = pretrain_small(small(epochs=4), tmp_path)
    best = read_checkpoint(tmp_path / BEST)
    losses = [record.validation_loss for record in records]
    assert len(best["records"]) == losses.index(min(losses)) + 1
    assert len(read_checkpoint(tmp_path / LAST)["records"]) == 4


def test_a_kill_between_the_two_checkpoints_loses_neither(tmp_path, monkeypatch):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    pretrain_small(small(epochs=4), whole)
    write, best = Checkpoints.write, len(read_checkpoint(whole / BEST)["records"])
    written = []

    def write_one_of_two(self, content, **which):
        written.append(len(content["records"]))
        if written.count(best) == 2:
            raise KeyboardInterrupt  # as a kill would, between the two of that epoch
        write(self, content, **which)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "write", write_one_of_two)
        with pytest.raises(KeyboardInterrupt):
            pretrain_small(small(epochs=4), killed)
    pretrain_small(small(epochs=4), killed, resume=True)
    for name in (BEST, LAST):
        expected, found = (
            read_checkpoint(folder / name)["parts"]["model"] for folder in (whole, killed)
        )
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    pretrain_small(small(), tmp_path)
    with pytest.raises(InputError, match="was made with seed = 0, not 1: resume with the same"):
        pretrain_small(small(seed=1), tmp_path, resume=True)


def test_a_damaged_checkpoint_is_one_line(tmp_path):
    (tmp_path / LAST).write_bytes(b"PK no zip")
    with pytest.raises(InputError, match="cannot be read: pretrain again"):
        pretrain_small(small(), tmp_path, resume=True)


def test_micro_batches_step_once_for_all_of_them():
    _, whole = pretrain_small(small(method="ws-sil", epochs=1))
    _, parts = pretrain_small(small(method="ws-sil", epochs=1, micro_batches=2, batch_size=32))
    # Batch norm sees half as many patches, so the numbers agree roughly alone: cross entropy is
    # 0.7 to 1 here, and a step too many or a loss not divided by two moves it by far more.
    assert parts[0].losses["cross_entropy"] == pytest.approx(
        whole[0].losses["cross_entropy"], abs=0.15
    )


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_trains_and_records_unscaled_norms(precision):
    _, reference = pretrain_small(small())
    _, records = pretrain_small(small(precision=precision))
    for name in ("nt_xent", "similarity"):
        # bfloat16 has 8 bits of mantissa, 0.4%; through the network and six steps a few percent
        expected = reference[0].conflict.norms[name]
        assert records[0].conflict.norms[name] == pytest.approx(expected, rel=0.15)
        # float16 starts at a scale that is too high, and skips a step of the three
        assert records[0].losses[name] == pytest.approx(reference[0].losses[name], rel=0.1)


@pytest.mark.slow
def test_what_is_recorded_costs_under_a_hundredth_of_a_step():
    """At the quick preset's sizes: 128 patches of either kind in a step, views of 45 px."""
    model = PretrainingModel(3, 64, generator=generator(0, "encoder"))
    config = RunConfig()
    facts = TrainingFacts(positive_share=0.5, abnormal_share=0.05, negatives=torch.zeros(1))
    objective = OBJECTIVES["slam-ags"](model, facts, config)
    optimizer = AdaptiveGradientSurgery(torch.optim.AdamW(model.parameters(), lr=1e-3))
    random = torch.Generator().manual_seed(0)
    views = [torch.randn(256, 3, 45, 45, generator=random) for _ in range(2)]
    batch = Batch(*views, torch.zeros(256, dtype=torch.bool))
    steps_s, observations_s = [], []
    for _ in range(6):
        start_s = perf_counter()
        losses = objective(batch)
        optimizer.zero_grad()
        optimizer.backward(losses)
        optimizer.step()
        middle_s = perf_counter()
        observe(list(losses.values()), optimizer.last, torch.ones(()))
        steps_s.append(middle_s - start_s)
        observations_s.append(perf_counter() - middle_s)
    ratio = sorted(observations_s)[3] / sorted(steps_s)[3]
    print(f"a record costs {100 * ratio:.3f}% of a step of {1000 * sorted(steps_s)[3]:.0f} ms")
    assert ratio < 0.01


def test_micro_batches_are_not_added_up_to_larger_steps():
    def moved(**settings):
        config = small(method="ws-sil", epochs=1, optimizer="sgd", learning_rate=1e-3, **settings)
        start = PretrainingModel(1, 8, generator=generator(0, "encoder")).encoder
        end = pretrain_small(config)[0].encoder
        pairs = zip(start.parameters(), end.parameters(), strict=True)
        return float(sum((a - b).detach().square().sum() for a, b in pairs).sqrt())

    # Batch norm sees half as many patches, so the two agree roughly; undivided losses move twice
    # as far, and a step for each part as well.
    assert moved(micro_batches=2) == pytest.approx(moved(), rel=0.4)


def test_embeddings_come_back_by_image(tmp_path):
    embeddings = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    write_embeddings(tmp_path / "e.npz", embeddings, ["a", "b", "c"])
    assert torch.equal(read_embeddings(tmp_path / "e.npz", ["c", "a"]), embeddings[[2, 0]])


def test_embeddings_that_are_not_those_are_refused(tmp_path):
    path = tmp_path / "e.npz"
    with pytest.raises(ValueError, match="embed the patches again"):
        read_embeddings(path, ["a"])
    np.savez(path, images=np.array([{"code": 1}], dtype=object), embeddings=np.zeros((1, 2)))
    with pytest.raises(ValueError, match="embed the patches again"):
        read_embeddings(path, ["a"])
    write_embeddings(path, torch.zeros(1, 2), ["a"])
    with pytest.raises(ValueError, match="embed the patches again"):
        read_embeddings(path, ["b"])


def test_deterministic_convolutions_still_run_on_cudnn():
    with _deterministic():
        assert torch.backends.cudnn.enabled
        assert torch.backends.cudnn.deterministic
