"""The gate: on the same bags, pretraining under surgery beats an untrained encoder."""

import numpy as np
import pytest

from slam_ags_example.config import RunConfig
from slam_ags_example.run import run

SEEDS = (0, 1, 2)

# Measured over seeds 0 to 9: F1 0.93 (standard deviation 0.07 over seeds), average precision 0.93
# (0.06), and paired margins over the random encoder of 0.12 (0.09) and 0.21 (0.11). A mean over
# three seeds has 0.58 of those deviations. Each bound is about two of them below its mean; seeds 0
# to 2 measured 0.99, 0.94, 0.15 and 0.22, so that what is left is for other machines' rounding.
LEAST_F1 = 0.85
LEAST_AVERAGE_PRECISION = 0.85
LEAST_F1_MARGIN = 0.03
LEAST_AVERAGE_PRECISION_MARGIN = 0.10


@pytest.mark.slow
def test_slam_ags_beats_a_random_encoder_on_the_same_bags(tmp_path):
    scores = {"slam-ags": [], "random": []}
    for method, rows in scores.items():
        for seed in SEEDS:
            folder = tmp_path / f"{method}-{seed}"
            metrics = run(RunConfig(method=method, seed=seed), folder)
            rows.append((metrics["bag"]["f1"], metrics["cell"]["average_precision"]))
            assert metrics["pretraining"]["effective_rank"] > 10  # 50 and more, unless collapsed
    for seed in SEEDS:
        bags = [(tmp_path / f"{method}-{seed}" / "bags.json").read_bytes() for method in scores]
        assert bags[0] == bags[1]
    f1, average_precision = np.mean(scores["slam-ags"], axis=0)
    f1_margin, average_precision_margin = np.mean(
        np.subtract(scores["slam-ags"], scores["random"]), axis=0
    )
    summary = f"(F1, AP) by seed: {scores}"
    assert f1 >= LEAST_F1, summary
    assert average_precision >= LEAST_AVERAGE_PRECISION, summary
    assert f1_margin >= LEAST_F1_MARGIN, summary
    assert average_precision_margin >= LEAST_AVERAGE_PRECISION_MARGIN, summary
