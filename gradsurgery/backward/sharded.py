"""Gradients of DTensor parameters: those of this process's parts, as `fully_shard` leaves them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from gradsurgery.backward.local import Local
from gradsurgery.backward.losses import Given
from gradsurgery.backward.tasks import MicroBatches, Request, Settings
from gradsurgery.distributed.agreement import agree_over_mesh
from gradsurgery.distributed.group import Group
from gradsurgery.options import Options
from gradsurgery.weights.solver import Solver

__all__ = ["Sharded"]


class Sharded(Local):
    """The same where parameters are DTensors: M of their parts is summed over their mesh."""

    hides_leaves = True

    def __init__(self, optimizer: Optimizer, solver: Solver, options: Options) -> None:
        super().__init__(optimizer, solver, options)
        self._groups: dict[Any, Group] = {}

    def _read_losses(
        self,
        request: Request,
        waiting: MicroBatches | None,
        parameters: list[Tensor],
        settings: Settings,
    ) -> Given:
        given: Given | None = None
        failure: Exception | None = None
        try:
            given = super()._read_losses(request, waiting, parameters, settings)
        except (TypeError, ValueError) as error:
            failure = error
        asked = settings(given.names if given else (), request.accumulate)
        agree_over_mesh(self._groups, parameters[0], failure, asked)
        assert given is not None
        return given

    def _refuse_features(self, parameters: list[Tensor]) -> None:
        raise ValueError("features cannot be combined with fully_shard")

    def _over_processes(self, values: Tensor) -> Tensor:
        for group in self._groups.values():
            group.sum(values)
            values /= group.size
        return values
