"""The report's first paragraphs: what was trained, how, and on what, in words."""

from collections import Counter
from pathlib import Path
from typing import Any

from slam_ags_example.bags import Manifest

__all__ = ["class_words", "data_words", "score_words", "setting_words", "title_words"]

_WEAK = "without the label of any single cell"
_METHODS = {  # how the encoder was trained, as the second sentence goes on
    "slam-ags": f"{_WEAK}, by two tasks at once: cells of positive bags are told apart one from "
    "another (NT-Xent), cells of negative bags, which are all normal, are drawn together "
    "(similarity loss). The gradients of the two were combined by the surgery “{surgery}”.",
    "weaksupcon": f"{_WEAK}, by two tasks at once: cells of positive bags are told apart one from "
    "another (NT-Xent), cells of negative bags, which are all normal, are drawn together "
    "(similarity loss). The two losses were added up without surgery (baseline WeakSupCon).",
    "simclr": f"{_WEAK}, by telling all cells apart one from another (NT-Xent, baseline SimCLR).",
    "ws-sil": f"{_WEAK}, by cross entropy with every cell under the label of its bag (baseline "
    "WS-SIL).",
    "supervised": "by cross entropy under the true label of every training cell. This is an upper "
    "bound: no weakly supervised method knows these labels.",
    "one-class": f"{_WEAK}, on cells of negative bags alone, which were drawn to one centre (Deep "
    "SVDD, one-class baseline).",
}
_ENCODERS = {"small": "small convolutional", "resnet18": "ResNet-18"}
_AGGREGATORS = {
    "pamil": "prototype attention (PAMIL)",
    "abmil": "gated attention (ABMIL)",
    "mean": "mean pooling",
    "max": "max pooling",
}
_DRAWN = (
    "The cells are drawings. This program draws them after published descriptions of marrow "
    "cells; no microscope was involved. The numbers compare methods under known conditions and "
    "say nothing about patients."
)
_DIGITS = (
    "The “cells” are handwritten digits of 8 × 8 pixels that come with scikit-learn, a small real "
    "data set that stands in for cells. The numbers say nothing about patients."
)


def title_words(config: dict[str, Any]) -> str:
    """One line: the method, the images, and what is looked for."""
    abnormal = str(config["abnormal"])
    if abnormal == "rest":
        target = f"everything but {config['normal']}"
    else:
        target = f"{'classes' if ',' in abnormal else 'class'} {abnormal.replace(',', ', ')}"
    return f"{config['method']} on {_data_name(config)}: finding {target} from bag labels"


def setting_words(config: dict[str, Any], chosen_epoch: int) -> str:
    """How encoder and aggregator were trained."""
    encoder = f"{_ENCODERS.get(config['encoder'], config['encoder'])} encoder"
    if config["method"] == "random":
        first = f"The {encoder} was not trained: its random weights are the baseline here."
    else:
        how = _METHODS.get(config["method"], "by the method “{method}”.").format(**config)
        epochs = f"{config['epochs']} {'epoch' if config['epochs'] == 1 else 'epochs'}"
        first = f"The {encoder} was pretrained for {epochs} {how}"
    head = " (the output of its projection head)" if config.get("embedding") == "head" else ""
    name = config["mil"]
    return (
        f"{first} An aggregator with {_AGGREGATORS.get(name, name)} then learnt on its embeddings"
        f"{head} to tell positive from negative bags; of its "
        f"{config['mil_epochs']} epochs the one that did best on validation bags was kept, number "
        f"{chosen_epoch}. Everything below is about test bags, which no stage of training saw."
    )


def data_words(config: dict[str, Any], manifest: Manifest) -> str:
    """What the bags hold, and what the images are."""
    n_abnormal = max(sum(cell.abnormal for cell in bag.instances) for bag in manifest.bags)
    bags = (
        f"{len(manifest.bags)} bags (slides) of {manifest.bag_size} cells each, half of them "
        f"positive. A positive bag holds {n_abnormal} abnormal "
        f"{'cell' if n_abnormal == 1 else 'cells'}, a witness rate of "
        f"{100 * manifest.witness_rate:g}%; a negative bag holds none. No image is in two bags."
    )
    if config["data"] == "synthetic":
        return f"{bags} {_DRAWN}"
    if config["data"] == "digits":
        return f"{bags} {_DIGITS}"
    return f"{bags} The images are those of the folder {_data_name(config)}."


def class_words(manifest: Manifest) -> str:
    """The classes of all bags with their counts, the largest first, and what was left out."""
    counts = Counter(
        (cell.abnormal, cell.cell_class) for bag in manifest.bags for cell in bag.instances
    )
    parts = []
    for abnormal, name in ((False, "normal"), (True, "abnormal")):
        ordered = sorted((-n, cell) for (kind, cell), n in counts.items() if kind == abnormal)
        parts.append(f"{name}: " + ", ".join(f"{cell} ({-n})" for n, cell in ordered))
    words = "Classes in all bags, with the number of cells; " + "; ".join(parts) + "."
    if manifest.excluded:
        words += f" Images left out because they cannot be read: {manifest.excluded}."
    return words


def score_words(config: dict[str, Any]) -> str:
    """By what the cells of a bag are ranked."""
    if config["mil"] in ("mean", "max"):
        return "the aggregator's own score for the cell (a logit)"
    return "attention, the cell's share in the decision about the bag"


def _data_name(config: dict[str, Any]) -> str:
    """What ``--data`` says, without the folders above the images."""
    return Path(config["data"]).name or str(config["data"])
