"""Aggregators alone, ours and the peers', on the same rows G: [T, D] -> [D]."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import torch
from torch import Tensor, nn

import gradsurgery
from benchmarks import published
from benchmarks.measure import Case, lazily
from benchmarks.projection import floor_of

__all__ = ["OURS", "aggregators", "import_peer", "package_of"]

OURS = "gradsurgery ags"

_PEERS = ("conflictfree", "pytorch_optimizer", "torchjd")


def import_peer(name: str) -> Any:
    """A peer's module. What it warns about when it is imported is not ours to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def package_of(case: str) -> str | None:
    """The peer's package, which is the first word of the case's name."""
    first = case.split()[0]
    return first if first in _PEERS else None


def aggregators(gradients: Tensor) -> dict[str, Case]:
    """The cases. A peer is imported at its first call."""

    def ours(method: str) -> Case:
        return lambda: gradsurgery.aggregate(gradients, method)

    def torchjd(name: str) -> Case:
        aggregator = getattr(import_peer("torchjd.aggregation"), name)()
        return lambda: aggregator(gradients)

    def conflictfree() -> Case:
        operator = import_peer("conflictfree.grad_operator").ConFIGOperator()
        return lambda: operator.calculate_gradient(gradients)

    return {
        "floor": floor_of(gradients),
        OURS: ours("ags"),
        "gradsurgery pcgrad": ours("pcgrad"),
        "torchjd PCGrad": lazily(lambda: torchjd("PCGrad")),
        "torchjd UPGrad": lazily(lambda: torchjd("UPGrad")),
        "conflictfree ConFIG": lazily(conflictfree),
        "pytorch_optimizer PCGrad": lazily(lambda: _pytorch_optimizer(gradients)),
        "published AGS loop": lambda: published.combine(list(gradients)),
    }


def _pytorch_optimizer(gradients: Tensor) -> Case:
    """`pc_backward`, as this peer's projection is tied to its optimizer.

    The model is one parameter of D elements, loss t is its dot product with row t: a backward
    pass multiplies the row by one and does no more. The losses are made once; the peer keeps
    their graphs.
    """
    parameter = nn.Parameter(torch.zeros_like(gradients[0]))
    base = torch.optim.SGD([parameter], lr=0.0)
    optimizer = import_peer("pytorch_optimizer").PCGrad(base, reduction="sum")
    losses = [torch.dot(parameter, row) for row in gradients]
    return lambda: optimizer.pc_backward(losses)
