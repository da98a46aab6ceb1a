"""``python -m slam_ags_example.smears``: print what the generator reaches, draw a contact sheet."""

import argparse
import time
from pathlib import Path

import torch

from slam_ags_example.smears.check import (
    TARGET_MEAN,
    TARGET_STD,
    channel_statistics,
    contact_sheet,
    draw_mixed,
    encoder_separability,
    shortcut_separability,
)


def main() -> None:
    """Draw cells, then print speed, colour statistics and separability."""
    parser = argparse.ArgumentParser(prog="python -m slam_ags_example.smears", description=__doc__)
    parser.add_argument("--cells", type=int, default=2400, help="how many to draw (default 2400)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=30, help="of the encoder; 0 leaves it out")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet here, as PNG")
    arguments = parser.parse_args()
    if arguments.cells < 100 or arguments.seed < 0 or arguments.epochs < 0:
        parser.error("--cells must be at least 100, --seed and --epochs not negative")
    if arguments.sheet is not None:
        contact_sheet(seed=arguments.seed).save(arguments.sheet, optimize=True)

    draw_mixed(8, seed=arguments.seed)  # fills the caches of matrices
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    train = draw_mixed(arguments.cells * 2 // 3, seed=arguments.seed)
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    test = draw_mixed(arguments.cells // 3, seed=arguments.seed + 1)
    n = len(train.classes)
    print(f"speed      {n / wall_s:.0f} patches/s, {1000 * cpu_s / n:.2f} ms of CPU time a patch")
    mean, std = channel_statistics(torch.cat([train.images, test.images]))
    for label, values, targets in [("mean", mean, TARGET_MEAN), ("std", std, TARGET_STD)]:
        pairs = zip(values, targets, strict=True)
        print(f"{label:10} " + ", ".join(f"{value:.4f} ({target})" for value, target in pairs))
    results = {"area, RGB": shortcut_separability(train, test)}
    if arguments.epochs:
        results["encoder"] = encoder_separability(
            train, test, epochs=arguments.epochs, seed=arguments.seed
        )
    for label, result in results.items():
        print(
            f"{label:10} balanced accuracy {result.balanced_accuracy:.3f}, AUROC "
            f"{result.auroc:.3f} on {len(test.classes)} held-out cells"
        )


if __name__ == "__main__":
    main()
