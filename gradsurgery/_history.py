"""History: what the surgeries of a run saw and did, kept on the device and read rarely."""

from __future__ import annotations

from collections import deque
from os import PathLike
from typing import Any

import torch
from torch import Tensor

__all__ = ["History"]

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


class History:
    """Records every surgery of an optimizer after its step. It never waits for the device.

    A step that GradScaler skips, and one between two solves of `every=k`, leaves no record. Where
    the tasks change, a new record begins; `read` gives the latest.

    Args:
        optimizer: an `AdaptiveGradientSurgery`.
        every: record every n-th surgery.
        capacity: how many records are kept, the latest ones.
        step_effect: also record g_t·Δθ, the first-order change of each task's loss by the step
            that the wrapped optimizer took: does the STEP still serve each task? It keeps all
            rows of task gradients and a copy of the parameters: 2 D numbers more. With a loss
            scaler the gradients are those of the scaled losses; the sign is what matters.

    Raises:
        TypeError: `optimizer` is none.
        ValueError: `every` or `capacity` is below 1; `step_effect` with a process_group.

    Example:
        >>> import torch
        >>> from gradsurgery import AdaptiveGradientSurgery
        >>> from gradsurgery.report import History
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = AdaptiveGradientSurgery(torch.optim.Adam(model.parameters()))
        >>> with History(optimizer) as history:
        ...     for x in torch.randn(5, 8, 3):
        ...         out = model(x)
        ...         optimizer.zero_grad()
        ...         optimizer.backward([out[:, 0].mean(), (out.sum(1) + 1).square().mean()])
        ...         optimizer.step()
        >>> history.read()["weights"].shape
        torch.Size([5, 2])
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
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}")
        if step_effect and not surgery.keeps_rows:
            raise ValueError("step_effect cannot be combined with process_group")
        self._optimizer, self._surgery = optimizer, surgery
        self._every = every
        self._records: deque[tuple[int, Tensor, Tensor, Tensor | None]] = deque(maxlen=capacity)
        self._names: tuple[str, ...] = ()
        self._parts: tuple[str, ...] = ()
        self._seen: Any = None
        self._steps = self._surgeries = 0
        self._effect = step_effect
        self._before: list[tuple[Tensor, Tensor]] = []
        self._handles = [optimizer.register_step_post_hook(self._after)]
        if step_effect:
            surgery.keep_rows = True
            self._handles.append(optimizer.register_step_pre_hook(self._copy))

    # ------------------------------------------------------------------- record

    def _is_new(self) -> bool:
        report = self._optimizer.last
        return report is not None and report is not self._seen

    @torch.no_grad()
    def _copy(self, *_: Any) -> None:
        self._before = []
        if self._is_new() and self._surgeries % self._every == 0:
            own = self._surgery.operated()
            self._before = [(p, p.detach().clone()) for p in own]

    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        step, self._steps = self._steps, self._steps + 1
        if not self._is_new():
            return
        report = self._seen = self._optimizer.last
        number, self._surgeries = self._surgeries, self._surgeries + 1
        if number % self._every:
            return
        if (report.names, report.parts) != (self._names, self._parts):
            self._records.clear()
            self._names, self._parts = report.names, report.parts
        effect = None
        if self._effect:
            changes = {id(p): p.detach() - old for p, old in self._before}
            if changes:
                effect = self._surgery.products(changes)
            else:
                effect = torch.full_like(report.weights.view(-1)[: len(self._names)], torch.nan)
            self._before = []
        self._records.append((step, report.gram, report.weights, effect))

    # --------------------------------------------------------------------- read

    def __len__(self) -> int:
        """The number of records."""
        return len(self._records)

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks of the records."""
        return self._names

    @torch.no_grad()
    def read(self) -> dict[str, Tensor]:
        """All records, on the CPU; waits for the device once.

        Returns:
            `step` [N] int64: the optimizer's steps since the history was attached. `gram`
            [N, T, T], `weights`, `norms` [N, T], `cosine` [N, T, T], `conflict_rate`, `scale`,
            `turned` [N]: see `SurgeryReport`; float64. With parts of the model P comes after N.
            `effect` [N, T]: g_t·Δθ, with `step_effect`.

        Raises:
            RuntimeError: nothing was recorded yet.
        """
        from gradsurgery.report import SurgeryReport

        if not self._records:
            raise RuntimeError("nothing was recorded yet: the history needs a surgery and a step")
        steps, grams, weights, effects = zip(*self._records, strict=True)
        found = {"step": torch.tensor(steps), "gram": torch.stack(grams).cpu()}
        found["weights"] = torch.stack(weights).cpu()
        report = SurgeryReport(self._names, found["gram"], found["weights"])
        pairs = max(len(self._names) * (len(self._names) - 1) // 2, 1)
        found |= {
            "norms": report.norms,
            "cosine": report.cosine,
            "conflict_rate": report.conflicts.double() / pairs,
            "scale": report.scale,
            "turned": report.turned,
        }
        if effects[0] is not None:
            found["effect"] = torch.stack([e for e in effects if e is not None]).cpu()
        return found

    def table(self, last: int = 10) -> str:
        """The latest records for a terminal."""
        found = _whole(self.read())
        header = ["step", "conflicts", "scale", "turned"]
        header += [f"w {name}" for name in self._names]
        if "effect" in found:
            header += [f"g·Δθ {name}" for name in self._names]
        lines = [header]
        for index in range(max(len(found["step"]) - last, 0), len(found["step"])):
            line = [
                str(int(found["step"][index])),
                f"{float(found['conflict_rate'][index]):.0%}",
                f"{float(found['scale'][index]):.3g}",
                f"{float(found['turned'][index]):.3f}",
                *(f"{value:.3g}" for value in found["weights"][index].tolist()),
            ]
            if "effect" in found:
                line += [f"{value:+.2e}" for value in found["effect"][index].tolist()]
            lines.append(line)
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            for line in lines
        )

    def write_to(self, writer: Any) -> None:
        """Write all records to a TensorBoard `SummaryWriter`, or anything with `add_scalar`."""
        found = _whole(self.read())
        for index, step in enumerate(found["step"].tolist()):
            for name in ("conflict_rate", "scale", "turned"):
                writer.add_scalar(f"surgery/{name}", float(found[name][index]), step)
            for kind in ("norms", "weights", "effect"):
                values = found[kind][index].tolist() if kind in found else ()
                for task, value in zip(self._names, values, strict=False):
                    writer.add_scalar(f"surgery/{kind}/{task}", value, step)

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw all records into an image file (PNG, PDF, SVG by its suffix).

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("History.plot needs matplotlib: pip install matplotlib") from error
        found = _whole(self.read())
        steps = found["step"].tolist()
        pairs = torch.triu_indices(len(self._names), len(self._names), 1)
        cosines = found["cosine"][:, pairs[0], pairs[1]]
        panels: list[tuple[str, Tensor, list[str], str]] = [
            ("gradient norm", found["norms"], list(self._names), "log"),
            ("task weight", found["weights"], list(self._names), "linear"),
        ]
        if cosines.shape[1] <= len(_COLORS):
            labels = [f"{self._names[i]}, {self._names[j]}" for i, j in pairs.T.tolist()]
            panels.append(("cosine of a pair", cosines, labels, "linear"))
        elif cosines.shape[1]:
            spread = torch.stack([cosines.amin(1), cosines.median(1).values, cosines.amax(1)], 1)
            panels.append(("cosine of a pair", spread, ["least", "median", "most"], "linear"))
        both = torch.stack([found["scale"], found["turned"]], 1)
        panels.append(("beside the plain sum", both, ["length", "cosine"], "linear"))
        if "effect" in found:
            panels.append(("g·Δθ of the step", found["effect"], list(self._names), "symlog"))
        figure = Figure(figsize=(8, 2.2 * len(panels)), layout="constrained")
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axis, (title, values, labels, scale) in zip(axes, panels, strict=True):
            for number, label in enumerate(labels):
                color = _COLORS[number % len(_COLORS)]
                line = (None, "--", ":")[min(number // len(_COLORS), 2)] or "-"
                axis.plot(steps, values[:, number].tolist(), line, color=color, label=label, lw=1.2)
            if scale == "symlog":
                finite = values[values.isfinite()].abs()
                axis.set_yscale("symlog", linthresh=max(float(finite.median()), 1e-12))
                axis.axhline(0, color="0.6", lw=0.8)
            elif scale == "log" and bool((values > 0).all()):
                axis.set_yscale("log")
            axis.set_ylabel(title)
            axis.grid(alpha=0.3)
            axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False)
        axes[-1].set_xlabel("step")
        figure.savefig(path, dpi=120)

    # -------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """The records, on the CPU; for `torch.save` beside the optimizer's."""
        state: dict[str, Any] = {"names": list(self._names), "parts": list(self._parts)}
        state |= {"steps": self._steps, "surgeries": self._surgeries}
        if self._records:
            found = self.read()
            state |= {key: found[key] for key in ("step", "gram", "weights")}
            if "effect" in found:
                state["effect"] = found["effect"]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the records of `state_dict`."""
        self._names, self._parts = tuple(state["names"]), tuple(state["parts"])
        self._steps, self._surgeries = state["steps"], state["surgeries"]
        self._records.clear()
        effects = state.get("effect")
        for index, step in enumerate(state["step"].tolist() if "step" in state else ()):
            effect = None if effects is None else effects[index]
            self._records.append((step, state["gram"][index], state["weights"][index], effect))

    def close(self) -> None:
        """Record nothing any more; the records stay."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._effect:
            self._surgery.keep_rows = False
        self._before = []

    def __enter__(self) -> History:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _whole(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Records of the model as a whole: parts do not overlap, so their Gram matrices add up."""
    if found["gram"].dim() == 3:
        return found
    from gradsurgery.report import SurgeryReport

    gram = found["gram"].sum(1)
    names = tuple(map(str, range(gram.shape[-1])))
    report = SurgeryReport(names, gram, found["weights"].mean(1))
    return found | {
        "gram": gram,
        "weights": report.weights,
        "norms": report.norms,
        "cosine": report.cosine,
        "conflict_rate": report.conflicts.double() / max(len(names) * (len(names) - 1) // 2, 1),
        "scale": report.scale,
        "turned": report.turned,
    }
