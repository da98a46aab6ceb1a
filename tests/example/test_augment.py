"""Views: against torchvision's operations image by image, and what they may depend on."""

import itertools
from collections import Counter

import pytest
import torch
from torchvision.transforms.v2 import functional as oracle

from slam_ags_example.augment import MARROW_MEAN, MARROW_STD, DigitViews, SmearViews, _jitter
from slam_ags_example.data import open_source

STILL = {"p_jitter": 0.0, "mean": (0.0,) * 3, "std": (1.0,) * 3}


def smears(n, px=40):
    source = open_source("synthetic")
    return source.read(source.references[:n], px)


def digits(n):
    source = open_source("digits")
    return source.read(source.references[:n], 8)


@pytest.mark.parametrize("seed", range(3))
def test_jitter_is_torchvisions_in_a_fixed_order(seed):
    images = smears(6, 24).float() / 255
    random = torch.Generator().manual_seed(seed)
    brightness, contrast, saturation = 1 + 0.4 * (2 * torch.rand(3, 6, generator=random) - 1)
    hue = torch.rand(6, generator=random) - 0.5
    views = _jitter(images, brightness, contrast, saturation, hue)
    for row in range(6):
        expected = oracle.adjust_brightness(images[row], float(brightness[row]))
        expected = oracle.adjust_contrast(expected, float(contrast[row]))
        expected = oracle.adjust_saturation(expected, float(saturation[row]))
        expected = oracle.adjust_hue(expected, float(hue[row]))
        # torchvision weighs grey by 0.2989, 0.587, 0.114, whose sum is 0.9999; ours sum to 1
        torch.testing.assert_close(views[row], expected, atol=3e-4, rtol=0)


def test_hue_leaves_grey_black_and_white_alone():
    images = torch.tensor([0.0, 0.3, 1.0]).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    ones = torch.ones(3)
    assert torch.equal(_jitter(images, ones, ones, ones, 0.3 * ones), images)


def test_each_view_is_a_crop_turned_and_mirrored_as_often_as_it_should_be():
    n, px = 400, 10
    images = torch.randint(256, (n, 3, px, px), generator=torch.Generator().manual_seed(0))
    images = images.to(torch.uint8)
    views = SmearViews(crop_share=0.8, **STILL).random(images, 0, "key")
    assert views.shape == (n, 3, 8, 8)
    found = Counter()
    for image, view in zip(images.float() / 255, views, strict=True):
        matches = [
            (turns, mirrored, top, left)
            for mirrored, top, left in itertools.product((0, 1), range(3), range(3))
            for crop in [image[:, top : top + 8, left : left + 8]]
            for turns in range(4)
            # colour jitter by nothing rounds in float32
            if torch.allclose(
                torch.rot90(crop.flip(2) if mirrored else crop, turns, (1, 2)), view, atol=1e-5
            )
        ]
        assert len(matches) == 1
        found.update([("turns", matches[0][0]), ("mirrored", matches[0][1]), matches[0][2:]])
    # five standard deviations of a binomial count of 400
    for key, share in [(("mirrored", 1), 0.5), (("turns", 0), 0.2)] + [
        (("turns", turns), 0.8 / 3) for turns in (1, 2, 3)
    ]:
        assert abs(found[key] - share * n) < 5 * (n * share * (1 - share)) ** 0.5, found
    assert len([key for key in found if key[0] in range(3)]) == 9  # every place of the crop


def test_normalisation_is_the_published_one_and_the_centre_is_the_middle():
    images = smears(2, 50)
    views = SmearViews().centre(images)
    assert views.shape == (2, 3, 45, 45)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MARROW_MEAN, MARROW_STD))
    expected = (images[:, :, 2:47, 2:47].float() / 255 - mean) / std
    torch.testing.assert_close(views, expected)


def test_the_published_crop_is_224_of_250():
    assert SmearViews().crop_px(250) == 224


@pytest.mark.parametrize(
    ("views", "images"), [(SmearViews(), smears(8)), (DigitViews(), digits(8))]
)
def test_a_view_depends_on_its_key_alone(views, images):
    first = views.random(images, 0, "a")
    views.random(images, 0, "b")
    assert torch.equal(views.random(images, 0, "a"), first)
    assert not torch.equal(views.random(images, 0, "b"), first)
    assert not torch.equal(views.random(images, 1, "a"), first)
    assert views.centre(images).shape == first.shape
    # images of one batch get draws of their own
    same = images[:1].expand_as(images)
    assert not torch.equal(*views.random(same, 0, "a")[:2])


@pytest.mark.parametrize(
    ("views", "images"), [(SmearViews(), smears(4)), (DigitViews(), digits(4))]
)
def test_views_leave_the_global_stream_and_the_images_alone(views, images):
    before, copy = torch.get_rng_state(), images.clone()
    views.random(images, 0, "a")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(images, copy)


def test_digits_stay_in_range():
    views = DigitViews().random(digits(32), 0, "a")
    assert views.shape == (32, 1, 8, 8)
    assert views.min() >= 0
    assert views.max() <= 1


def test_digit_views_without_any_change_are_the_images():
    images = digits(8)
    still = DigitViews(rotation_deg=0, scale=0, shear=0, shift_px=0, contrast=0, noise_std=0)
    # bilinear sampling at the pixel centres: float32 rounding of the grid alone
    expected = images.float() / 255
    torch.testing.assert_close(still.random(images, 0, "a"), expected, atol=1e-5, rtol=0)


def test_a_shift_is_counted_in_pixels():
    still = {"rotation_deg": 0, "scale": 0, "shear": 0, "contrast": 0, "noise_std": 0}
    ramp = (torch.arange(8) * 30).to(torch.uint8).expand(256, 1, 8, 8)
    views = DigitViews(shift_px=0.5, **still).random(ramp, 0, "a")
    moved = views[:, 0, 4, 4] * 255 / 30
    assert (moved - 4).abs().max() <= 0.5 + 1e-4
    assert (moved - 4).abs().max() > 0.4
