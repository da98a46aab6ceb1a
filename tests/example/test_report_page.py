"""The report: made of a run folder's files alone, one page that holds what they say."""

import base64
import io
import itertools
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from slam_ags_example.bags import make_manifest, read_manifest
from slam_ags_example.config import InputError
from slam_ags_example.evaluate import (
    BagPrediction,
    cell_metrics,
    per_bag_rows,
    per_cell_rows,
    summarise,
)
from slam_ags_example.output import write_csv, write_json
from slam_ags_example.report import write_report
from slam_ags_example.report.figures import conflict_panels
from slam_ags_example.report.folder import read_run, task_names
from slam_ags_example.report.panel import looks
from slam_ags_example.report.retrieval import retrieval_curve
from slam_ags_example.report.words import (
    class_words,
    data_words,
    score_words,
    setting_words,
    title_words,
)
from slam_ags_example.smears import draw_cells

CLASSES = ["LYT"] * 1200 + ["BLA"] * 90
REFERENCES = [f"synthetic/{name}/{row:06d}" for row, name in enumerate(CLASSES)]
TWO_TASKS = ("nt_xent", "similarity")
JPEG_ERROR = 2  # levels: one colour, rounded by the colour transform there and back


def level(reference):
    return int(reference.rsplit("/", 1)[1]) % 256


def flat_images(references):
    """Images of one grey level each, told by the reference's number."""
    levels = torch.tensor([level(reference) for reference in references], dtype=torch.uint8)
    return levels[:, None, None, None].expand(-1, 3, 100, 100)


def predict(bag, random):
    """What a model says that is better than chance and not perfect."""
    return BagPrediction(
        bag=bag.name,
        positive=bag.positive,
        probability=float(1 / (1 + np.exp(random.normal(-0.7 if bag.positive else 0.7, 1.5)))),
        images=tuple(cell.image for cell in bag.instances),
        scores=tuple(random.normal(2.0 * cell.abnormal) for cell in bag.instances),
        abnormal=tuple(cell.abnormal for cell in bag.instances),
    )


def pretraining_rows(tasks, n_epochs):
    rows = []
    for epoch in range(1, n_epochs + 1):
        row = {"epoch": epoch} | {task: 4 - i + 3 / epoch for i, task in enumerate(tasks)}
        if len(tasks) > 1:
            row |= {"cosine": -0.7 + 0.5 / epoch, "conflict_rate": min(1.0, 0.5 + epoch / 20)}
            row |= {f"norm_{task}": 2 / (i + epoch) for i, task in enumerate(tasks)}
            row |= {f"weight_{task}": 1 + 0.2 * i for i, task in enumerate(tasks)}
        rows.append(row | {"effective_rank": 30 - 20 / epoch, "feature_std": 0.6 + 0.2 / epoch})
    return rows


def write_run(folder, *, tasks=TWO_TASKS, n_bags=12, bag_size=20, n_epochs=12, **options):
    """The files of a finished run, as its stages write them; the predictions in them."""
    random = np.random.default_rng(1)
    config = {
        "data": "synthetic",
        "normal": "LYT",
        "abnormal": "BLA",
        "witness_rate": 0.1,
        "bag_size": bag_size,
        "seed": 0,
        "method": "slam-ags",
        "surgery": "ags",
        "encoder": "resnet18",
        "epochs": n_epochs,
        "mil": "abmil",
        "mil_epochs": 30,
        "top_k": None,
    } | options
    manifest = make_manifest(
        REFERENCES,
        CLASSES,
        source="synthetic",
        normal="LYT",
        abnormal="BLA",
        witness_rate=0.1,
        bag_size=bag_size,
        seed=0,
        n_bags=n_bags,
    )
    manifest.write(folder / "bags.json")
    predictions = [predict(bag, random) for bag in manifest.split("test")]
    top_k = bag_size // 4
    mil = [{"epoch": e, "train_loss": 1 / e, "validation_loss": 0.2 + 1 / e} for e in range(1, 31)]
    write_csv(folder / "pretraining.csv", pretraining_rows(tasks, n_epochs) if tasks else [])
    write_csv(folder / "mil.csv", mil)
    write_csv(folder / "test_bags.csv", per_bag_rows(predictions, top_k))
    write_csv(folder / "test_cells.csv", per_cell_rows(predictions))
    conflict = {"conflict_rate": 0.97, "mean_cosine": -0.66} if len(tasks) > 1 else {}
    metrics = {
        **summarise(predictions, top_k, seed=0, n_resamples=100),
        "pretraining": {"effective_rank": 28.3, "feature_std": 0.62, **conflict},
        "mil": {"epoch": 17, "validation_loss": 0.26},
        "splits": manifest.counts(),
    }
    versions = {"torch": "2.11.0", "python": "3.11.9"}
    write_json(
        folder / "config.json", {"config": config, "device": "my-device", "versions": versions}
    )
    write_json(folder / "timing.json", {"pretraining_s": 12.345, "patches_per_s": 410.5})
    write_json(folder / "metrics.json", metrics)
    return predictions


def report(folder, images=flat_images, **options):
    """A report's text, and the predictions that it is about."""
    predictions = write_run(folder, **options)
    write_report(folder, images)
    return (folder / "report.html").read_text(encoding="utf-8"), predictions


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run's folder, its report, and the predictions that it is about."""
    folder = tmp_path_factory.mktemp("run")
    return folder, *report(folder, n_bags=20, bag_size=60)


class Page(HTMLParser):
    """What a browser would fetch, run or look up, and whether every element is closed."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.sources, self.ids, self.links, self.open = [], [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "srcset", "data", "poster", "action"):
                self.sources.append(value)
            elif name in ("href", "xlink:href"):
                self.links.append(value)
            elif name == "id":
                self.ids.append(value)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def headings(html):
    return re.findall(r"<h2>(.*?)</h2>", html)


def shown_cells(html):
    """(reference, data: URI, truth in words, class, frame) of each cell of the galleries."""
    pattern = (
        r'<figure class="cell( abnormal)?" title="(.*?)"><img src="(.*?)" alt=".*?">(.*?)<br>(\S+) '
    )
    return [
        (reference, uri, words, name, bool(frame))
        for frame, reference, uri, words, name in re.findall(pattern, html)
    ]


def decode(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2]))))


def test_the_page_needs_nothing_but_itself(finished):
    _, html, _ = finished
    page = Page(html)
    assert page.open == []
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert page.sources
    assert all(source.startswith("data:image/") for source in page.sources)
    assert "@import" not in html
    assert all(url.startswith("#") for url in re.findall(r"url\(([^)]*)\)", html))
    # Marks and clips are looked up by id: each is there, and once, however many figures there are.
    wanted = page.links + re.findall(r"url\(([^)]*)\)", html)
    assert {name.removeprefix("#") for name in wanted} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_the_same_files_give_the_same_bytes(finished, tmp_path):
    folder, html, _ = finished
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "report.html").unlink()
    write_report(copy, flat_images)
    assert (copy / "report.html").read_text(encoding="utf-8") == html
    assert {path.name for path in copy.iterdir()} == {path.name for path in folder.iterdir()}


def test_sections_come_in_the_order_of_the_pipeline(finished):
    _, html, _ = finished
    assert headings(html) == [
        "Results on test bags",
        "Data",
        "Pretraining",
        "Conflict and surgery",
        "Aggregator",
        "Test bags",
        "Cells of positive test bags",
        "Top-ranked cells of the test bags",
        "Settings",
        "Time",
    ]
    # Two losses, two collapse measures, four of the conflict, aggregator, two and two for the test.
    assert html.count("<svg") == 13


def test_each_number_stands_beside_its_interval_and_chance(finished):
    folder, html, _ = finished
    metrics = json.loads((folder / "metrics.json").read_text())
    rows = re.findall(r'<th scope="row">((?:bags|cells): .*?)</th>(.*?)</tr>', html)
    shown = [tuple(re.findall(r">([\d.–]+)</td>", cells)) for _, cells in rows]

    def three(part, name, chance=None):
        low, high = part[f"{name}_interval"]
        level = part[chance or f"{name}_chance"]
        return f"{part[name]:.3f}", f"{low:.3f}–{high:.3f}", f"{level:.3f}"

    bag, cell = metrics["bag"], metrics["cell"]
    top = cell["top_k"]
    low, high = top["positives_interval"]
    assert shown == [
        three(bag, "f1"),
        three(bag, "auroc"),
        three(bag, "balanced_accuracy"),
        three(cell, "average_precision"),
        three(cell, "precision_at_positives"),
        three(cell, "recall_at_k"),
        (f"{top['positives']:.1f}", f"{low:.1f}–{high:.1f}", f"{top['chance']:.1f}"),
    ]
    assert f"{bag['n_bags']} test bags, {bag['n_positive']} of them positive" in html


def test_galleries_show_the_top_of_every_test_bag_and_the_truth(finished):
    _, html, predictions = finished
    ordered = sorted(predictions, key=lambda bag: not bag.positive)  # positive bags first
    assert re.findall(r"<h3>(.*?):", html) == [bag.bag for bag in ordered]
    expected = []
    for bag in ordered:
        top = sorted(range(60), key=lambda row: -bag.scores[row])[:24]
        expected += [(bag.images[row], bag.abnormal[row]) for row in top]
        if bag.positive:
            found = sum(bag.abnormal[row] for row in top)
            words = re.compile(
                rf"6 of 60 cells are abnormal;\s+<b>{found} of 6 (is|are) among the 24"
            )
            assert words.search(html[html.index(f"<h3>{bag.bag}") :].split("<h3>")[1])
    cells = shown_cells(html)
    assert [(reference, frame) for reference, _, _, _, frame in cells] == expected
    for reference, uri, words, name, frame in cells:
        assert words == ("abnormal" if frame else "normal")  # not by the frame alone
        assert name == reference.split("/")[1]
        picture = decode(uri).astype(int)
        assert picture.shape == (64, 64, 3)
        assert abs(picture - level(reference)).max() <= JPEG_ERROR


def test_a_wrongly_called_bag_is_called_wrong(finished):
    _, html, predictions = finished
    for bag in predictions:
        right = (bag.probability >= 0.5) == bag.positive
        called = "positive" if bag.probability >= 0.5 else "negative"
        truth = "positive" if bag.positive else "negative"
        verdict = "right" if right else "wrong"
        assert f"<h3>{bag.bag}: {truth} bag, called {called} ({verdict})</h3>" in html
    assert {"(right)", "(wrong)"} <= set(re.findall(r"\((?:right|wrong)\)", html))


def test_one_task_has_no_conflict_and_small_grey_images_keep_their_pixels(tmp_path):
    def digits(references):
        random = torch.Generator().manual_seed(0)
        return torch.randint(0, 256, (len(references), 1, 8, 8), generator=random).to(torch.uint8)

    options = {"method": "ws-sil", "surgery": None, "data": "digits", "abnormal": "<b>A&B"}
    html, _ = report(tmp_path, digits, tasks=("cross_entropy",), n_bags=6, n_epochs=1, **options)
    assert "Pretraining" in headings(html)
    assert "Conflict and surgery" not in headings(html)
    assert "finding class &lt;b&gt;A&amp;B from bag labels" in html
    cells = shown_cells(html)
    images = digits([reference for reference, *_ in cells])
    for (_, uri, *_), image in zip(cells, images, strict=True):
        np.testing.assert_array_equal(decode(uri), image[0].numpy())
    assert 'class="cells pixels"' in html


def test_of_many_bags_the_first_are_shown_and_the_page_stays_small(tmp_path):
    drawn = draw_cells(["LYT", "BLA"] * 6, seed=0, size_px=64, pixel_um=0.47).images

    def smears(references):
        return drawn[[level(reference) % len(drawn) for reference in references]]

    html, predictions = report(tmp_path, smears, n_bags=90, bag_size=10, n_epochs=150)
    for label, name in ((True, "positive"), (False, "negative")):
        first = [bag.bag for bag in predictions if bag.positive == label][:12]
        assert re.findall(rf"<h3>(.*?): {name} bag", html) == first
    assert f"{len(predictions) - 24} more test bags are left out" in html
    uris = [uri for _, uri, *_ in shown_cells(html)]
    assert len(uris) == 24 * 5  # half of a small bag
    # With the 24 cells that a larger bag shows.
    assert len(html) + sum(map(len, uris)) / len(uris) * (24 * 24 - len(uris)) < 3e6


def test_an_untrained_encoder_has_no_pretraining(tmp_path):
    html, _ = report(tmp_path, tasks=(), n_bags=6, method="random", surgery=None)
    assert (tmp_path / "pretraining.csv").read_bytes() == b""
    assert not {"Pretraining", "Conflict and surgery"} & set(headings(html))
    assert "was not trained" in html
    assert html.count("<svg") == 5
    (tmp_path / "pretraining.csv").unlink()
    assert read_run(tmp_path).pretraining == {}


def test_many_tasks_are_told_apart():
    tasks = [f"task_{letter}" for letter in "abcdefghijkl"]
    rows = pretraining_rows(tasks, 3)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    assert task_names(columns) == tasks
    *_, norms, weights = conflict_panels(columns)
    for panel in (norms, weights):
        for task in tasks:
            assert panel.svg.count(f">{task.replace('_', ' ')}</text>") == 1
    assert len(set(itertools.islice(looks(), 28))) == 28


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "The cells are drawings"),
        ({"data": "digits"}, "handwritten digits"),
        ({"data": "/home/someone/BM_cytomorphology_data"}, "the folder BM_cytomorphology_data."),
        ({"abnormal": "rest"}, "finding everything but LYT from bag labels"),
        ({"abnormal": "BLA,PMO"}, "finding classes BLA, PMO from bag labels"),
        ({"surgery": "pcgrad"}, "combined by the surgery “pcgrad”"),
        ({"method": "supervised", "surgery": None}, "upper bound"),
        (
            {"encoder": "small", "method": "simclr"},
            "The small convolutional encoder was pretrained",
        ),
        ({"embedding": "head"}, "(the output of its projection head)"),
        ({"mil": "pamil"}, "prototype attention (PAMIL)"),
        ({"mil": "max"}, "own score for the cell"),
        ({"mil": "abmil"}, "attention, the cell's share"),
    ],
)
def test_the_setting_is_told_in_words(options, words, tmp_path):
    write_run(tmp_path, n_bags=6, n_epochs=1, **options)
    run = read_run(tmp_path)
    told = [title_words(run.config), setting_words(run.config, 17), score_words(run.config)]
    text = "\n".join([*told, data_words(run.config, run.manifest)])
    assert words in text
    assert "/home" not in text
    assert "10 abnormal cells" not in text  # of 20 at a witness rate of 10%: two
    assert "2 abnormal cells" in text


def test_classes_are_counted_and_unreadable_images_mentioned(tmp_path):
    write_run(tmp_path, n_bags=6)
    manifest = replace(read_manifest(tmp_path / "bags.json"), excluded=3)
    assert class_words(manifest) == (
        "Classes in all bags, with the number of cells; normal: LYT (114); abnormal: BLA (6). "
        "Images left out because they cannot be read: 3."
    )


def test_settings_versions_and_times_are_listed(finished):
    _, html, _ = finished
    for name, value in {
        "mil_epochs": 30,
        "top_k": "—",
        "device": "my-device",
        "versions torch": "2.11.0",
    }.items():
        assert f'<th scope="row">{name}</th><td>{value}</td>' in html
    assert '<th scope="row">pretraining_s</th><td class="number">12.345</td>' in html


def edit(name, change):
    def spoil(folder):
        path = folder / name
        path.write_text(change(path.read_text()))

    return spoil


def without(part, key):
    def change(text):
        content = json.loads(text)
        del content[part][key]
        return json.dumps(content)

    return change


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "metrics.json").unlink(), "metrics.json cannot be read"),
        (edit("metrics.json", lambda text: text[:-20]), "metrics.json cannot be read"),
        (edit("metrics.json", lambda text: "[]"), "has no bag, cell"),
        (edit("metrics.json", without("bag", "auroc_interval")), "auroc_interval"),
        (edit("config.json", without("config", "epochs")), "lacks 'epochs'"),
        (edit("mil.csv", lambda text: ""), "no column epoch"),
        (edit("mil.csv", lambda text: text.splitlines()[0]), "mil.csv has no row"),
        (edit("test_cells.csv", lambda text: text.replace("synthetic/", "s/")), "in no test bag"),
        (edit("test_cells.csv", lambda text: text[: text.rindex("bag-")]), "the same bags"),
        (edit("test_cells.csv", lambda text: text + "bag-9"), "in no test bag"),
        (edit("pretraining.csv", lambda text: text.replace("7.0", "x")), "not a number"),
    ],
)
def test_a_folder_of_no_finished_run_is_refused_in_one_line(spoil, message, tmp_path):
    write_run(tmp_path)
    spoil(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        write_report(tmp_path, flat_images)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "report.html").exists()


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 12),
    n_bags=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_retrieval_curves_agree_with_the_measures_at_every_k(n, n_bags, seed):
    random = np.random.default_rng(seed)
    truths = random.random((n_bags, n)) < 0.4
    truths[:, 0] |= ~truths.any(axis=1)
    scores = random.permuted(np.tile(np.arange(n), (n_bags, 1)), axis=1)
    ranked = [truth[np.argsort(-row)] for truth, row in zip(truths, scores, strict=True)]
    curve = retrieval_curve(ranked)
    for bag, (truth, row) in enumerate(zip(truths, scores, strict=True)):
        for k in range(1, n + 1):
            metrics = cell_metrics(row, truth, k)
            assert curve.recall[bag, k - 1] == metrics.recall_at_k
            assert curve.recall_chance[k - 1] == metrics.recall_at_k_chance
            assert curve.precision[bag, k - 1] == metrics.positives_at_k / k
            assert curve.precision_chance[bag] == metrics.prevalence


@pytest.mark.parametrize("ranked", [[[False, False]], [True, False]])
def test_wrong_retrievals_are_refused(ranked):
    with pytest.raises(ValueError, match="abnormal cell in every row"):
        retrieval_curve(ranked)
