"""A whole ResNet18 training step with surgery beside the step that it replaces."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from benchmarks.measure import Rows, alternate, summary
from gradsurgery import AdaptiveGradientSurgery

__all__ = ["build", "run"]

Step = Callable[[], None]


def build(
    graph: str, tasks: int, batch: int, pixels: int
) -> tuple[nn.Module, Callable[[], list[Tensor]]]:
    """A ResNet18 and its losses; "disjoint": images for each task, "shared": one batch for all."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = resnet18(num_classes=tasks).to(device)
    count = tasks if graph == "disjoint" else 1
    images = [
        torch.randn(batch, 3, pixels, pixels, generator=generator).to(device) for _ in range(count)
    ]

    def losses() -> list[Tensor]:
        out = [model(image) for image in images]
        # Targets of opposite sign, so that the tasks disagree.
        return [(out[t % count][:, t] - (-1) ** t).square().mean() for t in range(tasks)]

    return model, losses


def step_of(kind: str, graph: str, tasks: int, batch: int, pixels: int) -> Step:
    """One training step: forward, backward in the manner of `kind`, SGD with momentum."""
    model, losses = build(graph, tasks, batch, pixels)
    base = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    plugin = AdaptiveGradientSurgery(base)

    def one_sum() -> None:
        base.zero_grad()
        torch.stack(losses()).sum().backward()
        base.step()

    def one_by_one() -> None:
        base.zero_grad()
        values = losses()
        for t, loss in enumerate(values):
            loss.backward(retain_graph=graph == "shared" and t < tasks - 1)
        base.step()

    def surgery() -> None:
        plugin.zero_grad()
        plugin.backward(losses())
        plugin.step()

    return {"sum": one_sum, "T backwards": one_by_one, "surgery": surgery}[kind]


def run(rows: Rows, *, pairs: int, tasks: int, batch: int, pixels: int) -> None:
    """The ratio is the median over pairs that ran one after the other."""
    for graph in ("disjoint", "shared"):
        kinds = ("sum", "T backwards", "surgery")
        cases = {kind: step_of(kind, graph, tasks, batch, pixels) for kind in kinds}
        times = alternate(cases, pairs)
        for kind in kinds:
            over = {
                other: statistics.median(
                    a / b for a, b in zip(times[kind], times[other], strict=True)
                )
                for other in ("sum", "T backwards")
            }
            rows.add(
                benchmark="step",
                case=f"{graph}: {kind}",
                T=tasks,
                batch=batch,
                pixels=pixels,
                **summary(times[kind]),
                over_sum=round(over["sum"], 3),
                over_T_backwards=round(over["T backwards"], 3),
            )
