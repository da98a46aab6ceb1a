"""`diagnose`: would gradient surgery change anything here, and is it worth its price?"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradsurgery._losses import Losses
from gradsurgery.methods import AGS, PCGrad
from gradsurgery.optimizer import AdaptiveGradientSurgery

__all__ = ["Diagnosis", "diagnose"]

# Of pairs and batches in conflict: below it there is next to nothing for surgery to do.
RARE = 0.05
# Degrees between the directions of AGS and the sum: a mini-batch's noise turns by more.
TURNED_DEGREES = 5.0
# Cosine with AGS's direction above which one set of static weights does the same.
AS_STATIC = 0.99
# Batches whose steps are timed and tried with the optimizer: enough for a median.
_TRIED = 5


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` measured. Printed, it is an answer in words.

    Attributes:
        verdict: "no": hardly any conflict; "rescale": conflicts, but AGS's direction is the sum's;
            "static": AGS turns the gradient, and one set of static weights turns it likewise;
            "maybe": neither.
        names: the tasks.
        batches: how many were looked at.
        conflict_rate: share of pairs of tasks and batches with a negative dot product.
        conflict_interval: 95% of its mean over batches, normal approximation.
        cosine: mean over batches, [T, T] float64.
        sign_agreement: of each pair the share of batches with the sign that most have, [T, T].
        norms: median over batches, [T].
        turned_degrees: median angle between AGS's gradient and the plain sum's.
        pcgrad_scale: median of ‖PCGrad's gradient‖ / ‖sum‖; AGS always keeps the sum's length.
        static_weights: AGS's mean weights, [T].
        static_cosine: median cosine between their gradient and AGS's.
        backward_ratio: time of a backward with surgery over one of the sum, median.
        raised: method -> share of (batch, task) pairs whose loss the optimizer's own step raised
            to first order; empty without an optimizer.
    """

    verdict: str
    names: tuple[str, ...]
    batches: int
    conflict_rate: float
    conflict_interval: tuple[float, float]
    cosine: Tensor
    sign_agreement: Tensor
    norms: Tensor
    turned_degrees: float
    pcgrad_scale: float
    static_weights: Tensor
    static_cosine: float
    backward_ratio: float
    raised: dict[str, float]

    def __str__(self) -> str:
        """The answer first, then what it rests on."""
        low, high = self.conflict_interval
        answer = {
            "no": (
                f"No: the tasks hardly fight. {self.conflict_rate:.0%} of the pairs conflict, and "
                "where nothing conflicts AGS and PCGrad are the plain sum to the bit."
            ),
            "rescale": (
                f"Only the length: {self.conflict_rate:.0%} of the pairs conflict, but AGS's "
                f"direction is {self.turned_degrees:.1f} degrees from the plain sum's. (With two "
                "tasks of equal norms it IS the plain sum.) PCGrad has the same direction at "
                f"{self.pcgrad_scale:.2f} of the length: a learning rate does that for free, and "
                "Adam divides it out."
            ),
            "static": (
                f"Perhaps not: AGS turns the gradient by {self.turned_degrees:.0f} degrees, but "
                "static task weights of about "
                f"{', '.join(f'{w:.2g}' for w in self.static_weights.tolist())} turn it likewise "
                f"(cosine {self.static_cosine:.3f}), with one backward pass. Tune those first."
            ),
            "maybe": (
                f"Maybe: {self.conflict_rate:.0%} of the pairs conflict, and AGS turns the "
                f"gradient by {self.turned_degrees:.0f} degrees, as no static weights do (cosine "
                f"{self.static_cosine:.3f}). Whether that helps only a run can tell: beside the "
                "sum with a tuned learning rate, tuned static weights, and the sum at AGS's length."
            ),
        }[self.verdict]
        norms = self.norms.tolist()
        pairs = [(i, j) for i in range(len(norms)) for j in range(i + 1, len(norms))]
        worst = min(pairs, key=lambda pair: float(self.cosine[pair]))
        apart = max(norms) / max(min(norms), 1e-300)
        listed = ", ".join(f"{n} {v:.3g}" for n, v in zip(self.names, norms, strict=True))
        lines = [
            answer,
            "",
            f"conflicts      {self.conflict_rate:.0%} of pairs and batches "
            f"(95% interval {low:.0%} to {high:.0%}, {self.batches} batches)",
            f"worst pair     {self.names[worst[0]]}, {self.names[worst[1]]}: mean cosine "
            f"{float(self.cosine[worst]):+.2f}, the same sign in "
            f"{float(self.sign_agreement[worst]):.0%} of the batches",
            f"norms          {listed} (largest over smallest {apart:.3g})",
            f"AGS            turned by {self.turned_degrees:.1f} degrees from the sum, same length",
            f"price          {self.backward_ratio:.2f} times the sum's forward and backward pass",
        ]
        for method, share in self.raised.items():
            lines.append(
                f"step ({method})".ljust(15)
                + f"the optimizer's own step raises {share:.0%} of the losses to first order"
            )
        return "\n".join(lines)


def diagnose(
    model: nn.Module,
    losses_fn: Callable[[nn.Module, Any], Losses],
    batches: Iterable[Any],
    optimizer: torch.optim.Optimizer | None = None,
    *,
    seed: int = 0,
) -> Diagnosis:
    """Measure conflicts, norms, what AGS would change, and what it costs.

    Everything runs on deep copies: model, optimizer, p.grad, buffers, mode and random streams stay
    as they are.

    Args:
        model: as it is in training; measure after some steps, not at the start alone.
        losses_fn: (model, batch) -> the losses, as `backward` takes them.
        batches: some training batches; all of them are used. Twenty tell more than two.
        optimizer: the training's own (plain, or wrapped): its step is tried on copies.
        seed: of the order in which AGS's tasks meet, and of what is random in the forward pass.

    Raises:
        ValueError: no batches, fewer than two losses, or losses that share no parameter.

    Source: the facts about AGS are those of SLAM-AGS, arXiv 2511.14639, and PCGrad, 2001.06782; the
    controls are those of Kurin et al., arXiv 2201.04122.

    Example:
        >>> import torch
        >>> from gradsurgery import diagnose
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <...>
        >>> model = torch.nn.Linear(4, 1)
        >>> def losses(model, x):
        ...     return [model(x).square().mean(), (model(x) - 0.1).square().mean()]
        >>> diagnose(model, losses, torch.randn(8, 32, 4)).verdict
        'no'
    """
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        return _diagnose(model, losses_fn, list(batches), optimizer, seed)


def _diagnose(
    model: nn.Module,
    losses_fn: Callable[[nn.Module, Any], Losses],
    batches: list[Any],
    optimizer: torch.optim.Optimizer | None,
    seed: int,
) -> Diagnosis:
    if not batches:
        raise ValueError("batches is empty; diagnose needs at least one batch")
    names, grams, ratios = _measure(copy.deepcopy(model), losses_fn, batches)
    generator = torch.Generator().manual_seed(seed)
    count = len(names)
    pairs = torch.triu_indices(count, count, 1)
    norms = grams.diagonal(dim1=-2, dim2=-1).sqrt()
    lengths = norms[..., :, None] * norms[..., None, :]
    cosine = torch.where(lengths > 0, grams / torch.where(lengths > 0, lengths, 1.0), 0.0)
    rates = (grams[:, pairs[0], pairs[1]] < 0).double().mean(1)
    rate = float(rates.mean())
    spread = float(rates.std()) if len(rates) > 1 else 0.0
    margin = 1.96 * spread / math.sqrt(len(rates))
    ones = torch.ones(count, dtype=torch.float64)
    ags = torch.stack([AGS().weights(gram, generator=generator) for gram in grams])
    pcgrad = torch.stack([PCGrad().weights(gram, generator=generator) for gram in grams])
    static = ags.mean(0)
    turned = _median(
        math.degrees(math.acos(_cosine(gram, w, ones))) for gram, w in zip(grams, ags, strict=True)
    )
    same = _median(_cosine(gram, w, static) for gram, w in zip(grams, ags, strict=True))
    scale = _median(
        _length(gram, w) / max(_length(gram, ones), 1e-300)
        for gram, w in zip(grams, pcgrad, strict=True)
    )
    if rate < RARE:
        verdict = "no"
    elif turned < TURNED_DEGREES:
        verdict = "rescale"
    else:
        verdict = "static" if same > AS_STATIC else "maybe"
    negative = (cosine < 0).double().mean(0)
    return Diagnosis(
        verdict=verdict,
        names=names,
        batches=len(batches),
        conflict_rate=rate,
        conflict_interval=(max(rate - margin, 0.0), min(rate + margin, 1.0)),
        cosine=cosine.mean(0),
        sign_agreement=torch.maximum(negative, 1 - negative),
        norms=norms.median(0).values,
        turned_degrees=turned,
        pcgrad_scale=scale,
        static_weights=static,
        static_cosine=same,
        backward_ratio=_median(ratios),
        raised={} if optimizer is None else _try_steps(model, losses_fn, batches, optimizer, seed),
    )


def _measure(
    model: nn.Module, losses_fn: Callable[[nn.Module, Any], Losses], batches: list[Any]
) -> tuple[tuple[str, ...], Tensor, list[float]]:
    """Task names, M of every batch [N, T, T] on the CPU, and how much longer surgery takes."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    idle = torch.optim.SGD(parameters, lr=0.0)
    plugin = AdaptiveGradientSurgery(idle, "sum")
    names: tuple[str, ...] = ()
    grams: list[Tensor] = []
    ratios: list[float] = []
    for number, batch in enumerate(batches):
        plugin.zero_grad()
        begin = _now(parameters)
        plugin.backward(losses_fn(model, batch))
        with_surgery = _now(parameters) - begin
        report = plugin.last
        if report is None or len(report.names) < 2:
            raise ValueError("losses_fn must return at least two losses: one has no conflicts")
        if names and report.names != names:
            raise ValueError(
                f"losses_fn gave the tasks {', '.join(names)} before and now "
                f"{', '.join(report.names)}; they must be the same for every batch"
            )
        names = report.names
        grams.append(report.gram.cpu())
        if number < _TRIED:
            plugin.zero_grad()
            begin = _now(parameters)
            losses = losses_fn(model, batch)
            values = losses.values() if hasattr(losses, "values") else losses
            torch.stack([loss for loss in values if loss is not None]).sum().backward()  # type: ignore[no-untyped-call]
            ratios.append(with_surgery / max(_now(parameters) - begin, 1e-9))
    stacked = torch.stack(grams)
    if not stacked.any():
        raise ValueError("the losses share no parameter with a gradient: there is nothing to weigh")
    return names, stacked, ratios


def _try_steps(
    model: nn.Module,
    losses_fn: Callable[[nn.Module, Any], Losses],
    batches: list[Any],
    optimizer: torch.optim.Optimizer,
    seed: int,
) -> dict[str, float]:
    """Method -> share of the losses that a step from here raises, by g_t·Δθ."""
    base = optimizer._base if isinstance(optimizer, AdaptiveGradientSurgery) else optimizer
    found: dict[str, float] = {}
    for method in ("sum", "ags"):
        raised: list[bool] = []
        for batch in batches[:_TRIED]:
            # Together, so that the copied optimizer holds the copied parameters.
            own, stepper = copy.deepcopy((model, base))
            plugin = AdaptiveGradientSurgery(stepper, method, seed=seed)
            plugin._surgery.keep_rows = True
            plugin.zero_grad()
            plugin.backward(losses_fn(own, batch))
            operated = plugin._surgery.operated()
            before = [p.detach().clone() for p in operated]
            plugin.step()
            changes = {id(p): p.detach() - old for p, old in zip(operated, before, strict=True)}
            raised += [change > 0 for change in plugin._surgery.products(changes).tolist()]
        found[method] = sum(raised) / max(len(raised), 1)
    return found


def _median(values: Iterable[float]) -> float:
    return float(torch.tensor(list(values), dtype=torch.float64).quantile(0.5))


def _cosine(gram: Tensor, one: Tensor, other: Tensor) -> float:
    """Between Gᵀw and Gᵀv; 1 where either is zero."""
    lengths = _length(gram, one) * _length(gram, other)
    if not lengths > 0:
        return 1.0
    return max(-1.0, min(1.0, float(one @ gram @ other) / lengths))


def _length(gram: Tensor, weights: Tensor) -> float:
    return math.sqrt(max(float(weights @ gram @ weights), 0.0))


def _now(parameters: list[Any]) -> float:
    """The time, when the device has done what it was given."""
    if parameters and parameters[0].device.type == "cuda":
        torch.cuda.synchronize(parameters[0].device)
    return time.perf_counter()
