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
from slam_ags_example.pretrain import _batches, _steps_per_epoch, _warm_up_then_cosine, pretrain


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
    positive, negative = zip(*_batches(n_positive, n_negative, n_steps, random), strict=True)
    for batches, n in [(positive, n_positive), (negative, n_negative)]:
        assert sorted(torch.cat(batches).tolist()) == list(range(n))
        sizes = [len(batch) for batch in batches]
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) >= 2


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


def test_pretraining_records_what_surgery_saw():
    images = load_patches("digits").images
    model = PretrainingModel(1, generator=generator(0, "encoder"))
    seen = []
    records = pretrain(
        model,
        images[:40],
        images[40:70],
        images[70:100],
        RunConfig(epochs=2, batch_size=32),
        on_epoch=seen.append,
    )
    assert seen == records
    assert [record.epoch for record in records] == [1, 2]
    for record in records:
        assert -1 / 0.07 <= record.similarity <= 0
        assert record.nt_xent > 0
        assert -1 <= record.cosine <= 1
        assert record.norm_nt_xent > 0
        assert record.norm_similarity > 0
        assert 1 <= record.effective_rank <= 30
        assert record.feature_std > 0


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
