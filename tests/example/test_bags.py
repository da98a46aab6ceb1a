"""The bag manifest: exact witness counts, disjoint images, the same for the same seed."""

import json
from collections import Counter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from slam_ags_example.bags import MOST_BAGS, SPLITS, make_manifest, read_manifest
from slam_ags_example.config import InputError
from slam_ags_example.data import open_source


def make(n_normal, n_abnormal, **settings):
    classes = ["a"] * n_abnormal + ["b", "c"] * (n_normal // 2) + ["b"] * (n_normal % 2)
    references = [f"image-{index}" for index in range(len(classes))]
    request = {"source": "test", "normal": "rest", "abnormal": "a", "seed": 0} | settings
    return make_manifest(references, classes, **request)


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
    images = manifest.references()
    assert len(images) == len(set(images)) == 2 * n_pairs * bag_size
    for bag in manifest.bags:
        assert len(bag.instances) == bag_size
        assert sum(cell.abnormal for cell in bag.instances) == n_witnesses * bag.positive
        assert all(cell.abnormal == (cell.cell_class == "a") for cell in bag.instances)
    assert len({bag.name for bag in manifest.bags}) == 2 * n_pairs
    assert [name for split in SPLITS for name in manifest.references(split)] == images
    for split, counts in manifest.counts().items():
        bags = manifest.split(split)
        assert counts["bags"] == len(bags) == 2 * counts["positive_bags"] >= 2
        assert counts["positive_bags"] == sum(bag.positive for bag in bags)
        assert counts["patches"] == len(manifest.references(split)) == bag_size * len(bags)
        assert counts["abnormal_patches"] == n_witnesses * counts["positive_bags"]


CLASSES = "abcde"


@settings(deadline=None, max_examples=100)
@given(
    normal=st.sets(st.sampled_from(CLASSES), min_size=1),
    abnormal=st.sets(st.sampled_from(CLASSES), min_size=1),
    rest=st.sampled_from([None, "normal", "abnormal"]),
    seed=st.integers(0, 2**40),
    data=st.data(),
)
def test_bags_hold_the_classes_that_were_asked_for(normal, abnormal, rest, seed, data):
    asked = {"normal": ", ".join(sorted(normal)), "abnormal": ",".join(sorted(abnormal))}
    if rest == "normal":
        asked["normal"], normal = "rest", set(CLASSES) - abnormal
    elif rest == "abnormal":
        asked["abnormal"], abnormal = "rest", set(CLASSES) - normal
    assume(normal and abnormal and not normal & abnormal)
    n_each = 60
    references = [f"{name}/{index}" for index in range(n_each) for name in CLASSES]
    classes = [reference[0] for reference in references]
    excluded = data.draw(st.sets(st.sampled_from(references), max_size=10))
    manifest = make_manifest(
        references,
        classes,
        source="test",
        witness_rate=0.5,
        bag_size=4,
        seed=seed,
        excluded=[*excluded, "not in the source"],
        **asked,
    )
    cells = [cell for bag in manifest.bags for cell in bag.instances]
    assert all(cell.cell_class in (abnormal if cell.abnormal else normal) for cell in cells)
    assert all(cell.image[0] == cell.cell_class for cell in cells)
    assert not excluded & set(manifest.references())
    assert manifest.excluded == len(excluded)
    assert (manifest.normal, manifest.abnormal) == (asked["normal"], asked["abnormal"])
    available = {
        flag: sum(name in names for name in classes) - sum(name[0] in names for name in excluded)
        for flag, names in ((False, normal), (True, abnormal))
    }
    assert len(manifest.bags) == 2 * min(available[False] // 6, available[True] // 2)


def test_all_images_that_fit_are_used():
    # 42 pairs of bags need 38 normal and 2 abnormal each; 1623 normal digits hold no 43rd.
    digits = open_source("digits")
    manifest = make_manifest(
        digits.references,
        digits.classes,
        source="digits",
        normal="rest",
        abnormal="8",
        witness_rate=0.1,
        bag_size=20,
        seed=0,
    )
    n_bags = {split: counts["bags"] for split, counts in manifest.counts().items()}
    assert n_bags == {"train": 42, "validation": 16, "test": 26}
    spare = len(digits.references) - len(manifest.references())
    assert spare == 117


def test_there_is_an_end_to_how_many_bags_nobody_asked_for():
    few = {"witness_rate": 0.5, "bag_size": 2}
    assert len(make(3200, 1100, **few).bags) == MOST_BAGS
    assert len(make(3200, 1100, n_bags=MOST_BAGS + 50, **few).bags) == MOST_BAGS + 50


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
    # Names as file systems allow them; the last one cannot be written in UTF-8.
    names = ['a "quoted" \\ name', "zwölf\n", "\udcff"]
    classes = [name for name in names for _ in range(20)]
    manifest = make_manifest(
        [f"{name}/{index}" for index, name in enumerate(classes)],
        classes,
        source="/data/ä",
        normal="rest",
        abnormal=names[0],
        witness_rate=0.5,
        bag_size=4,
        seed=3,
        excluded=[f"{names[1]}/20"],
    )
    manifest.write(tmp_path / "bags.json")
    assert read_manifest(tmp_path / "bags.json") == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["bags.json"]


def test_a_manifest_that_cannot_be_written_leaves_the_old_one(tmp_path):
    old = make(200, 20, witness_rate=0.1, bag_size=20, seed=3)
    old.write(tmp_path / "bags.json")
    new = make(200, 20, witness_rate=0.1, bag_size=20, seed=4)
    object.__setattr__(new.bags[-1], "name", {"not JSON"})
    with pytest.raises(TypeError, match="not JSON serializable"):
        new.write(tmp_path / "bags.json")
    assert read_manifest(tmp_path / "bags.json") == old
    assert [path.name for path in tmp_path.iterdir()] == ["bags.json"]
    with pytest.raises(InputError, match=r"cannot be written \(No such file"):
        old.write(tmp_path / "nowhere" / "bags.json")


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"format": "slam-ags bags, version 1"}', "\0", "[" * 100_000, b"\xff"],
)
def test_a_broken_manifest_is_refused(tmp_path, content):
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "bags.json").write_bytes(content)
    with pytest.raises(InputError, match="make the bags again"):
        read_manifest(tmp_path / "bags.json")
    with pytest.raises(InputError, match="make the bags again"):
        read_manifest(tmp_path / "nowhere.json")


def first_cells(content):
    return [bag["instances"][0] for bag in content["bags"]]


def same_image(content):
    first_cells(content)[-1]["image"] = first_cells(content)[0]["image"]


def same_image_in_a_bag(content):
    content["bags"][0]["instances"][1] = content["bags"][0]["instances"][0]


def without_positives(content):
    content["bags"] = [
        bag for bag in content["bags"] if not (bag["split"] == "test" and bag["positive"])
    ]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (same_image, r"is in bag-0000 \(train\) and in bag-0009 \(test\)"),
        (same_image_in_a_bag, "an image is in bag-0000 twice"),
        (lambda c: c["bags"][0].update(split="tset"), "got 'tset'; did you mean test"),
        (lambda c: c["bags"][2]["instances"].pop(), "bag-0002 holds 19 instances and bag_size"),
        (lambda c: c.update(bag_size=21), "holds 20 instances and bag_size is 21"),
        (lambda c: c["bags"][0].update(positive=True), "is positive and holds no abnormal"),
        (lambda c: c["bags"][1].update(positive=False), "is negative and holds an abnormal"),
        (lambda c: c["bags"][0].update(name="bag-0001"), "2 bags have the name bag-0001"),
        (without_positives, "test has no positive bag"),
        (lambda c: c["bags"].clear(), "train has no negative bag"),
        (lambda c: c.update(seed="0"), "seed of the manifest must be of type int, got '0'"),
        (lambda c: c.update(seed=-1), "seed must not be negative, got -1"),
        (lambda c: c.update(witness_rate=float("nan")), "witness_rate must be in .* got nan"),
        (lambda c: c.pop("normal"), "the manifest must have source, seed"),
        (lambda c: c["bags"].append(7), "bag 10 must have name, split"),
        (lambda c: first_cells(c)[3].update(abnormal=1), "must be of type bool, got 1"),
        (lambda c: first_cells(c)[3].update(note=""), "instance of bag bag-0003 must have image"),
    ],
)
def test_a_manifest_edited_by_hand_is_checked(tmp_path, edit, message):
    path = tmp_path / "bags.json"
    make(200, 20, witness_rate=0.1, bag_size=20).write(path)
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message) as error:
        read_manifest(path)
    assert "\n" not in str(error.value)
    assert "make the bags again" in str(error.value)


@pytest.mark.parametrize(
    ("n_normal", "n_abnormal", "settings", "message"),
    [
        (113, 6, {}, "needed 114 normal and 6 abnormal, available 113 and 6;"),
        (114, 5, {}, "needed 114 normal and 6 abnormal, available 114 and 5;"),
        (300, 60, {"n_bags": 20}, "needed 380 normal and 20 abnormal, available 300 and 60;"),
        (114, 6, {"excluded": ["0"]}, r"available 114 and 5 \(1 cannot be read\);"),
        (300, 60, {"normal": "c"}, "needed 114 normal and 6 abnormal, available 1 and 60;"),
        (300, 60, {"witness_rate": 0.02}, "raise --bag-size to 50"),
        (300, 60, {"abnormal": "z"}, "--abnormal must be one of a, b, c, rest, got 'z'"),
        (300, 60, {"abnormal": "a,zebra"}, "--abnormal must be one of a, b, c, got 'zebra'"),
        (300, 60, {"normal": "rst"}, "got 'rst'; did you mean rest"),
        (300, 60, {"normal": "b,rest"}, "--normal must be one of a, b, c, got 'rest'"),
        (300, 60, {"normal": ""}, "--normal must be one of a, b, c, rest, got ''"),
        (300, 60, {"abnormal": "rest"}, "cannot both be rest"),
        (300, 60, {"normal": "a,b"}, "--normal and --abnormal both name a:"),
        (300, 60, {"abnormal": "a,b,c"}, "--normal rest holds no class"),
    ],
)
def test_a_request_that_cannot_be_met_says_why(n_normal, n_abnormal, settings, message):
    classes = ["a"] * n_abnormal + ["b"] * (n_normal - 1) + ["c"]
    references = [str(index) for index in range(len(classes))]
    request = {"normal": "rest", "abnormal": "a", "witness_rate": 0.1, "bag_size": 20, "seed": 0}
    with pytest.raises(InputError, match=message) as error:
        make_manifest(references, classes, source="test", **request | settings)
    assert "\n" not in str(error.value)


def test_enough_images_for_one_pair_a_split_is_enough():
    assert len(make(114, 6, witness_rate=0.1, bag_size=20, seed=0).bags) == 6
