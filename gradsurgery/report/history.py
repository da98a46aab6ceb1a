"""History: what the surgeries of a run saw and did, kept on the device and read rarely."""

from __future__ import annotations

import weakref
from collections import deque
from itertools import groupby
from os import PathLike
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from gradsurgery.report.plots import ALONE, BY_TASK, figures, plot, whole
from gradsurgery.report.summary import SurgeryReport
from gradsurgery.report.text import number, table

__all__ = ["History"]


# Tasks and parts of the model.
_Key = tuple[tuple[str, ...], tuple[str, ...]]


class _Record(NamedTuple):
    """One surgery: its step's number, and tensors as the report holds them, not copied."""

    step: int
    gram: Tensor
    weights: Tensor
    effect: Tensor | None


class _Writer(Protocol):
    """As much of TensorBoard's SummaryWriter as is used."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Note one value."""


class History:
    """Keeps what every surgery of an optimizer saw and did. It never waits for the device.

    A hook after `step()` keeps the new report's tensors, [T, T] and [T] a step; everything else is
    computed when it is read. Steps are numbered from 0 as they are taken; one without a surgery
    (skipped by GradScaler, between two solves of `every=k`, a single task) leaves no record. Steps
    with other tasks or parts make a segment of their own, which goes on when these come back.
    The optimizer, and with it the model, is not kept alive.

    Args:
        optimizer: an `AdaptiveGradientSurgery`.
        every: record every n-th surgery.
        capacity: how many records of a segment are kept, the latest ones.
        step_effect: also record g_t·Δθ over the parameters under surgery: by how much the step that
            the wrapped optimizer took changes task t's loss, to first order. Below 0 it serves the
            task. It costs a row of gradients, a copy of these parameters and one pass over the
            rows. g_t is what `backward` saw: before clipping, and of the scaled loss where there
            is a loss scaler, so the sign is what matters. NaN where there are no rows: with
            `features=`, with methods that measure no gradients.

    Raises:
        TypeError: `optimizer` is not an AdaptiveGradientSurgery; `every` or `capacity` no int.
        ValueError: `every` or `capacity` is below 1; `step_effect` with a process_group, where
            no rank holds a task's whole gradient.

    Example:
        >>> import torch
        >>> from gradsurgery import AdaptiveGradientSurgery
        >>> from gradsurgery.report import History
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = AdaptiveGradientSurgery(torch.optim.Adam([p]))
        >>> with History(optimizer) as history:
        ...     for _ in range(3):
        ...         optimizer.zero_grad()
        ...         optimizer.backward([p[0] + p[1], -2 * p[0]])
        ...         optimizer.step()
        >>> history.read()["conflict_rate"].tolist()
        [1.0, 1.0, 1.0]
    """

    def __init__(
        self,
        optimizer: Any,
        *,
        every: int = 1,
        capacity: int = 10_000,
        step_effect: bool = False,
    ) -> None:
        surgery = getattr(optimizer, "_surgery", None)
        if surgery is None:
            raise TypeError(
                f"optimizer must be an AdaptiveGradientSurgery; got {type(optimizer).__name__}"
            )
        for name, value in (("every", every), ("capacity", capacity)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int; got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        if step_effect and not surgery.keeps_rows:
            raise ValueError("step_effect does not go together with process_group")
        self.every, self.capacity, self.step_effect = every, capacity, step_effect
        self._segments: dict[_Key, deque[_Record]] = {}
        self._latest: _Key | None = None
        self._steps = self._surgeries = self._unwritten = 0
        self._seen: SurgeryReport | None = optimizer.last
        # Parameters as they were before the step, and the ids of those parameters.
        self._before: list[Tensor] = []
        self._copied: list[int] = []
        self._optimizer = weakref.ref(optimizer)
        self._handles: list[RemovableHandle] = [optimizer.register_step_post_hook(self._after)]
        if step_effect:
            surgery.keep_rows(True)
            self._handles.append(optimizer.register_step_pre_hook(self._copy))

    # ------------------------------------------------------------------- record

    @torch.no_grad()
    def _copy(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the step: the parameters that it is going to change."""
        self._copied = []
        # A closure calls `backward` within the step: its report is not there yet.
        closure = len(args) > 1 or "closure" in kwargs
        if self._surgeries % self.every or not (closure or optimizer.last is not self._seen):
            return
        operated = optimizer._surgery.operated()
        if operated:
            if list(map(_kind, self._before)) != list(map(_kind, operated)):
                self._before = [torch.empty_like(p) for p in operated]
            torch._foreach_copy_(self._before, operated)
        self._copied = list(map(id, operated))

    @torch.no_grad()
    def _after(self, optimizer: Any, *_: Any) -> None:
        step, self._steps = self._steps, self._steps + 1
        report: SurgeryReport | None = optimizer.last
        if report is None or report is self._seen:
            return
        self._seen = report
        if len(report.names) == 1:
            return
        surgery, self._surgeries = self._surgeries, self._surgeries + 1
        if surgery % self.every:
            return
        effect = self._effect(optimizer._surgery, report) if self.step_effect else None
        self._latest = report.names, report.parts
        records = self._segments.setdefault(self._latest, deque(maxlen=self.capacity))
        records.append(_Record(step, report.gram, report.weights, effect))

    def _effect(self, surgery: Any, report: SurgeryReport) -> Tensor:
        """g_t·Δθ, [T] float64; uses up the copies from before the step."""
        operated = surgery.operated()
        if not operated or list(map(id, operated)) != self._copied:
            return report.weights.new_full((len(report.names),), torch.nan)
        torch._foreach_sub_(self._before, operated)
        backwards: Tensor = surgery.products(dict(zip(self._copied, self._before, strict=True)))
        return -backwards

    def close(self) -> None:
        """Record nothing any more, and free what recording needs; the records stay."""
        for handle in self._handles:
            handle.remove()
        optimizer = self._optimizer()
        if self._handles and self.step_effect and optimizer is not None:
            hooks = optimizer._optimizer_step_pre_hooks.values()
            others = (getattr(hook, "__self__", None) for hook in hooks)
            optimizer._surgery.keep_rows(any(isinstance(each, History) for each in others))
        self._handles, self._before, self._copied, self._seen = [], [], [], None

    def __enter__(self) -> History:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --------------------------------------------------------------------- read

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks of the latest record; none before the first."""
        return self._latest[0] if self._latest else ()

    @property
    def segments(self) -> list[tuple[str, ...]]:
        """The tasks of each segment, in the order in which these first came."""
        return [names for names, _ in self._segments]

    def __len__(self) -> int:
        """The number of records, of all segments."""
        return sum(map(len, self._segments.values()))

    def read(self, segment: int | None = None) -> dict[str, Tensor]:
        """All records of a segment, on the CPU by one transfer.

        Args:
            segment: index into `segments`; None: the one that the latest record is in.

        Returns:
            For N records "step" [N] int64, and in float64 as in `SurgeryReport` "gram", "cosine"
            [N, T, T], "norms", "weights" [N, T], "scale", "cosine_to_sum" [N]; "conflict_rate" [N],
            the share of pairs in conflict; with `step_effect` also "effect" [N, T]. With parts of
            the model all but "step" and "effect" have P after N. NaN where nothing was measured.

        Raises:
            RuntimeError: nothing was recorded yet.
            IndexError: no such segment.
        """
        key = self._key(segment)
        return {"step": self._read_steps(key), **figures(*self._read(key))}

    def _key(self, segment: int | None) -> _Key:
        if self._latest is None:
            raise RuntimeError("nothing was recorded yet: a surgery and its step come first")
        return self._latest if segment is None else list(self._segments)[segment]

    def _read_steps(self, key: _Key) -> Tensor:
        return torch.tensor([record.step for record in self._segments[key]])

    def _read(self, key: _Key) -> tuple[SurgeryReport, Tensor | None]:
        """All records as one report, with N first, and the effects."""
        records, blocks = self._segments[key], []
        # Those of a resumed run lie elsewhere than new ones.
        for _, run in groupby(records, key=lambda record: record.gram.device):
            columns = [
                torch.stack(column).flatten(1) for column in zip(*map(_tensors, run), strict=True)
            ]
            blocks.append(torch.cat([c.to(columns[0].device) for c in columns], 1).cpu())
        shapes = [tensor.shape for tensor in _tensors(records[0])]
        pieces = torch.split_with_sizes(torch.cat(blocks), [s.numel() for s in shapes], 1)
        gram, weights, *effect = (
            piece.reshape(-1, *shape) for piece, shape in zip(pieces, shapes, strict=True)
        )
        return SurgeryReport(key[0], gram, weights, key[1]), effect[0] if effect else None

    def _read_whole(self, segment: int | None) -> tuple[tuple[str, ...], dict[str, Tensor]]:
        """Tasks, and what `read` gives, with the parts put together."""
        key = self._key(segment)
        report, effect = self._read(key)
        return key[0], {"step": self._read_steps(key), **whole(report, effect)}

    def table(self, last: int = 10, *, segment: int | None = None) -> str:
        """The latest records for a terminal; `segment` as in `read`.

        With parts of the model: all pairs of all parts, and the gradients as a whole.
        """
        names, found = self._read_whole(segment)
        kinds = [(kind, title) for kind, title in BY_TASK.items() if kind in found]
        rows = [["step", "conflicts", "lowest cos", "length", "cos to sum"]]
        rows[0] += [f"{title} {name}" for _, title in kinds for name in names]
        for index in range(max(len(found["step"]) - last, 0), len(found["step"])):
            row = [number(float(found[k][index]), spec) for k, spec in ALONE.items()]
            row += [number(v, ".3g") for kind, _ in kinds for v in found[kind][index].tolist()]
            rows.append([str(int(found["step"][index])), *row])
        return table(rows)

    def write_to(self, writer: _Writer, prefix: str = "surgery") -> None:
        """Write the records since the last call to TensorBoard: to anything with `add_scalar`."""
        for segment in range(len(self._segments)):
            names, found = self._read_whole(segment)
            for index, step in enumerate(found["step"].tolist()):
                if step < self._unwritten:
                    continue
                values = {kind: float(found[kind][index]) for kind in ALONE}
                for kind in BY_TASK:
                    if kind in found:
                        line = found[kind][index].tolist()
                        values |= {f"{kind}/{n}": v for n, v in zip(names, line, strict=True)}
                for tag, value in values.items():
                    if value == value:  # not NaN
                        writer.add_scalar(f"{prefix}/{tag}", value, step)
        self._unwritten = self._steps

    def plot(self, path: str | PathLike[str], *, segment: int | None = None) -> None:
        """Draw all records into an image file, PNG, PDF or SVG by its suffix; see `table`.

        Raises:
            ImportError: matplotlib is not installed.
        """
        plot(path, *self._read_whole(segment))

    # -------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """All records, on the CPU: plain values and tensors, to be saved beside the optimizer's."""
        segments = []
        for key in self._segments:
            report, effect = self._read(key)
            segments.append(
                {
                    "names": list(key[0]),
                    "parts": list(key[1]),
                    "step": self._read_steps(key),
                    "gram": report.gram,
                    "weights": report.weights,
                    "effect": effect,
                }
            )
        return {
            "version": 1,
            "steps": self._steps,
            "surgeries": self._surgeries,
            "unwritten": self._unwritten,
            "latest": None if self._latest is None else list(self._segments).index(self._latest),
            "segments": segments,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ValueError: it comes from a later version, or only one of the two has `step_effect`.
        """
        if state["version"] > 1:
            raise ValueError(f"the history has version {state['version']}; update gradsurgery")
        segments: dict[_Key, deque[_Record]] = {}
        for each in state["segments"]:
            if (each["effect"] is not None) != self.step_effect:
                raise ValueError(f"step_effect is {self.step_effect} here and not in the state")
            gram, weights, effect = each["gram"].cpu(), each["weights"].cpu(), each["effect"]
            steps = each["step"].tolist()
            effects = [None] * len(steps) if effect is None else effect.cpu().unbind()
            columns = zip(steps, gram.unbind(), weights.unbind(), effects, strict=True)
            key = tuple(each["names"]), tuple(each["parts"])
            segments[key] = deque((_Record(*line) for line in columns), self.capacity)
        self._segments = segments
        self._latest = None if state["latest"] is None else list(segments)[state["latest"]]
        self._steps, self._surgeries = state["steps"], state["surgeries"]
        self._unwritten = state["unwritten"]


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device, tensor.stride()


def _tensors(record: _Record) -> tuple[Tensor, ...]:
    every = record.gram, record.weights, record.effect
    return tuple(tensor.to(torch.float64) for tensor in every if tensor is not None)
