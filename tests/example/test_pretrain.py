"""Pretraining's parts: batches, schedule, views, and the measures of collapse."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slam_ags_example.augment import DigitViews
from slam_ags_example.config import RunConfig, generator
from slam_ags_example.data import load_patches
from slam_ags_example.embed import effective_rank, feature_std, read_embeddings, write_embeddings
from slam_ags_example.encoder import PretrainingModel
from slam_ags_example.objectives import OBJECTIVES, TrainingPatches
from slam_ags_example.pretrain import (
    _batches,
    _rows,
    _steps_per_epoch,
    _warm_up_then_cosine,
    pretrain,
)


@settings(deadline=None, max_examples=60)
@given(
    n_positive=st.integers(2, 200),
    n_negative=st.integers(2, 200),
    batch_size=st.integers(4, 300),
    seed=st.integers(0, 2**32),
)
def test_an_epoch_sees_every_patch_once(n_positive, n_negative, batch_size, seed):
    random = torch.Generator().manual_seed(seed)
    n_steps = _steps_per_epoch(n_positive, n_negative, batch_size)
    positive, negative = zip(*_rows(n_positive, n_negative, n_steps, random), strict=True)
    for batches, n in [(positive, n_positive), (negative, n_negative)]:
        assert sorted(torch.cat(batches).tolist()) == list(range(n))
        sizes = [len(batch) for batch in batches]
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) >= 2


def test_each_view_keeps_the_truth_of_its_patch():
    abnormal = torch.arange(24) % 3 == 0
    inked = abnormal.float().view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    patches = TrainingPatches(inked, torch.zeros(10, 1, 8, 8), abnormal)
    for batch in _batches(patches, 3, DigitViews(), generator(0, "views")):
        assert batch.positive.shape == (2 * 8, 1, 8, 8)
        assert len(batch.negative) in (2 * 3, 2 * 4)
        assert torch.equal(batch.positive.mean(dim=(1, 2, 3)) > 0.4, batch.abnormal)
        first, second = batch.positive.chunk(2)  # of the same patches, one after the other
        assert torch.equal(first.mean(dim=(1, 2, 3)) > 0.4, second.mean(dim=(1, 2, 3)) > 0.4)


def test_batches_are_as_large_as_asked_for():
    assert _steps_per_epoch(420, 420, 256) == 4  # 840 patches in batches of 210


def test_schedule_warms_up_to_one_and_ends_near_zero():
    factor = _warm_up_then_cosine(150)
    values = [factor(step) for step in range(150)]
    assert values[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert values[10] == pytest.approx(1)
    assert all(a > b for a, b in itertools.pairwise(values[10:]))
    assert values[-1] < 1e-3


def test_views_stay_in_range_differ_and_repeat_with_the_seed():
    images = load_patches("digits").images[:32]
    view = DigitViews()
    first, second = (view(images, generator(0, "views")) for _ in range(2))
    random = generator(0, "views")
    assert torch.equal(first, second)
    assert not torch.equal(view(images, random), view(images, random))
    assert first.shape == images.shape
    assert first.min() >= 0
    assert first.max() <= 1


def test_views_without_any_change_are_the_images():
    images = load_patches("digits").images[:8]
    still = DigitViews(rotation_deg=0, scale=0, shear=0, shift_px=0, contrast=0, noise_std=0)
    # bilinear sampling at the pixel centres: float32 rounding of the grid alone
    torch.testing.assert_close(still(images, generator(0, "views")), images, atol=1e-5, rtol=0)


def test_a_shift_is_counted_in_pixels():
    still = {"rotation_deg": 0, "scale": 0, "shear": 0, "contrast": 0, "noise_std": 0}
    ramp = torch.arange(8.0).div(16).expand(256, 1, 8, 8)
    moved = DigitViews(shift_px=0.5, **still)(ramp, generator(0, "views"))[:, 0, 4, 4] * 16
    assert (moved - 4).abs().max() <= 0.5 + 1e-4
    assert (moved - 4).abs().max() > 0.4


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
    models = [PretrainingModel(1, generator=generator(seed, "encoder")) for seed in (0, 0, 1)]
    weights = [model.encoder[0].weight for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert float(models[0].encoder[3].weight.detach().std()) == pytest.approx(
        math.sqrt(2 / (9 * 32)), rel=0.05
    )


def pretrain_small(config, on_epoch=lambda record: None):
    """Pretrain on 40 patches of "positive bags", the first 4 abnormal, and 30 of negative ones."""
    images = load_patches("digits").images
    model = PretrainingModel(1, generator=generator(0, "encoder"))
    patches = TrainingPatches(images[:40], images[40:70], torch.arange(40) < 4)
    return model, pretrain(model, patches, images[70:100], config, on_epoch=on_epoch)


def test_pretraining_records_what_surgery_saw():
    seen = []
    _, records = pretrain_small(RunConfig(epochs=2, batch_size=32), on_epoch=seen.append)
    assert seen == records
    assert [record.epoch for record in records] == [1, 2]
    for record in records:
        assert -1 / 0.07 <= record.losses["similarity"] <= 0
        assert record.losses["nt_xent"] > 0
        assert -1 <= record.conflict.cosine <= 1
        assert record.conflict.norms["nt_xent"] > 0
        assert record.conflict.norms["similarity"] > 0
        assert 1 <= record.effective_rank <= 30
        assert record.feature_std > 0


def test_a_record_is_one_row_of_numbers():
    _, (record,) = pretrain_small(RunConfig(epochs=1, batch_size=32))
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
        "effective_rank",
        "feature_std",
    ]
    assert record.row()["weight_similarity"] == record.conflict.weights["similarity"]


@pytest.mark.parametrize("method", OBJECTIVES)
def test_every_method_changes_the_encoder_and_repeats_with_the_seed(method):
    config = RunConfig(method=method, epochs=2, batch_size=32)
    untrained = PretrainingModel(1, generator=generator(0, "encoder"))
    (first, records), (second, again) = (pretrain_small(config) for _ in range(2))
    assert records == again
    start, *ends = (model.encoder.state_dict() for model in (untrained, first, second))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in start)
    assert not torch.equal(ends[0]["0.weight"], start["0.weight"])


@pytest.mark.parametrize("method", ["simclr", "ws-sil", "supervised", "one-class"])
def test_one_task_has_no_conflict(method):
    _, records = pretrain_small(RunConfig(method=method, epochs=2, batch_size=32))
    for record in records:
        assert record.conflict is None
        assert len(record.losses) == 1
        columns = ["epoch", *record.losses, "effective_rank", "feature_std"]
        assert list(record.row()) == columns
        assert all(math.isfinite(value) for value in record.row().values())


def test_weaksupcon_is_slam_ags_under_the_plain_sum():
    settings = {"epochs": 2, "batch_size": 32}
    _, records = pretrain_small(RunConfig(method="weaksupcon", **settings))
    assert records == pretrain_small(RunConfig(surgery="sum", **settings))[1]
    assert records != pretrain_small(RunConfig(surgery="ags", **settings))[1]
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
            pretrain_small(RunConfig(method=method, epochs=2, batch_size=32))
        return met

    reference, *others = (batches_of(method) for method in OBJECTIVES)
    assert len(reference) == 2 * 3
    assert sum(int(batch.abnormal.sum()) for batch in reference) == 2 * 2 * 4
    for batches in others:
        for one, other in zip(reference, batches, strict=True):
            assert torch.equal(one.positive, other.positive)
            assert torch.equal(one.negative, other.negative)
            assert torch.equal(one.abnormal, other.abnormal)


def test_the_untrained_encoder_is_no_method_to_pretrain_by():
    with pytest.raises(ValueError, match=r"one of slam-ags, .*, got 'random'"):
        pretrain_small(RunConfig(method="random"))


def test_one_class_contracts_and_does_not_collapse():
    # Contraction is the aim, so the spread falls; collapse would be one direction, a rank of 1.
    start = PretrainingModel(1, generator=generator(0, "encoder"))
    model, records = pretrain_small(RunConfig(method="one-class", epochs=40, batch_size=32))
    assert records[-1].losses["distance"] < 0.5 * records[0].losses["distance"]
    assert records[-1].effective_rank > 10
    assert records[-1].feature_std > 0.01
    for name, value in model.encoder.named_parameters():
        if value.ndim == 1:  # batch norm's scales and shifts
            assert torch.equal(value, start.encoder.get_parameter(name))


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
