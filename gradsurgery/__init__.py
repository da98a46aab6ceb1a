"""Multi-task gradient surgery as a PyTorch optimizer plugin."""

from gradsurgery import kernels, methods
from gradsurgery.aggregate import aggregate
from gradsurgery.diagnosis import Diagnosis, diagnose
from gradsurgery.optimizer import AdaptiveGradientSurgery
from gradsurgery.report import SurgeryReport

__all__ = [
    "AdaptiveGradientSurgery",
    "Diagnosis",
    "SurgeryReport",
    "__version__",
    "aggregate",
    "diagnose",
    "kernels",
    "methods",
]

__version__ = "0.1.0"
