"""The bag manifest: exact witness counts, disjoint images, the same for the same seed."""

from collections import Counter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from slam_ags_example.bags import SPLITS, make_manifest, read_manifest
from slam_ags_example.data import load_patches


def make(n_normal, n_abnormal, **settings):
    classes = ["a"] * n_abnormal + ["b", "c"] * (n_normal // 2) + ["b"] * (n_normal % 2)
    references = [f"image-{index}" for index in range(len(classes))]
    return make_manifest(references, classes, source="test", abnormal="a", **settings)


@st.composite
def requests(draw):
    bag_size = draw(st.integers(1, 30))
    witness_rate = draw(st.floats(0.01, 1))
    n_witnesses = round(witness_rate * bag_size)
    assume(n_witnesses >= 1)
    n_pairs = draw(st.integers(3, 8))
    spare = draw(st.integers(0, 2 * bag_size))
    return bag_size, witness_rate, n_witnesses, n_pairs, spare


@settings(deadline=None, max_examples=100)
@given(request=requests(), seed=st.integers(0, 2**40))
def test_every_manifest_keeps_its_promises(request, seed):
    bag_size, witness_rate, n_witnesses, n_pairs, spare = request
    n_normal = n_pairs * (2 * bag_size - n_witnesses)
    n_abnormal = n_pairs * n_witnesses
    manifest = make(
        n_normal + spare,
        n_abnormal + spare,
        witness_rate=witness_rate,
        bag_size=bag_size,
        seed=seed,
        n_bags=2 * n_pairs,
    )
    images = [cell.image for bag in manifest.bags for cell in bag.instances]
    assert len(images) == len(set(images)) == 2 * n_pairs * bag_size
    for bag in manifest.bags:
        assert len(bag.instances) == bag_size
        assert sum(cell.abnormal for cell in bag.instances) == n_witnesses * bag.positive
        assert all(cell.abnormal == (cell.cell_class == "a") for cell in bag.instances)
    for split in SPLITS:
        labels = Counter(bag.positive for bag in manifest.split(split))
        assert labels[True] == labels[False] >= 1
    assert len({bag.name for bag in manifest.bags}) == 2 * n_pairs


def test_all_images_that_fit_are_used():
    # 42 pairs of bags need 38 normal and 2 abnormal each; 1623 normal digits hold no 43rd.
    digits = load_patches("digits")
    manifest = make_manifest(
        digits.references,
        digits.classes,
        source="digits",
        abnormal="8",
        witness_rate=0.1,
        bag_size=20,
        seed=0,
    )
    n_bags = Counter(bag.split for bag in manifest.bags)
    assert n_bags == {"train": 42, "validation": 16, "test": 26}
    spare = len(digits.images) - 84 * 20
    assert spare == 117


def test_the_seed_decides_the_manifest_and_nothing_else_does():
    same = [make(200, 20, witness_rate=0.1, bag_size=20, seed=seed) for seed in (7, 7, 8)]
    assert same[0] == same[1]
    assert same[0] != same[2]


def test_a_witness_may_stand_anywhere_in_its_bag():
    manifest = make(4000, 400, witness_rate=0.05, bag_size=20, seed=0)
    places = Counter(
        place for bag in manifest.bags for place, cell in enumerate(bag.instances) if cell.abnormal
    )
    assert set(places) == set(range(20))


def test_a_written_manifest_reads_back_equal(tmp_path):
    manifest = make(200, 20, witness_rate=0.1, bag_size=20, seed=3)
    manifest.write(tmp_path / "bags.json")
    assert read_manifest(tmp_path / "bags.json") == manifest


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "other"}'])
def test_a_broken_manifest_is_refused(tmp_path, content):
    (tmp_path / "bags.json").write_text(content)
    with pytest.raises(ValueError, match="make the bags again"):
        read_manifest(tmp_path / "bags.json")


@pytest.mark.parametrize(
    ("n_normal", "n_abnormal", "settings", "message"),
    [
        (113, 6, {}, "needed 114 normal and 6 abnormal, available 113 and 6"),
        (114, 5, {}, "needed 114 normal and 6 abnormal, available 114 and 5"),
        (300, 60, {"n_bags": 20}, "needed 380 normal and 20 abnormal, available 300 and 60"),
        (300, 60, {"witness_rate": 0.02}, "raise --bag-size to 50"),
        (300, 60, {"abnormal": "z"}, "one of the classes a, b, c, got 'z'"),
    ],
)
def test_a_request_that_cannot_be_met_says_why(n_normal, n_abnormal, settings, message):
    classes = ["a"] * n_abnormal + ["b"] * (n_normal - 1) + ["c"]
    references = [str(index) for index in range(len(classes))]
    request = {"abnormal": "a", "witness_rate": 0.1, "bag_size": 20, "seed": 0, **settings}
    with pytest.raises(ValueError, match=message):
        make_manifest(references, classes, source="test", **request)


def test_enough_images_for_one_pair_a_split_is_enough():
    assert len(make(114, 6, witness_rate=0.1, bag_size=20, seed=0).bags) == 6
