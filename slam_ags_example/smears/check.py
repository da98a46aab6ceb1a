"""Is the generator what it claims: colour statistics, shortcuts, and what an encoder can learn."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional

from slam_ags_example.config import generator
from slam_ags_example.encoder import own_stream
from slam_ags_example.smears.generator import SMEAR_CLASSES, DrawnCells, draw_cells

__all__ = [
    "TARGET_MEAN",
    "TARGET_STD",
    "Separability",
    "channel_statistics",
    "contact_sheet",
    "draw_mixed",
    "encoder_separability",
    "shortcut_separability",
]

# Red, green and blue over the pixels of Bone Marrow Cytomorphology (DOI 10.7937/TCIA.AXH3-T579).
TARGET_MEAN = (0.6009, 0.5513, 0.7394)
TARGET_STD = (0.1982, 0.2448, 0.1076)

_ENCODER_POOL = 3  # 250 px become 83, of 0.36 µm: enough for nucleoli, and a ninth of the work


@dataclass(frozen=True)
class Separability:
    """How well blasts are told from lymphocytes that were not trained on; 0.5 is chance."""

    balanced_accuracy: float
    auroc: float


def draw_mixed(n: int, *, seed: int, size_px: int = 250, pixel_um: float = 0.12) -> DrawnCells:
    """``n`` cells with the classes in turn."""
    classes = [SMEAR_CLASSES[row % len(SMEAR_CLASSES)] for row in range(n)]
    return draw_cells(classes, seed=seed, size_px=size_px, pixel_um=pixel_um)


def channel_statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over all pixels of [N, 3, H, W] uint8, in 0 to 1.

    From counts of the 256 levels: exact, and no float copy of the images.
    """
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in range(images.shape[1]):
        counts = torch.bincount(images[:, channel].reshape(-1).int(), minlength=256).double()
        share = counts / counts.sum()
        mean = (share * levels).sum()
        means.append(float(mean))
        stds.append(float((share * (levels - mean).square()).sum().sqrt()))
    return means, stds


def shortcut_separability(train: DrawnCells, test: DrawnCells) -> Separability:
    """A logistic regression on the cell's area and the patch's mean red, green and blue."""
    model = make_pipeline(StandardScaler(), LogisticRegression())
    model.fit(_shortcuts(train), _is_blast(train))
    return _score(model.predict_proba(_shortcuts(test))[:, 1], _is_blast(test))


def encoder_separability(
    train: DrawnCells, test: DrawnCells, *, epochs: int = 30, seed: int = 0
) -> Separability:
    """A small convolutional network, fully supervised, on turned and mirrored patches."""
    random = generator(seed, "smear check")
    model = _network(random)
    images, target = _pooled(train.images), torch.from_numpy(_is_blast(train)).float()
    batch = 50
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=random)
        for rows in torch.split(order[: len(order) // batch * batch], batch):
            turns = int(torch.randint(4, (), generator=random))
            views = images[rows].rot90(turns, (2, 3))
            if torch.rand((), generator=random) < 0.5:
                views = views.flip(3)
            gain = 1 + 0.1 * torch.randn(len(rows), 3, 1, 1, generator=random)
            loss = functional.binary_cross_entropy_with_logits(
                model(views * gain).squeeze(1), target[rows]
            )
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        logits = torch.cat(
            [model(part).squeeze(1) for part in torch.split(_pooled(test.images), 100)]
        )
    return _score(logits.sigmoid().numpy(), _is_blast(test))


def contact_sheet(
    *, seed: int = 0, columns: int = 6, rows: int = 2, tile_px: int = 170
) -> Image.Image:
    """The first patches of each class, a labelled block of rows for each, in 256 colours."""
    margin, gap = 34, 3
    n = columns * rows
    height = (tile_px + gap) * rows * len(SMEAR_CLASSES) - gap
    sheet = Image.new("RGB", (margin + (tile_px + gap) * columns - gap, height), "white")
    pen = ImageDraw.Draw(sheet)
    for block, name in enumerate(SMEAR_CLASSES):
        images = draw_cells([name] * n, seed=seed).images.permute(0, 2, 3, 1).numpy()
        top = block * rows * (tile_px + gap)
        pen.text((4, top + 4), name, fill="black")
        for place, image in enumerate(images):
            tile = Image.fromarray(image).resize((tile_px, tile_px), Image.Resampling.LANCZOS)
            row, column = divmod(place, columns)
            sheet.paste(tile, (margin + column * (tile_px + gap), top + row * (tile_px + gap)))
    return sheet.quantize(256)


def _is_blast(cells: DrawnCells) -> npt.NDArray[np.bool_]:
    return np.array([name == "BLA" for name in cells.classes])


def _shortcuts(cells: DrawnCells) -> npt.NDArray[np.float32]:
    colour = torch.stack([image.float().mean(dim=(1, 2)) for image in cells.images])
    return torch.cat([cells.area_px[:, None], colour], dim=1).numpy()


def _score(
    probability: npt.NDArray[np.float64],
    truth: npt.NDArray[np.bool_],
) -> Separability:
    return Separability(
        balanced_accuracy=float(balanced_accuracy_score(truth, probability > 0.5)),
        auroc=float(roc_auc_score(truth, probability)),
    )


def _pooled(images: Tensor) -> Tensor:
    parts = [functional.avg_pool2d(part.float(), _ENCODER_POOL) for part in torch.split(images, 50)]
    return torch.cat(parts) / 127.5 - 1


def _network(random: torch.Generator) -> nn.Module:
    widths = (3, 24, 32, 48, 64)
    model = nn.Sequential()
    with own_stream(model, random):
        for inner, outer in pairwise(widths):
            model.append(nn.Conv2d(inner, outer, 3, stride=2 if inner == 3 else 1, bias=False))
            model.append(nn.BatchNorm2d(outer))
            model.append(nn.ReLU())
            model.append(nn.MaxPool2d(2) if outer < widths[-1] else nn.AdaptiveAvgPool2d(1))
        model.append(nn.Flatten())
        model.append(nn.Linear(widths[-1], 1))
    return model
