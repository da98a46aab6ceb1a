"""A tree in the layout of Bone Marrow Cytomorphology, from corrupt files to the report."""

import json

import pytest
from PIL import Image

from slam_ags_example.__main__ import main
from slam_ags_example.smears import draw_cells

SMALL = [
    "--bags",
    "6",
    "--bag-size",
    "10",
    "--image-px",
    "32",
    "--epochs",
    "1",
    "--mil-epochs",
    "2",
]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Lymphocytes in two blocks, blasts in one flat folder; a cut JPG and a text file."""
    root = tmp_path_factory.mktemp("data") / "BM_cytomorphology_data"
    for name, folders, n in [("LYT", ["0001-0040", "0041-0080"], 62), ("BLA", ["."], 6)]:
        cells = draw_cells([name] * n, seed=1, size_px=64, pixel_um=0.47).images
        for number, cell in enumerate(cells):
            folder = root / name / folders[number * len(folders) // n]
            folder.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(cell.permute(1, 2, 0).numpy())
            image.save(folder / f"{name}_{number + 1:05d}.jpg", quality=90)
    cut = root / "LYT" / "0001-0040" / "LYT_00003.jpg"
    cut.write_bytes(cut.read_bytes()[:700])
    (root / "BLA" / "notes.txt").write_text("not an image")
    return root


def test_corrupt_images_are_listed_before_training(tree, tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(["run", "--data", str(tree), *SMALL, "--output", str(folder)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "1 image cannot be read, first LYT/0001-0040/LYT_00003.jpg" in err
    assert "--skip-corrupt" in err
    assert "LYT_00003.jpg\t" in (folder / "corrupt.txt").read_text()
    assert not (folder / "bags.json").exists()
    again = ["bags", "--data", str(tree), *SMALL[:4], "--skip-corrupt", "--output", str(folder)]
    assert main(again) == 0  # as the message says


def test_a_run_without_them(tree, tmp_path, capsys):
    options = ["--skip-corrupt", "--output", str(tmp_path)]
    assert main(["run", "--data", str(tree), *SMALL, *options]) == 0
    out = capsys.readouterr().out
    assert "positives in the top" in out
    assert "68 checked, 1 left out" in out
    manifest = (tmp_path / "bags.json").read_text()
    assert "LYT/0041-0080/" in manifest
    assert "BLA/BLA_0000" in manifest
    assert "LYT_00003" not in manifest
    assert json.loads(manifest)["excluded"] == 1
    assert json.loads((tmp_path / "timing.json").read_text())["images_skipped"] == 1
    html = (tmp_path / "report.html").read_text()
    assert "drawings" not in html  # these are somebody's images, whatever they show


def test_an_image_that_vanishes_is_named(tree, tmp_path, capsys):
    options = ["--data", str(tree), *SMALL[:4], "--skip-corrupt", "--output", str(tmp_path)]
    assert main(["bags", *options]) == 0
    reference = json.loads((tmp_path / "bags.json").read_text())["bags"][0]["instances"][0]["image"]
    gone = tree / reference
    kept = gone.read_bytes()
    gone.unlink()
    try:
        capsys.readouterr()
        assert main(["pretrain", "--output", str(tmp_path), *SMALL[4:8]]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert reference in err
    finally:
        gone.write_bytes(kept)
