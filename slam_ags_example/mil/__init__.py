"""Multiple-instance learning: aggregators that classify bags and rank their instances."""

from slam_ags_example.mil.aggregators import Aggregation, Aggregator, Standardise
from slam_ags_example.mil.build import AGGREGATORS, build_aggregator, load_aggregator
from slam_ags_example.mil.train import (
    BagSet,
    MILRecord,
    TrainedMIL,
    predict,
    train_mil,
)

__all__ = [
    "AGGREGATORS",
    "Aggregation",
    "Aggregator",
    "BagSet",
    "MILRecord",
    "Standardise",
    "TrainedMIL",
    "build_aggregator",
    "load_aggregator",
    "predict",
    "train_mil",
]
