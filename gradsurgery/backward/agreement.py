"""What the ranks of a process group have in common before the first backward of a call."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import or_

from torch import Tensor
from torch.optim import Optimizer

from gradsurgery.backward.checks import check_inputs, check_parameters, check_replicated
from gradsurgery.backward.features import SharedFeatures
from gradsurgery.backward.graph import GraphSurvey, survey
from gradsurgery.backward.losses import read_losses
from gradsurgery.backward.tasks import MicroBatches, Request, Settings, Tasks, leave_out
from gradsurgery.distributed.group import Group, fingerprint
from gradsurgery.distributed.wrappers import refuse_flat_parameters
from gradsurgery.gradients.layout import name_of
from gradsurgery.gradients.scattered import ScatteredRows
from gradsurgery.weights.solver import Solver

__all__ = ["Agreement"]


class Agreement:
    """Reads a request on every rank, and refuses on all what does not fit together.

    Args:
        group: the ranks.
        optimizer: the wrapped optimizer.
        solver: of the plugin.
    """

    def __init__(self, group: Group, optimizer: Optimizer, solver: Solver) -> None:
        self._group, self._optimizer, self._solver = group, optimizer, solver
        # The parameters that all ranks were found to share: their ids here, and a checksum.
        self._known: tuple[tuple[int, ...], str] = ((), "")

    def read(
        self,
        request: Request,
        parameters: list[Tensor],
        waiting: MicroBatches | None,
        held: Sequence[Tensor],
        settings: Settings,
    ) -> Tasks:
        """The tasks as all ranks see them together.

        Args:
            request: this rank's.
            parameters: those that require grad.
            waiting: the micro-batches that wait.
            held: the parameters whose rows hold micro-batches.
            settings: (names, accumulate) -> what must be the same on all ranks.
        """
        if not self._group.in_step:
            raise RuntimeError(
                "a collective of this process group failed earlier, so the ranks are out of step: "
                "start again from a checkpoint"
            )
        ids = tuple(map(id, parameters))
        is_new = ids != self._known[0]
        failure: Exception | None = None
        graph = GraphSurvey(retain=[])
        known = self._solver.tasks
        tasks = Tasks(known, (), [], graph, dict.fromkeys(ids, 0), 0, request)
        try:
            refuse_flat_parameters(parameters)
            self._read_here(tasks, parameters, waiting, held)
        except Exception as error:
            failure = error
        if is_new:
            described = "; ".join(self._describe(parameters))
            self._known = ids, fingerprint(described.encode())
        asked = settings(tasks.names, request.accumulate) | {
            "parameters": self._known[1],
            "features": request.features is not None,
        }
        self._compare(tasks, parameters, failure, asked, is_new=is_new)
        return tasks

    def _read_here(
        self,
        tasks: Tasks,
        parameters: list[Tensor],
        waiting: MicroBatches | None,
        held: Sequence[Tensor],
    ) -> None:
        """Fill in what this rank was asked for."""
        request = tasks.request
        devices = {p.device for p in parameters}
        if request.inputs is not None:
            check_inputs(request.inputs)
        names = waiting.names if waiting else ()
        given = read_losses(request.losses, devices, tasks.known, waiting=names, keep_absent=True)
        tasks.known, tasks.names, tasks.losses = given.tasks, given.names, given.losses
        if waiting:
            waiting.check(given.names)
        self._solver.check(given.tasks, given.names, parameters, held)
        tasks.graph = survey(tasks.losses)
        leave_out(tasks)
        check_parameters(self._optimizer, parameters, tasks.graph)
        check_replicated(self._optimizer, parameters, tasks.graph)
        tasks.reach = {id(p): tasks.graph.tasks_of(p) for p in parameters}
        if request.features is not None and len(tasks.names) > 1:
            tasks.features = SharedFeatures(request.features, tasks.losses)

    def _compare(
        self,
        tasks: Tasks,
        parameters: list[Tensor],
        failure: Exception | None,
        asked: dict[str, object],
        *,
        is_new: bool,
    ) -> None:
        known = self._known
        error_text = f"{type(failure).__name__}: {failure}" if failure else None
        # Nodes written in Python show what they reach, unless they run a backward of their own, and
        # that is refused. They are common here: gathering samples, synchronised batch norm.
        hidden = 0 if tasks.graph.complete else tasks.graph.opaque
        reach = tuple(tasks.reach.values())
        said = self._group.exchange((error_text, asked, reach, hidden, is_new))
        if failure is not None:
            raise failure
        failed = any(each[0] for each in said)
        if not failed and len({each[1]["parameters"] for each in said}) > 1:
            self._refuse_parameters(parameters)
        self._group.compare([each[:2] for each in said])
        if any(each[4] for each in said):
            # They are not known before this has succeeded.
            self._known = (), ""
            names = [name_of(p, self._optimizer) for p in parameters]
            self._group.check_values(parameters, names)
            self._known = known
        together = [reduce(or_, masks) for masks in zip(*(each[2] for each in said), strict=True)]
        tasks.reach = dict(zip(tasks.reach, together, strict=True))
        tasks.opaque = reduce(or_, (each[3] for each in said))

    def together(
        self,
        failure: BaseException | None,
        reached: Sequence[int],
        moving: Sequence[ScatteredRows] = (),
    ) -> list[int]:
        """What the ranks have reached together; raises on all what went wrong on one.

        Args:
            failure: what went wrong here.
            reached: sets of tasks, as many on every rank.
            moving: rows on their way, which arrive before anything is raised.
        """
        text = f"{type(failure).__name__}: {failure}" if failure else None
        said = self._group.exchange((text, {}, tuple(reached)))
        for rows in moving:
            rows.settle()
        if failure is not None:
            raise failure
        self._group.compare([each[:2] for each in said])
        return [reduce(or_, masks) for masks in zip(*(each[2] for each in said), strict=True)]

    def _describe(self, parameters: Sequence[Tensor]) -> list[str]:
        return [f"{name_of(p, self._optimizer)} of {p.dtype}" for p in parameters]

    def _refuse_parameters(self, parameters: Sequence[Tensor]) -> None:
        self._known = (), ""
        lists = self._group.exchange(self._describe(parameters))
        for rank, theirs in enumerate(lists):
            for mine, other in zip(lists[0], theirs, strict=False):
                if mine != other:
                    raise ValueError(
                        "parameters must be the same on all ranks, in the same order; rank 0 has "
                        f"{mine} where rank {rank} has {other}"
                    )
            if len(theirs) != len(lists[0]):
                raise ValueError(
                    f"parameters must be the same on all ranks; rank 0 has {len(lists[0])}, rank "
                    f"{rank} has {len(theirs)} that require grad"
                )
