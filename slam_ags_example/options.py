"""What each setting is called on the command line, what it does, and which stage it belongs to."""

from dataclasses import dataclass

from gradsurgery import methods
from slam_ags_example.config import (
    AGGREGATORS,
    ENCODERS,
    METHODS,
    OPTIMIZERS,
    PRECISIONS,
    PRESETS,
)

__all__ = ["OPTIONS", "STAGES", "Option", "settings_of"]

STAGES = ("bags", "pretrain", "embed", "mil", "evaluate", "report")


@dataclass(frozen=True)
class Option:
    """One setting.

    Attributes:
        flag: on the command line.
        field: of :class:`~slam_ags_example.config.RunConfig`.
        stage: the first stage whose results it changes; ``"machine"`` for what changes none.
        kind: type of the value; bool for a flag without one.
        text: the help.
        choices: the values that are possible, where they are names.
        metavar: what stands for the value in the help.
    """

    flag: str
    field: str
    stage: str
    kind: type
    text: str
    choices: tuple[str, ...] | None = None
    metavar: str | None = None


OPTIONS = (
    Option(
        "--data",
        "data",
        "bags",
        str,
        "synthetic (drawn smears), digits, or a folder with a subfolder for each class",
        metavar="SOURCE",
    ),
    Option(
        "--normal",
        "normal",
        "bags",
        str,
        "normal classes, with commas between, or rest",
        metavar="CLASSES",
    ),
    Option(
        "--abnormal",
        "abnormal",
        "bags",
        str,
        "classes to find, with commas between, or rest",
        metavar="CLASSES",
    ),
    Option(
        "--skip-corrupt",
        "skip_corrupt",
        "bags",
        bool,
        "leave out images that cannot be read, and count them, instead of stopping",
    ),
    Option(
        "--witness-rate",
        "witness_rate",
        "bags",
        float,
        "share of abnormal patches in a positive bag, in (0, 1]",
        metavar="WR",
    ),
    Option("--bag-size", "bag_size", "bags", int, "patches per bag", metavar="N"),
    Option(
        "--bags",
        "n_bags",
        "bags",
        int,
        "number of bags, half of them positive; null: all that the images allow",
        metavar="N",
    ),
    Option(
        "--seed",
        "seed",
        "bags",
        int,
        "decides bags, weights, batches and views",
        metavar="N",
    ),
    Option(
        "--image-px",
        "image_px",
        "pretrain",
        int,
        "side to which images are decoded",
        metavar="PX",
    ),
    Option("--method", "method", "pretrain", str, "what trains the encoder; see below", METHODS),
    Option(
        "--surgery",
        "surgery",
        "pretrain",
        str,
        "how slam-ags combines its two task gradients (sum: no surgery); null: ags",
        tuple(methods.available()),
    ),
    Option("--encoder", "encoder", "pretrain", str, "small (for a CPU) or resnet18", ENCODERS),
    Option(
        "--epochs",
        "epochs",
        "pretrain",
        int,
        "passes over the training patches",
        metavar="N",
    ),
    Option(
        "--batch-size",
        "batch_size",
        "pretrain",
        int,
        "patches of both kinds of bag in a step",
        metavar="N",
    ),
    Option(
        "--micro-batches",
        "micro_batches",
        "pretrain",
        int,
        "cut a batch into N forward passes, for a small card; contrasts are then within each",
        metavar="N",
    ),
    Option("--optimizer", "optimizer", "pretrain", str, "what steps", OPTIMIZERS),
    Option("--lr", "learning_rate", "pretrain", float, "peak learning rate", metavar="X"),
    Option("--weight-decay", "weight_decay", "pretrain", float, "the optimizer's", metavar="X"),
    Option(
        "--warm-up",
        "warm_up",
        "pretrain",
        float,
        "share of the steps in which the learning rate rises, in [0, 1)",
        metavar="X",
    ),
    Option(
        "--crop",
        "crop",
        "pretrain",
        float,
        "side of a view over that of the patch, for all but digits",
        metavar="X",
    ),
    Option(
        "--temperature",
        "temperature",
        "pretrain",
        float,
        "of NT-Xent and similarity",
        metavar="X",
    ),
    Option(
        "--precision",
        "precision",
        "pretrain",
        str,
        "of the encoder's arithmetic; weights and losses are float32",
        PRECISIONS,
    ),
    Option(
        "--checkpoint",
        "checkpoint",
        "embed",
        str,
        "embed with the last encoder, or that of the best validation loss",
        ("last", "best"),
    ),
    Option(
        "--embedding",
        "embedding",
        "embed",
        str,
        "the encoder's output, or the projection head's, as the authors' script has it",
        ("encoder", "head"),
    ),
    Option("--mil", "mil", "mil", str, "aggregator", AGGREGATORS),
    Option(
        "--mil-init",
        "mil_init",
        "mil",
        str,
        "start from the aggregator of this run, made at a higher witness rate",
        metavar="DIR",
    ),
    Option("--mil-epochs", "mil_epochs", "mil", int, "passes over the bags", metavar="N"),
    Option(
        "--mil-lr",
        "mil_learning_rate",
        "mil",
        float,
        "learning rate; null: the aggregator's own",
        metavar="X",
    ),
    Option(
        "--mil-weight-decay",
        "mil_weight_decay",
        "mil",
        float,
        "weight decay; null: the aggregator's own",
        metavar="X",
    ),
    Option(
        "--top-k",
        "top_k",
        "evaluate",
        int,
        "K of the top-K measures; null: a quarter of the bag, 400 at most",
        metavar="K",
    ),
    Option("--device", "device", "machine", str, "auto, cpu, cuda, cuda:1", metavar="NAME"),
    Option(
        "--workers",
        "workers",
        "machine",
        int,
        "processes that decode images which memory cannot hold",
        metavar="N",
    ),
    Option(
        "--preset", "preset", "machine", str, "what the other settings start from", tuple(PRESETS)
    ),
)


def settings_of(stages: tuple[str, ...]) -> tuple[str, ...]:
    """The fields that the results of these stages depend on."""
    return tuple(option.field for option in OPTIONS if option.stage in stages)
