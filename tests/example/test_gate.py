"""The gate: on the same bags, pretraining under surgery beats an untrained encoder."""

import numpy as np
import pytest

from slam_ags_example.config import settle
from slam_ags_example.run import run


def scores(folder, settings, method, seeds):
    """(F1, average precision) by seed; a collapsed encoder fails."""
    rows = []
    for seed in seeds:
        config = settle({}, {**settings, "method": method, "seed": seed})
        metrics = run(config, folder / f"{method}-{seed}", cache=folder / "cache")
        rows.append((metrics["bag"]["f1"], metrics["cell"]["average_precision"]))
        assert metrics["pretraining"]["effective_rank"] > 10  # 50 and more, unless collapsed
    return np.array(rows)


# Digits, seeds 0 to 2: mean F1 0.87 and average precision 0.93, 0.09 and 0.11 above the untrained
# encoder. Smears, seeds 0 and 1: average precision 0.74, 0.15 above it. Over seeds the differences
# scatter by 0.01 to 0.1, and other machines round otherwise: the bounds leave about half.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "seeds", "least_precision", "least_f1_margin", "least_precision_margin"),
    [({"data": "digits"}, (0, 1, 2), 0.85, 0.02, 0.05), ({}, (0, 1), 0.65, 0.0, 0.05)],
    ids=["digits", "smears"],
)
def test_slam_ags_beats_an_untrained_encoder_on_the_same_bags(
    settings, seeds, least_precision, least_f1_margin, least_precision_margin, tmp_path
):
    trained, untrained = (
        scores(tmp_path, settings, method, seeds) for method in ("slam-ags", "random")
    )
    for seed in seeds:
        bags = [tmp_path / f"{method}-{seed}" / "bags.json" for method in ("slam-ags", "random")]
        assert bags[0].read_bytes() == bags[1].read_bytes()
    f1_margin, precision_margin = (trained - untrained).mean(axis=0)
    summary = f"(F1, AP) by seed: {trained.tolist()} trained, {untrained.tolist()} untrained"
    print(summary)
    assert trained[:, 1].mean() >= least_precision, summary
    assert f1_margin >= least_f1_margin, summary
    assert precision_margin >= least_precision_margin, summary
