"""The T×T step alone, M -> w: every method, beside TorchJD's weighting where it has one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.aggregators import import_peer
from benchmarks.measure import Case, alternate, lazily
from benchmarks.projection import task_gradients
from benchmarks.rows import Rows
from gradsurgery import methods

__all__ = ["run"]

_WIDTH = 4096


def _weighting(name: str, **arguments: Any) -> Callable[[Tensor], Case]:
    """A peer that takes the Gram matrix."""

    def make(gradients: Tensor) -> Case:
        rule = getattr(import_peer("torchjd.aggregation"), name)(**arguments)
        gram = gradients @ gradients.T
        return lambda: rule(gram)

    return make


def _aggregator(name: str, **arguments: Any) -> Callable[[Tensor], Case]:
    """A peer that takes the task gradients: as many columns as have the same Gram matrix."""

    def make(gradients: Tensor) -> Case:
        count = len(gradients)
        given = {"n_tasks": count} if name == "NashMTL" else {}
        rule = getattr(import_peer("torchjd.aggregation"), name)(**arguments, **given)
        narrow = torch.linalg.cholesky((gradients @ gradients.T).double()).float()
        return lambda: rule(narrow)

    return make


_PEERS: dict[str, Callable[[Tensor], Case]] = {
    "sum": _weighting("SumWeighting"),
    "mean": _weighting("MeanWeighting"),
    "random": _weighting("RandomWeighting"),
    "pcgrad": _weighting("PCGradWeighting"),
    "gradvac": _weighting("GradVacWeighting"),
    "mgda": _weighting("MGDAWeighting"),
    "cagrad": _weighting("CAGradWeighting", c=0.4),
    "imtl_g": _weighting("IMTLGWeighting"),
    "nash_mtl": _aggregator("NashMTL"),
    "fairgrad": _weighting("FairGradWeighting", alpha=2.0),
    "aligned_mtl": _weighting("AlignedMTLWeighting"),
    "upgrad": _weighting("UPGradWeighting"),
    "dualproj": _weighting("DualProjWeighting"),
    "config": _aggregator("ConFIG"),
}


def run(rows: Rows, *, tasks: Sequence[int], rounds: int, device: torch.device) -> None:
    """One row per method and T; half of the pairs of gradients conflict."""
    for count in tasks:
        gradients = task_gradients(count, _WIDTH, torch.float32, device)
        gram = gradients @ gradients.T
        losses = torch.rand(count, generator=torch.Generator().manual_seed(0)).to(device) + 0.5
        for name in methods.available():
            cases: dict[str, Case] = {"gradsurgery": _ours(name, gram, losses)}
            if name in _PEERS:
                cases["torchjd"] = lazily(partial(_PEERS[name], gradients))
            measured = alternate(cases, rounds, device, limit_s=20.0)
            own = measured.row("gradsurgery")
            fields: dict[str, Any] = {"case": own.pop("case"), **own}
            if name in _PEERS:
                peer = measured.row("torchjd")
                fields["torchjd_ms"] = peer.get("median_ms", peer.get("error"))
                fields["times_faster"] = measured.ratio("torchjd", "gradsurgery")
            rows.add(benchmark="solvers", method=name, T=count, **fields)


def _ours(name: str, gram: Tensor, losses: Tensor) -> Case:
    rule = methods.resolve(name)
    generator = torch.Generator().manual_seed(0)
    return lambda: rule.weights(gram, losses=losses, generator=generator)
