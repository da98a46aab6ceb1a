"""Sources of patches, decoded image sets, their cache, and batches: on files that a test writes."""

import itertools
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from slam_ags_example.config import InputError
from slam_ags_example.data import batches, check_images, images, open_images, open_source
from slam_ags_example.data.helper import helper_processes
from slam_ags_example.data.parallel import PART, spread, threads
from slam_ags_example.smears import draw_cells

CPU = torch.device("cpu")


def picture(seed, size=(250, 250), mode="RGB"):
    """Coarse noise, so that a JPG of it is like a photograph's."""
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).convert(mode)


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


GOOD = [
    "ABE/ABE_00001.jpg",
    "LYT/0001-1000/LYT_00001.jpg",
    "LYT/0001-1000/LYT_00002.JPG",
    "LYT/1001-2000/LYT_01001.jpg",
    "PMO/0001-1000/PMO_00002.png",
]
TRUNCATED = "PMO/0001-1000/PMO_00001.jpg"


@pytest.fixture
def tree(tmp_path):
    """The layout of the TCIA set: nested blocks, a flat class, and what may go wrong with it."""
    root = tmp_path / "distribution" / "BM_cytomorphology_data"
    for seed, name in enumerate(GOOD):
        save(root / name, picture(seed, mode="L" if name.endswith("png") else "RGB"))
    save(root / TRUNCATED, picture(9))
    content = (root / TRUNCATED).read_bytes()
    (root / TRUNCATED).write_bytes(content[: len(content) // 2])
    (root / "abbreviations.csv").write_text("ABE,abnormal eosinophil\n")
    (root / "LYT" / "Thumbs.db").write_text("")
    (root / "LYT" / "0001-1000" / "._LYT_00001.jpg").write_text("resource fork")
    (root / "KSC").mkdir()
    return root


# --- sources ---


@pytest.mark.parametrize("above", [False, True])
def test_the_tcia_tree_and_the_folder_above_it_give_the_same_references(tree, above):
    source = open_source(str(tree.parent if above else tree))
    assert source.references == tuple(sorted([*GOOD, TRUNCATED]))
    assert source.classes == ("ABE", "LYT", "LYT", "LYT", "PMO", "PMO")
    assert source.ignored == 3
    assert source.channels == 3
    expected = np.asarray(Image.open(tree / GOOD[0]))
    assert np.array_equal(source.read(GOOD[:1], 250)[0].permute(1, 2, 0), expected)


def test_the_order_of_the_file_system_changes_nothing(tmp_path, monkeypatch):
    for name in ("b/2.png", "a/x/1.png", "b/10.png", "a/0.png"):
        save(tmp_path / name, picture(0, (4, 4)))
    walk, order = os.walk, random.Random(0)

    def shuffled(*arguments, **options):
        for folder, inner, names in walk(*arguments, **options):
            order.shuffle(inner)
            order.shuffle(names)
            yield folder, inner, names

    monkeypatch.setattr(os, "walk", shuffled)
    seen = {open_source(str(tmp_path)).references for _ in range(8)}
    assert seen == {("a/0.png", "a/x/1.png", "b/10.png", "b/2.png")}


@pytest.mark.parametrize(
    ("files", "references", "ignored"),
    [
        (["cat/1.png", "dog/1.png", "overview.png"], ["cat/1.png", "dog/1.png"], 1),
        (["a/b/cat/1.png", "a/b/dog/1.png", "a/x.txt"], ["cat/1.png", "dog/1.png"], 1),
        (["a/cat/1.png", "b/dog/1.png"], ["a/cat/1.png", "b/dog/1.png"], 0),
        (["cat/1.png", "cat/2.png"], ["cat/1.png", "cat/2.png"], 0),
        (["PMO/0001-1000/1.png", "PMO/1001-2000/2.png"], None, 0),
        (["0-9/1.png", "10-19/1.png"], ["0-9/1.png", "10-19/1.png"], 0),
        (["a/.cache/1.png", "a/1.png", "b/1.png"], ["a/1.png", "b/1.png"], 0),
    ],
)
def test_the_class_is_the_first_folder_below_the_root(tmp_path, files, references, ignored):
    for name in files:
        path = tmp_path / name
        save(path, picture(0, (4, 4)), format="png")
    source = open_source(str(tmp_path))
    references = files if references is None else references
    assert list(source.references) == references
    assert list(source.classes) == [name.split("/")[0] for name in references]
    assert source.ignored == ignored


def test_links_are_followed_once_and_loops_end(tmp_path):
    save(tmp_path / "data" / "b" / "1.png", picture(0, (4, 4)))
    save(tmp_path / "elsewhere" / "2.png", picture(1, (4, 4)))
    (tmp_path / "data" / "b" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "a").symlink_to(tmp_path / "data" / "b")
    (tmp_path / "data" / "c").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "self").symlink_to("self")
    assert open_source(str(tmp_path / "data")).references == ("b/1.png", "c/2.png")


@pytest.mark.parametrize(
    ("files", "data", "message"),
    [
        ([], "", "holds no images .*name a folder with a subfolder for each class"),
        (["a/notes.txt"], "", "holds no images"),
        (["1.png"], "", "no subfolder for each class: name the folder above"),
        (["0001-1000/1.png", "1001-2000/2.png"], "", "no subfolder for each class"),
        (["a/1.png"], "/a/1.png", "or a folder that is there"),
        ([], "/nowhere", "or a folder that is there"),
    ],
)
def test_a_folder_that_cannot_serve_says_why(tmp_path, files, data, message):
    for name in files:
        save(tmp_path / name, picture(0, (4, 4)), format="png")
    with pytest.raises(InputError, match=message) as error:
        open_source(f"{tmp_path}{data}")
    assert "\n" not in str(error.value)


def test_a_misspelt_source_offers_the_nearest():
    with pytest.raises(InputError, match="did you mean synthetic"):
        open_source("syntetic")


def test_digits_are_those_of_scikit_learn():
    source = open_source("digits")
    digits = load_digits()
    references = [source.references[row] for row in (1796, 0, 4)]
    assert references == ["digits/1796", "digits/0000", "digits/0004"]
    # A level of 16 is exact in eight bits up to half a step of 1/255.
    expected = torch.from_numpy(digits.images[[1796, 0, 4]] / 16).unsqueeze(1)
    assert torch.allclose(
        source.read(references, 8).double() / 255, expected, rtol=0, atol=0.5 / 255
    )
    assert source.classes == tuple(str(digit) for digit in digits.target)
    with pytest.raises(InputError, match="--image-px must be 8 for digits, got 16"):
        source.read(references, 16)


def test_a_drawn_patch_is_its_reference_and_shows_30_um_at_any_size():
    source = open_source("synthetic")
    assert len(source.references) == len(set(source.references)) == 250_000
    references = ["synthetic/LYT/000012", "synthetic/BLA/000003"]
    assert [source.classes[source.references.index(name)] for name in references] == ["LYT", "BLA"]
    for image_px, pixel_um in ((250, 0.12), (50, 0.6)):
        cells = draw_cells(
            ["LYT", "BLA"], seed=0, indices=[12, 3], size_px=image_px, pixel_um=pixel_um
        )
        assert torch.equal(source.read(references, image_px), cells.images)
    with pytest.raises(InputError, match="--image-px must be 16 to 4096 for synthetic, got 8"):
        open_images(source, references, image_px=8)


def test_opening_draws_and_decodes_nothing(tree, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("an image was made")

    monkeypatch.setattr("slam_ags_example.data.embedded.draw_cells", refuse)
    monkeypatch.setattr(Image, "open", refuse)
    sources = [open_source("synthetic"), open_source(str(tree))]
    for source in sources:
        assert not open_images(source, source.references, image_px=64, memory_bytes=0).cached


# --- decoding ---


def decoded(path, image_px=8):
    return open_source(str(path.parents[1])).read([f"{path.parent.name}/{path.name}"], image_px)[0]


def solid(mode, value, side=8):
    return Image.new(mode, (side, side), value)


@pytest.mark.parametrize(
    ("image", "suffix", "expected"),
    [
        (solid("L", 90), "png", (90, 90, 90)),
        (solid("1", 1), "png", (255, 255, 255)),
        (solid("RGB", (1, 2, 3)).quantize(4), "png", (1, 2, 3)),
        (solid("RGBA", (10, 20, 30, 0)), "png", (255, 255, 255)),
        (solid("RGBA", (10, 20, 30, 255)), "webp", (10, 20, 30)),
        (solid("LA", (7, 255)), "png", (7, 7, 7)),
        (solid("CMYK", (0, 255, 255, 0)), "tif", (255, 0, 0)),
        (Image.fromarray(np.full((8, 8), 40 << 8 | 7, dtype=np.uint16)), "png", (40, 40, 40)),
        (Image.fromarray(np.full((8, 8), 40 << 8 | 7, dtype=">u2")), "tiff", (40, 40, 40)),
    ],
    ids=lambda value: getattr(value, "mode", None),
)
def test_any_mode_becomes_red_green_and_blue(tmp_path, image, suffix, expected):
    path = tmp_path / "a" / f"1.{suffix}"
    save(path, image, **({"lossless": True} if suffix == "webp" else {}))
    colours = decoded(path).flatten(1)
    assert (colours == torch.tensor(expected).unsqueeze(1)).all()


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bits_are_refused(tmp_path, dtype):
    path = tmp_path / "a" / "1.tif"
    save(path, Image.fromarray(np.full((8, 8), 7, dtype=dtype)))
    with pytest.raises(InputError, match=r"1\.tif cannot be read .32 bits a pixel"):
        decoded(path)


def test_the_camera_may_have_been_turned(tmp_path):
    image = picture(0, (8, 8))
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned clockwise by a quarter
    save(tmp_path / "a" / "1.png", image, exif=turned)
    shown = decoded(tmp_path / "a" / "1.png").permute(1, 2, 0).numpy()
    assert np.array_equal(shown, np.rot90(np.asarray(image), -1))


@pytest.mark.parametrize("wide", [False, True])
def test_the_shorter_side_is_kept_and_the_middle_cut_out(tmp_path, wide):
    pixels = np.zeros((10, 30, 3), dtype=np.uint8)
    pixels[:, 10:20] = np.arange(300, dtype=np.uint8).reshape(10, 10, 3)
    pixels = pixels if wide else pixels.swapaxes(0, 1)
    save(tmp_path / "a" / "1.png", Image.fromarray(pixels))
    middle = pixels[:, 10:20] if wide else pixels[10:20]
    assert np.array_equal(decoded(tmp_path / "a" / "1.png", 10).permute(1, 2, 0), middle)


def test_a_smaller_size_averages_colours(tmp_path):
    """At half size a bicubic filter reaches four pixels: the centre of ten sees no border."""
    thirds = Image.new("RGB", (30, 10), "white")
    thirds.paste((10, 200, 30), (10, 0, 20, 10))
    save(tmp_path / "a" / "1.png", thirds)
    assert decoded(tmp_path / "a" / "1.png", 5)[:, 2, 2].tolist() == [10, 200, 30]


# --- checking ---


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_every_file_that_cannot_be_read_is_found(tree, workers):
    source = open_source(str(tree))
    progress = []
    faults = check_images(
        source,
        [*source.references, "LYT/gone.jpg"],
        workers=workers,
        on_progress=lambda *state: progress.append(state),
    )
    assert list(faults) == [TRUNCATED, "LYT/gone.jpg"]
    assert "truncated" in faults[TRUNCATED]
    assert "No such file" in faults["LYT/gone.jpg"]
    assert progress[-1] == (7, 7)


def test_images_that_are_not_files_are_not_checked():
    assert check_images(open_source("synthetic"), ["synthetic/LYT/000000"], workers=1) == {}
    assert check_images(open_source("digits"), ["digits/0000"], workers=1) == {}


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(kind=st.sampled_from(["jpg", "png", "tif", "bmp", "webp"]), data=st.data())
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow's, about the damage
def test_damage_is_reported_in_one_line_or_harmless(tmp_path, kind, data):
    path = tmp_path / "a" / f"1.{kind}"
    save(path, picture(3, (24, 24)))
    content = bytearray(path.read_bytes())
    cut = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content = content[:cut]
    else:
        content[cut] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    source, references = open_source(str(tmp_path)), [f"a/1.{kind}"]
    fault = check_images(source, references, workers=1).get(references[0])
    if fault is None:
        assert source.read(references, 8).shape == (1, 3, 8, 8)
        return
    assert "\n" not in fault
    with pytest.raises(InputError, match=rf"1\.{kind} cannot be read") as error:
        source.read(references, 8)
    assert "\n" not in str(error.value)


# --- image sets ---


def test_held_and_on_demand_are_the_same_images(tree):
    source = open_source(str(tree))
    n_bytes = len(GOOD) * 3 * 32 * 32
    progress = []
    held = open_images(
        source, GOOD, image_px=32, memory_bytes=n_bytes, on_progress=lambda *x: progress.append(x)
    )
    on_demand = open_images(source, GOOD, image_px=32, memory_bytes=n_bytes - 1)
    assert (held.cached, on_demand.cached) == (True, False)
    assert progress == [(5, 5)]
    rows = held.rows([GOOD[3], GOOD[0], GOOD[3]])
    assert rows.tolist() == [3, 0, 3]
    assert torch.equal(held.read(rows), on_demand.read(rows))
    assert torch.equal(held.read([4]), source.read([GOOD[4]], 32))
    assert len(held) == len(on_demand) == 5
    assert held.references == tuple(GOOD)


def test_small_sets_are_held_by_default_and_huge_ones_are_not(monkeypatch):
    source = open_source("digits")
    assert open_images(source, source.references, image_px=8).cached
    monkeypatch.setattr(images, "_available_bytes", lambda: 2 * 1797 * 64 - 1)
    assert not open_images(source, source.references, image_px=8).cached


def test_available_memory_is_that_of_this_machine():
    assert (
        2**20
        < images._available_bytes()
        <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    )


def test_references_of_another_source_are_refused():
    source = open_source("digits")
    with pytest.raises(InputError, match="2 images of the manifest are not in the data, first 'a'"):
        open_images(source, ["digits/0000", "a", "b"], image_px=8)
    digits = open_images(source, source.references[:3], image_px=8)
    with pytest.raises(InputError, match=r"1 images .* first 'digits/0003': pass the --data"):
        digits.rows(["digits/0000", "digits/0003"])


def test_a_file_that_breaks_after_opening_is_named(tree):
    source = open_source(str(tree))
    with pytest.raises(InputError, match=r"PMO_00001.jpg cannot be read \(.*make the bags again"):
        open_images(source, [TRUNCATED], image_px=16)
    on_demand = open_images(source, GOOD, image_px=16, memory_bytes=0)
    (tree / GOOD[1]).unlink()
    with pytest.raises(InputError, match=r"LYT_00001\.jpg cannot be read .No such file"):
        on_demand.read([0, 1])


def square(names):
    time.sleep(0.001)
    return [name * 2 for name in names]


@settings(deadline=None, max_examples=30)
@given(n=st.integers(0, 5 * PART), workers=st.integers(1, 4))
def test_work_is_spread_without_loss(n, workers):
    names = [str(place) for place in range(n)]
    results, progress = [None] * n, []
    with threads(workers) as submit:
        for place, result in spread(square, names, submit, lambda *x: progress.append(x)):
            results[place] = result
    assert results == [name * 2 for name in names]
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)
    assert progress[-1:] == ([(n, n)] if n else [])


def test_processes_draw_the_same_and_end(monkeypatch):
    source = open_source("synthetic")
    references = source.references[49_950:50_050]  # of both classes
    monkeypatch.setattr(images, "_PROCESSES_PAY", 1)
    helped = open_images(source, references, image_px=16)
    assert torch.equal(helped.read(range(100)), source.read(references, 16))
    assert drawing_processes() == []


def test_a_helper_works_in_a_process_of_its_own_and_an_error_is_the_works_own():
    with helper_processes(1) as submit:
        helper = submit(os.getpgid, 0).result()  # it leads a group of its own
        assert helper not in (os.getpid(), os.getpgid(0))
        assert submit(print, "this is no answer").result() is None
        assert submit(os.getpgid, 0).result() == helper
        with pytest.raises(ValueError, match="invalid literal"):
            submit(int, "x").result()
        # The error has ended it; what it was given next is done here.
        assert submit(os.getpgid, 0).result() == os.getpgid(0)
    with pytest.raises(ProcessLookupError):
        os.kill(helper, 0)


# --- the cache ---


def spoiled(source):
    """The same source, but an image that is read fails the test."""

    def refuse(references, image_px):
        raise AssertionError("an image was read")

    return replace(source, reader=refuse)


def opened(source, cache, references=None, image_px=8):
    references = source.references[:10] if references is None else references
    return open_images(source, references, image_px=image_px, cache=cache)


def test_the_second_time_nothing_is_decoded(tmp_path):
    source = open_source("digits")
    first = opened(source, tmp_path / "new" / "cache")
    again = opened(spoiled(source), tmp_path / "new" / "cache")
    assert torch.equal(first.read(range(10)), again.read(range(10)))
    assert [path.suffix for path in (tmp_path / "new" / "cache").iterdir()] == [".npy"]


def test_whatever_decides_the_pixels_decides_the_file(tree, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    source = open_source(str(tree))

    def n_files():
        return len(list(cache.iterdir()))

    opened(source, cache, GOOD)
    opened(open_source(str(tree.parent)), cache, GOOD)
    assert n_files() == 1
    opened(source, cache, GOOD[::-1])
    opened(source, cache, GOOD[:4])
    opened(source, cache, GOOD, image_px=9)
    assert n_files() == 4
    save(tree / GOOD[0], picture(77))
    assert torch.equal(opened(source, cache, GOOD).read([0]), source.read(GOOD[:1], 8))
    assert n_files() == 5
    (tree / GOOD[0]).unlink()
    with pytest.raises(InputError, match=r"ABE_00001\.jpg cannot be read"):
        opened(source, cache, GOOD)


def test_a_file_of_the_cache_that_is_damaged_is_made_again(tmp_path):
    source = open_source("digits")
    expected = opened(source, tmp_path).read(range(10))
    [path] = tmp_path.iterdir()
    whole = path.read_bytes()

    @settings(deadline=None, max_examples=100)
    @given(place=st.integers(0, len(whole) - 1), flip=st.integers(0, 255))
    def damage(place, flip):
        content = bytearray(whole[: place if flip == 0 else None])
        if flip:
            content[place] ^= flip
        path.write_bytes(content)
        assert torch.equal(opened(source, tmp_path).read(range(10)), expected)
        opened(spoiled(source), tmp_path)
        assert list(tmp_path.iterdir()) == [path]

    damage()


def test_a_file_of_the_cache_cannot_run_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    source = open_source("digits")
    expected = opened(source, tmp_path / "cache").read(range(10))
    [path] = (tmp_path / "cache").iterdir()
    with path.open("wb") as file:
        np.save(file, np.array([Trap()], dtype=object), allow_pickle=True)
    assert torch.equal(opened(source, tmp_path / "cache").read(range(10)), expected)
    assert not (tmp_path / "sprung").exists()


def test_many_may_write_the_same_file_at_once(tmp_path):
    source = open_source("digits")
    barrier = threading.Barrier(6)

    def slow(references, image_px):
        barrier.wait()  # nobody has stored anything when the last one reads
        return source.reader(references, image_px)

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: opened(replace(source, reader=slow), tmp_path), range(6)))
    assert all(torch.equal(one.read(range(10)), found[0].read(range(10))) for one in found)
    [path] = tmp_path.iterdir()
    assert path.suffix == ".npy"
    opened(spoiled(source), tmp_path)


def test_a_cache_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    source = spoiled(open_source("digits"))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--cache .*file cannot be written .File exists"):
        opened(source, tmp_path / "file")
    full = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(InputError, match="0 MiB are free"):
        opened(source, tmp_path / "full")


# --- batches ---


ROWS = [[4, 0], torch.tensor([2]), [1, 3, 4], [0], [1], [2, 2]]


@pytest.fixture
def held(tree):
    return open_images(open_source(str(tree)), GOOD, image_px=16)


@pytest.fixture
def on_demand(tree):
    return open_images(open_source(str(tree)), GOOD, image_px=16, memory_bytes=0)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
def test_batches_are_the_same_whatever_the_number_of_workers(held, on_demand):
    expected = [held.read(rows) for rows in ROWS]
    for images_, workers in ((held, 0), (held, 2), (on_demand, 0), (on_demand, 1), (on_demand, 3)):
        before = torch.get_rng_state()
        found = list(batches(images_, ROWS, device=CPU, workers=workers))
        assert torch.equal(before, torch.get_rng_state())
        assert [batch.dtype for batch in found] == [torch.uint8] * len(ROWS)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def drawing_processes():
    """Child processes, but for the ranks that tests of several processes leave waiting."""
    return [c for c in multiprocessing.active_children() if not c.name.startswith("rank ")]


def nothing_runs():
    names = [thread.name for thread in threading.enumerate()]
    return not drawing_processes() and not any("batches" in name for name in names)


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_is_left_when_the_consumer_stops(on_demand, workers):
    endless = itertools.cycle(ROWS)
    stream = batches(on_demand, endless, device=CPU, workers=workers)
    next(stream)
    assert not nothing_runs()
    del stream
    assert nothing_runs()

    def fails():
        for batch in batches(on_demand, endless, device=CPU, workers=workers):
            raise ZeroDivisionError(batch.shape)

    with pytest.raises(ZeroDivisionError):
        fails()
    assert nothing_runs()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_breaks_during_training_is_one_line(tree, on_demand, workers):
    content = (tree / GOOD[2]).read_bytes()
    (tree / GOOD[2]).write_bytes(content[: len(content) // 2])
    stream = batches(on_demand, [[0], [2], [1]], device=CPU, workers=workers)
    assert next(stream).shape == (1, 3, 16, 16)
    with pytest.raises(InputError, match=r"LYT_00002.JPG cannot be read \(.*make the") as error:
        next(stream)
    assert "\n" not in str(error.value)
    assert nothing_runs()


KILLED = """
import itertools, multiprocessing, os, signal, sys, torch
from slam_ags_example.data import batches, open_images, open_source

if __name__ == "__main__":
    source = open_source(sys.argv[1])
    images = open_images(source, source.references, image_px=16, memory_bytes=0)
    stream = batches(images, itertools.repeat([0]), device=torch.device("cpu"), workers=2)
    next(stream)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_workers_end_with_a_process_that_is_killed(tmp_path):
    save(tmp_path / "data" / "a" / "1.png", picture(0, (8, 8)))
    (tmp_path / "script.py").write_text(KILLED)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "data")]
    # To a file: a pipe would stay open until the workers end.
    with (tmp_path / "pids").open("w") as file:
        assert subprocess.run(command, stdout=file).returncode == -signal.SIGKILL
    running = {int(pid) for pid in (tmp_path / "pids").read_text().split()}
    assert len(running) == 2
    deadline_s = time.monotonic() + 60
    while running and time.monotonic() < deadline_s:
        time.sleep(0.1)
        running = {pid for pid in running if os.path.exists(f"/proc/{pid}")}
    assert not running
