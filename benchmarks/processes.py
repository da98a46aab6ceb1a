"""Many processes: bytes that a step moves, beside the formula, and what it costs."""

from __future__ import annotations

import datetime
import functools
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

import gradsurgery
from benchmarks.measure import Measured
from benchmarks.rows import Rows
from gradsurgery import AdaptiveGradientSurgery
from gradsurgery.distributed.group import Group

__all__ = ["bytes_of_surgery", "run"]

_LAYERS = 4


def run(
    rows: Rows,
    *,
    ranks: Sequence[int],
    tasks: Sequence[int],
    side: int,
    batch: int,
    wire_ms: float,
    rounds: int,
    device: torch.device,
) -> None:
    """Rows of "processes" and "processes/timeline" for each number of ranks and of tasks.

    Args:
        rows: where they go.
        ranks: numbers of processes, all on this machine.
        tasks: T, each with a graph of its own.
        side: the model has four layers of side * side weights, all of them shared.
        batch: samples per rank and task.
        wire_ms: least time that a row is on its way: a slow network, simulated by sleeping.
        rounds: steps of each kind, in turn.
        device: cpu: gloo; cuda: nccl, one device per rank.
    """
    for size, count in itertools.product(ranks, tasks):
        fields: dict[str, Any] = {"ranks": size, "T": count, "D": _LAYERS * side * side}
        with rows.failures(benchmark="processes", **fields, case="start"):
            cases, timeline = _on_all_ranks(
                size, (count, side, batch, wire_ms, rounds, device.type)
            )
            measured = Measured({name: times for name, (times, _) in cases.items()}, {}, {})
            for name, (_, moved) in cases.items():
                expected = _FORMULAS[name](count, fields["D"], size)
                rows.add(
                    benchmark="processes",
                    **fields,
                    batch=batch,
                    wire_ms=wire_ms or None,
                    case=name,
                    formula_mb=round(expected / 1e6, 3),
                    moved_mb=None if moved is None else round(moved / 1e6, 3),
                    moved_over_formula=None if moved is None else round(moved / expected, 4),
                    **{k: v for k, v in measured.row(name).items() if k != "case"},
                    over_one_loss=measured.ratio(name, "one loss"),
                    over_every_row=measured.ratio(name, "every row"),
                )
            for line in timeline:
                rows.add(benchmark="processes/timeline", **fields, batch=batch, **line)


# ------------------------------------------------------------------------ formulas


def bytes_of_surgery(tasks: int, width: int, ranks: int, itemsize: int = 4) -> float:
    """What a rank sends in one step: a reduce-scatter per row, one all-gather, and M."""
    share = (ranks - 1) / ranks
    return share * ((tasks + 1) * width * itemsize + 2 * tasks**2 * 8)


def _one_all_reduce(tasks: int, width: int, ranks: int) -> float:
    return 2 * (ranks - 1) / ranks * width * 4


def _an_all_reduce_per_row(tasks: int, width: int, ranks: int) -> float:
    return tasks * _one_all_reduce(tasks, width, ranks)


_FORMULAS: dict[str, Callable[[int, int, int], float]] = {
    "one loss": _one_all_reduce,
    "every row": _an_all_reduce_per_row,
    "surgery, waiting": bytes_of_surgery,
    "surgery": bytes_of_surgery,
}


# --------------------------------------------------------------------- in each process


class _Training:
    """One rank's model and the kinds of step."""

    def __init__(
        self, tasks: int, side: int, batch: int, wire_ms: float, device: torch.device
    ) -> None:
        torch.manual_seed(0)
        self.wire_ms = wire_ms
        layers = [nn.Linear(side, side, bias=False) for _ in range(_LAYERS)]
        self.model = nn.Sequential(*itertools.chain(*((layer, nn.Tanh()) for layer in layers)))
        self.model.to(device)
        self.parameters = list(self.model.parameters())
        source = torch.Generator(device).manual_seed(1 + dist.get_rank())
        shape = (tasks, batch, side)
        self.inputs = torch.randn(shape, generator=source, device=device).unbind()
        base = torch.optim.SGD(self.parameters, lr=1e-4)
        self.base = base
        self.plugin = AdaptiveGradientSurgery(base, process_group=dist.group.WORLD)

    def losses(self) -> list[Tensor]:
        return [(self.model(x) - t).square().mean() for t, x in enumerate(self.inputs)]

    def one_loss(self) -> None:
        gradients = torch.autograd.grad(torch.stack(self.losses()).sum(), self.parameters)
        self._step(self._mean(gradients))

    def every_row(self) -> None:
        rows = [self._mean(torch.autograd.grad(loss, self.parameters)) for loss in self.losses()]
        self._step(gradsurgery.aggregate(torch.stack(rows)))

    def surgery(self, *, waits: bool = False) -> None:
        with self._wire(waits=waits):
            self.plugin.zero_grad()
            self.plugin.backward(self.losses())
        self.plugin.step()

    def surgery_waiting(self) -> None:
        """The same, but a row's exchange ends before the next backward begins."""
        self.surgery(waits=True)

    @contextmanager
    def _wire(self, *, waits: bool) -> Iterator[None]:
        begin = Group.average

        def slowed(ranks: Group, row: Tensor, own: Tensor) -> Callable[[], None]:
            earliest = time.perf_counter() + self.wire_ms / 1e3
            finish = begin(ranks, row, own)

            def end() -> None:
                time.sleep(max(0.0, earliest - time.perf_counter()))
                finish()

            if not waits:
                return end
            end()
            return lambda: None

        Group.average = slowed  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            Group.average = begin  # type: ignore[method-assign]

    def timeline(self) -> list[dict[str, Any]]:
        """When each backward ran and each row was on its way, in ms, during one step."""
        start = time.perf_counter()
        marks: dict[tuple[str, int], list[float]] = {}

        def mark(what: str, task: int) -> None:
            marks.setdefault((what, task), []).append((time.perf_counter() - start) * 1e3)

        losses = self.losses()
        for task, loss in enumerate(losses):
            hook = functools.partial(mark, "backward", task)
            loss.register_hook(lambda _, hook=hook: hook())  # type: ignore[no-untyped-call]
        exchange = dist.all_to_all_single
        sent = itertools.count()

        def watched(*arguments: Any, **settings: Any) -> Any:
            task = next(sent)
            mark("backward", task)
            mark("on its way", task)
            work: Any = exchange(*arguments, **settings)
            work.get_future().add_done_callback(lambda _: mark("on its way", task))
            return work

        dist.all_to_all_single = watched
        try:
            self.plugin.zero_grad()
            self.plugin.backward(losses)
        finally:
            dist.all_to_all_single = exchange
        return [
            {"case": what, "row": task, "from_ms": round(times[0], 2), "to_ms": round(times[1], 2)}
            for (what, task), times in sorted(marks.items(), key=lambda item: item[1])
        ]

    def _mean(self, gradients: Sequence[Tensor]) -> Tensor:
        row = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(row, op=dist.ReduceOp.AVG)
        return row

    def _step(self, combined: Tensor) -> None:
        sizes = [p.numel() for p in self.parameters]
        for p, part in zip(self.parameters, torch.split(combined, sizes), strict=True):
            p.grad = part.view_as(p)
        self.base.step()


Found = tuple[dict[str, tuple[list[float], float | None]], list[dict[str, Any]]]


def _on_all_ranks(size: int, settings: tuple[Any, ...]) -> Found:
    """Rank 0's times, the bytes of all ranks together over their number, rank 0's timeline."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, args=(size, folder, settings), nprocs=size)  # type: ignore[no-untyped-call]
        found: Found = torch.load(Path(folder) / "found.pt", weights_only=True)
    return found


def _rank(rank: int, size: int, folder: str, settings: tuple[Any, ...]) -> None:
    tasks, side, batch, wire_ms, rounds, kind = settings
    torch.set_num_threads(1)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=120),
    )
    training = _Training(tasks, side, batch, wire_ms, device)
    cases = {
        "one loss": training.one_loss,
        "every row": training.every_row,
        "surgery, waiting": training.surgery_waiting,
        "surgery": training.surgery,
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    moved: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(rounds + 1):
        for name, case in cases.items():
            before = _bytes_at_rest()
            start = time.perf_counter()
            case()
            if kind == "cuda":
                torch.cuda.synchronize()
            taken_ms = (time.perf_counter() - start) * 1e3
            after = _bytes_at_rest()
            if turn:
                times[name].append(taken_ms)
                if before is not None and after is not None and kind == "cpu":
                    moved[name].append((after - before) / size)
    timeline = training.timeline() if kind == "cpu" else []
    if rank == 0:
        # The least of all rounds: whatever else talks on this machine only adds.
        found = {name: (times[name], min(moved[name], default=None)) for name in cases}
        torch.save((found, timeline), Path(folder) / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


def _bytes_at_rest() -> int | None:
    """Bytes sent over the loopback interface so far, between two barriers."""
    dist.barrier()
    table = Path("/proc/net/dev")
    sent = None
    if table.exists():
        loopback = [
            line for line in table.read_text().splitlines() if line.strip().startswith("lo:")
        ]
        sent = int(loopback[0].split()[9]) if loopback else None
    dist.barrier()
    return sent
