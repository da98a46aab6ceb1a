"""The command line end to end, small: files, their schema, errors as one line, the same again."""

import csv
import json
import math

import numpy as np
import pytest
import torch

import gradsurgery
from slam_ags_example.__main__ import main
from slam_ags_example.evaluate import bag_metrics, cell_metrics
from slam_ags_example.help import SUMMARIES
from slam_ags_example.stages import FILES

DIGITS = ["--data", "digits", "--bags", "12", "--seed", "3"]
TINY = ["run", *DIGITS, "--epochs", "2", "--mil-epochs", "3"]
ALWAYS = {"config.json", "timing.json"}
OUTPUT_FILES = ALWAYS.union(*FILES.values()) - {"corrupt.txt"}


def run(folder, *options):
    assert main([*TINY, "--output", str(folder), *options]) == 0
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a tiny run under surgery."""
    folder = tmp_path_factory.mktemp("run") / "results"
    run(folder)
    return folder


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def numbers(value):
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from numbers(inner)
    else:
        yield value


def test_all_files_are_there_and_no_other(finished):
    assert {path.name for path in finished.iterdir()} == OUTPUT_FILES


def test_metrics_have_the_promised_keys_and_finite_numbers(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    assert {"f1", "auroc", "balanced_accuracy", "n_bags"} <= metrics["bag"].keys()
    promised = {"average_precision", "chance", "precision_at_positives", "recall_at_k", "top_k"}
    assert promised <= metrics["cell"].keys()
    assert {"k", "positives", "chance"} <= metrics["cell"]["top_k"].keys()
    assert all(isinstance(value, int | float) for value in numbers(metrics))
    assert all(math.isfinite(value) for value in numbers(metrics))
    assert metrics["cell"]["chance"] == pytest.approx(0.1)
    assert metrics["pretraining"]["epochs"] == 2
    assert 0 <= metrics["pretraining"]["conflict_rate"] <= 1
    assert -1 <= metrics["pretraining"]["mean_cosine"] <= 1
    assert metrics["bag"]["n_bags"] == metrics["splits"]["test"]["bags"] == 4


def test_metrics_can_be_recomputed_from_the_rows(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    bags, cells = rows(finished / "test_bags.csv"), rows(finished / "test_cells.csv")
    labels = [bag["positive"] == "1" for bag in bags]
    recomputed = bag_metrics(labels, [float(bag["probability"]) for bag in bags])
    assert recomputed.items() <= metrics["bag"].items()
    precision = []
    for bag in bags:
        mine = [cell for cell in cells if cell["bag"] == bag["bag"]]
        assert [int(cell["rank"]) for cell in mine] == list(range(1, 21))
        if bag["positive"] == "1":
            scores = [float(cell["score"]) for cell in mine]
            abnormal = [cell["abnormal"] == "1" for cell in mine]
            precision.append(cell_metrics(scores, abnormal, 5).average_precision)
    assert np.mean(precision) == pytest.approx(metrics["cell"]["average_precision"], abs=1e-12)


def test_config_says_what_it_takes_to_run_again(finished):
    content = json.loads((finished / "config.json").read_text())
    assert content["config"]["seed"] == 3
    assert content["config"]["surgery"] == "ags"
    assert content["versions"]["torch"] == torch.__version__
    assert {"python", "gradsurgery", "numpy", "scikit-learn"} <= content["versions"].keys()


def test_embeddings_load_without_pickle(finished):
    with np.load(finished / "embeddings.npz", allow_pickle=False) as content:
        embeddings, images = content["embeddings"], content["images"]
    assert embeddings.shape == (12 * 20, 128)
    assert embeddings.dtype == np.float32
    assert np.isfinite(embeddings).all()
    assert len(set(images.tolist())) == 12 * 20


def test_report_is_one_self_contained_file(finished):
    html = (finished / "report.html").read_text()
    for reference in ('src="http', 'href="http', "url(http", "<link", "<script"):
        assert reference not in html


def test_the_same_settings_give_the_same_metrics(finished, tmp_path):
    run(tmp_path)
    for name in ("metrics.json", "bags.json", "test_cells.csv", "pretraining.csv"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.parametrize(
    ("method", "losses"),
    [
        ("weaksupcon", ["nt_xent", "similarity"]),
        ("simclr", ["nt_xent"]),
        ("ws-sil", ["cross_entropy"]),
        ("supervised", ["cross_entropy"]),
        ("one-class", ["distance"]),
        ("random", []),
    ],
)
def test_methods_meet_the_same_bags(method, losses, finished, tmp_path):
    metrics = run(tmp_path, "--method", method)
    expected = OUTPUT_FILES - (set() if losses else {"checkpoint-best.pt"})
    assert {path.name for path in tmp_path.iterdir()} == expected
    assert (tmp_path / "bags.json").read_bytes() == (finished / "bags.json").read_bytes()
    reference = json.loads((finished / "metrics.json").read_text())
    for part in ("bag", "cell", "mil", "splits"):
        assert metrics[part].keys() == reference[part].keys()
    assert all(math.isfinite(value) for value in numbers(metrics))
    conflict = ["conflict_rate", "mean_cosine"] if len(losses) == 2 else []
    collapse = ["effective_rank", "feature_std"]
    validation = ["validation_loss"] if losses else []
    assert list(metrics["pretraining"]) == ["epochs", *collapse, *conflict, *losses, *validation]
    epochs = rows(tmp_path / "pretraining.csv")
    assert metrics["pretraining"]["epochs"] == len(epochs) == (2 if losses else 0)
    assert all(float(epochs[-1][name]) == metrics["pretraining"][name] for name in losses)
    assert all(("cosine" in epoch) == bool(conflict) for epoch in epochs)
    assert f"<h1>{method} on digits" in (tmp_path / "report.html").read_text()
    content = json.loads((tmp_path / "config.json").read_text())["config"]
    assert (content["method"], content["surgery"]) == (method, None)


def test_another_surgery_gives_other_numbers(finished, tmp_path):
    run(tmp_path, "--surgery", "sum")
    weights = [float(row["weight_nt_xent"]) for row in rows(tmp_path / "pretraining.csv")]
    assert weights == [1.0, 1.0]
    embeddings = [(folder / "embeddings.npz").read_bytes() for folder in (tmp_path, finished)]
    assert embeddings[0] != embeddings[1]


def test_the_run_leaves_the_global_random_streams_alone(tmp_path):
    torch.manual_seed(0)
    np_state = np.random.get_state()[1].copy()  # noqa: NPY002
    before = torch.rand(1)
    torch.manual_seed(0)
    run(tmp_path)
    assert torch.equal(torch.rand(1), before)
    assert (np.random.get_state()[1] == np_state).all()  # noqa: NPY002


def test_a_finished_run_is_replaced_on_request_alone(finished, tmp_path, capsys):
    first = run(tmp_path)
    before = (tmp_path / "metrics.json").stat().st_mtime_ns
    assert main([*TINY, "--output", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "--overwrite" in captured.err
    assert "--resume" in captured.err
    assert (tmp_path / "metrics.json").stat().st_mtime_ns == before
    assert run(tmp_path, "--overwrite") == first


def test_the_terminal_gets_a_table_and_a_pipe_gets_no_progress_bar(tmp_path, capsys):
    run(tmp_path)
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "patches/s" in captured.out
    assert "cell average precision" in captured.out
    assert str(tmp_path / "report.html") in captured.out.replace("\n", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--witness-rate", "0"], "--witness-rate must be in (0, 1], got 0"),
        (["--witness-rate", "nan"], "--witness-rate must be in (0, 1], got nan"),
        (["--witness-rate", "0.01"], "raise --bag-size to 100"),
        (["--witness-rate", "x"], "argument --witness-rate: invalid float value: 'x'"),
        (["--bag-size", "900", "--bags", "6"], "needed 5130 normal and 270 abnormal, available"),
        (["--bag-size", "0"], "--bag-size must be at least 1"),
        (["--bags", "7"], "--bags must be even and at least 6"),
        (["--abnormal", "x"], "--abnormal must be one of 0, 1, 2"),
        (["--surgery", "agz"], "'agz'"),
        (["--method", "supervized"], "'supervized'"),
        (["--method", "weaksupcon", "--surgery", "sum"], "leave --surgery sum out"),
        (["--method", "simclr", "--surgery", "ags"], "belongs to --method slam-ags"),
        (["--method", "ws-sil", "--surgery", "ags"], "out for --method ws-sil"),
        (["--method", "supervised", "--surgery", "ags"], "out for --method supervised"),
        (["--method", "one-class", "--surgery", "pcgrad"], "leave --surgery pcgrad out"),
        (["--method", "random", "--surgery", "ags"], "out for --method random"),
        (["--data", "cifar"], "a folder that is there, got 'cifar'"),
        (["--data", "digit"], "did you mean digits?"),
        (["--mil", "abmill"], "'abmill'"),
        (["--mil-init", "nowhere"], "--mil-init nowhere has no mil.pt"),
        (["--image-px", "9"], "8"),
        (["--micro-batches", "100"], "--batch-size must be at least 4 for each"),
        (["--warm-up", "1"], "--warm-up must be in [0, 1)"),
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--batch-size", "3"], "--batch-size must be at least 4"),
        (["--lr", "inf"], "--lr must be positive and finite"),
        (["--lr", "-1"], "--lr must be positive and finite"),
        (["--temperature", "0"], "--temperature must be positive"),
        (["--weight-decay", "-1"], "--weight-decay must be finite and not negative"),
        (["--top-k", "0"], "--top-k must be at least 1"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--device", "nowhere"], "--device nowhere cannot be used here"),
        (["--sede", "1"], "unrecognized arguments: --sede 1"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(options, message, tmp_path, capsys):
    assert main([*TINY, "--output", str(tmp_path / "new"), *options]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("slam-ags: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not (tmp_path / "new").exists()


def test_an_output_that_cannot_be_a_folder_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([*TINY, "--output", str(tmp_path / "file")]) == 2
    assert "is a file: name a folder" in capsys.readouterr().err
    assert main([*TINY, "--output", str(tmp_path / "file" / "below")]) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["runn"], ["study", "--seeds"]])
def test_an_incomplete_command_is_one_line_and_exit_code_2(arguments, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "--help" in captured.err


def test_stages_alone_come_to_what_a_run_comes_to(finished, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["bags", *DIGITS, "--output", str(first)]) == 0
    assert main(["pretrain", "--epochs", "2", "--output", str(first)]) == 0
    assert main(["embed", "--from", str(first), "--output", str(second)]) == 0
    assert main(["mil", "--mil-epochs", "3", "--output", str(second)]) == 0
    for stage in ("evaluate", "report"):
        assert main([stage, "--output", str(second)]) == 0
    assert not (first / "embeddings.npz").exists()
    assert (second / "report.html").exists()  # not the same bytes: it names the time of each stage
    for name in ("bags.json", "pretraining.csv", "metrics.json"):
        assert (second / name).read_bytes() == (finished / name).read_bytes()


def test_a_stage_without_those_before_it_is_refused(tmp_path, capsys):
    assert main(["mil", "--output", str(tmp_path / "new")]) == 2
    assert "lacks bags.json: run `slam-ags bags` first" in capsys.readouterr().err
    assert main(["bags", *DIGITS, "--output", str(tmp_path)]) == 0
    assert main(["mil", "--from", str(tmp_path), "--output", str(tmp_path / "mil")]) == 2
    assert "lacks pretraining.csv: run `slam-ags pretrain` there" in capsys.readouterr().err


def test_files_from_another_run_do_not_replace_a_run(finished, tmp_path, capsys):
    run(tmp_path, "--seed", "4")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for source, output in [(finished, tmp_path), (tmp_path, tmp_path)]:
        capsys.readouterr()
        assert main(["mil", "--from", str(source), "--output", str(output)]) == 2
        assert "name another --output" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    options = ["--mil-epochs", "2", "--overwrite", "--output", str(tmp_path)]
    assert main(["mil", "--from", str(finished), *options]) == 0
    assert (tmp_path / "bags.json").read_bytes() == (finished / "bags.json").read_bytes()
    assert not (tmp_path / "metrics.json").exists()


def test_settings_of_earlier_stages_stay(finished, capsys):
    before = (finished / "config.json").read_bytes()
    assert main(["run", "--resume", "--seed", "4", "--output", str(finished)]) == 2
    assert "was made with --seed 3, not 4" in capsys.readouterr().err
    assert (finished / "config.json").read_bytes() == before


def test_a_config_file_and_options_on_top(finished, tmp_path):
    path, folder = tmp_path / "settings.json", tmp_path / "run"
    path.write_text(json.dumps({"data": "digits", "n_bags": 12, "epochs": 2, "mil_epochs": 9}))
    assert (
        main(["run", "--config", str(path), *TINY[-2:], "--seed", "3", "--output", str(folder)])
        == 0
    )
    assert (folder / "metrics.json").read_bytes() == (finished / "metrics.json").read_bytes()
    assert (
        main(["run", "--config", str(folder / "config.json"), "--output", str(tmp_path / "b")]) == 0
    )
    assert (tmp_path / "b" / "metrics.json").read_bytes() == (folder / "metrics.json").read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must hold one JSON object"),
        ('{"epoch": 3}', "did you mean epochs?"),
        ('{"batch_size": "9"}', 'setting batch_size must be int, got "9"'),
        ('{"workers": true}', "setting workers must be int, got true"),
    ],
)
def test_a_wrong_config_file_is_one_line(content, message, tmp_path, capsys):
    (tmp_path / "settings.json").write_text(content)
    folder = tmp_path / "run"
    file = str(tmp_path / "settings.json")
    assert main([*TINY, "--config", file, "--output", str(folder)]) == 2
    assert not folder.exists()
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_curriculum_starts_from_another_runs_aggregator(finished, tmp_path):
    options = ["--mil-init", str(finished), "--mil-epochs", "1"]
    assert main(["mil", "--from", str(finished), "--output", str(tmp_path), *options]) == 0
    started, new = (rows(folder / "mil.csv")[0] for folder in (tmp_path, finished))
    assert started["validation_loss"] != new["validation_loss"]
    assert json.loads((tmp_path / "config.json").read_text())["config"]["mil_init"] == str(finished)


def test_the_default_folder_says_what_is_in_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bags", *DIGITS]) == 0
    assert (tmp_path / "runs/digits-wr0.1-slam-ags-seed3/bags.json").exists()


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in SUMMARIES)])
def test_help_is_no_error(arguments, capsys):
    assert main(arguments) == 0
    assert "slam-ags" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_is_one_line_and_exit_code_1(tmp_path, capsys):
    assert main([*TINY, "--output", str(tmp_path), "--lr", "1e30"]) == 1
    assert "lower --lr" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "metrics.json").exists()


def test_the_version_is_the_librarys(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"gradsurgery {gradsurgery.__version__}"
