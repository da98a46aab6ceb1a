"""Gradients of DTensor parameters: those of this process's parts, as `fully_shard` leaves them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from gradsurgery.backward.checks import check_beside_shards
from gradsurgery.backward.graph import GraphSurvey
from gradsurgery.backward.local import Local
from gradsurgery.backward.losses import Given
from gradsurgery.backward.tasks import MicroBatches, Request, Settings
from gradsurgery.distributed.agreement import agree_over_mesh
from gradsurgery.distributed.group import Group
from gradsurgery.options import Options
from gradsurgery.weights.solver import Solver

__all__ = ["Sharded"]


class Sharded(Local):
    """The same where parameters are DTensors: M of their parts is summed over their mesh.

    Of `parallelize_module` (tensor parallelism) the graph shows the parameters themselves, and
    plain ones beside them are the same on every rank, so they count once. `fully_shard` puts the
    gathered parameters into the graph instead, so that it hides what a loss reaches.
    """

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
        sharded = next(p for p in parameters if hasattr(p, "device_mesh"))
        agree_over_mesh(self._groups, sharded, failure, asked)
        assert given is not None
        return given

    def _look(self, graph: GraphSurvey, parameters: list[Tensor]) -> None:
        sharded = [p for p in parameters if hasattr(p, "device_mesh")]
        self._alone = False
        self.hides_leaves = not any(id(p) in graph.leaves for p in sharded)
        if self.hides_leaves:
            check_beside_shards(self.optimizer, parameters)

    def _refuse_features(self, parameters: list[Tensor]) -> None:
        raise ValueError(
            "features cannot be combined with DTensor parameters (fully_shard, parallelize_module)"
        )

    def _over_processes(self, values: Tensor) -> Tensor:
        for group in self._groups.values():
            group.sum(values)
            values /= group.size
        return values
