"""`diagnose`: would gradient surgery change anything here, and is it worth its price?"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradsurgery._probe import TRIED, LossesOf, Probe
from gradsurgery.methods import AGS, PCGrad
from gradsurgery.report import SurgeryReport

__all__ = ["Diagnosis", "diagnose"]

# Share of pairs, or of batches, below which there is next to nothing for surgery to do.
RARE = 0.05
# Angle between AGS's direction and the sum's: at 5 degrees a step makes 0.4% less progress on the
# summed loss, which no choice of a learning rate is exact enough to notice.
TURNED_DEGREES = 5.0
# Cosine with AGS's direction above which one set of static weights does the same (8 degrees).
AS_STATIC = 0.99
# Share of batches under which the sign of a pair's cosine is not settled.
SETTLED = 0.9


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` measured. Printed, it is an answer in words.

    Attributes:
        verdict: "no": AGS hardly turns the gradient, and hardly anything conflicts; "rescale":
            conflicts, but AGS's direction is the sum's; "static": AGS turns the gradient, and one
            set of static weights turns it likewise; "maybe": AGS turns it as none does.
        names: the tasks.
        batches: how many were looked at.
        gram: M of each batch, [N, T, T] float64, of the parameters that tasks share.
        conflict_rate: share of pairs of tasks and batches with a negative dot product.
        conflict_interval: 95% of it, after Wilson, with batches as the sample: pairs of one batch
            are not independent. About this point of the training alone.
        cosine: mean over batches, [T, T].
        sign_agreement: for each pair the share of batches with the sign that most have, [T, T].
        norms: median over batches, [T].
        turned_degrees: median angle between AGS's gradient and the plain sum's.
        turned_share: share of batches in which it is above `TURNED_DEGREES`.
        ags_scale, pcgrad_scale: median of their gradient's length over the plain sum's.
        static_weights: AGS's mean weights over the batches, [T].
        static_cosine: median cosine between their gradient and AGS's, where AGS turns.
        sum_ms, surgery_ms: forward and backward pass, of the sum and with surgery, medians.
        raised: method -> task -> share of batches in which the optimizer's own step raised that
            task's loss to first order, g_t·Δθ > 0; empty without an optimizer.
    """

    verdict: str
    names: tuple[str, ...]
    batches: int
    gram: Tensor
    conflict_rate: float
    conflict_interval: tuple[float, float]
    cosine: Tensor
    sign_agreement: Tensor
    norms: Tensor
    turned_degrees: float
    turned_share: float
    ags_scale: float
    pcgrad_scale: float
    static_weights: Tensor
    static_cosine: float
    sum_ms: float
    surgery_ms: float
    raised: dict[str, dict[str, float]]

    def __str__(self) -> str:
        """The answer first, then what it rests on."""
        low, high = self.conflict_interval
        norms = self.norms.tolist()
        first, second = _pairs(len(norms))
        worst = int(self.cosine[first, second].argmin())
        pair = int(first[worst]), int(second[worst])
        agreement = float(self.sign_agreement[pair])
        apart = max(norms) / max(min(norms), 1e-300)
        listed = ", ".join(f"{n} {v:.3g}" for n, v in zip(self.names, norms, strict=True))
        lines = [
            self._answer(),
            "",
            f"conflicts      {self.conflict_rate:.0%} of pairs and batches (95% interval {low:.0%} "
            f"to {high:.0%}, {self.batches} batches)",
            f"worst pair     {self.names[pair[0]]}, {self.names[pair[1]]}: mean cosine "
            f"{float(self.cosine[pair]):+.2f}, the same sign in {agreement:.0%} of the batches"
            + ("" if agreement >= SETTLED else ": noise, or not settled"),
            f"norms          {listed} (largest over smallest {apart:.3g})",
            f"AGS            {self.turned_degrees:.1f} degrees from the sum, "
            f"{self.ags_scale:.2f} of its length (PCGrad {self.pcgrad_scale:.2f})",
            f"price          {self.surgery_ms / self.sum_ms:.2f} times the sum's forward and "
            f"backward pass ({self.surgery_ms:.2f} ms, {self.sum_ms:.2f} ms)",
        ]
        for method, shares in self.raised.items():
            listed = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
            lines.append(
                f"step ({method})".ljust(15) + f"raises a task's loss in so many batches: {listed}"
            )
        return "\n".join(lines)

    def _answer(self) -> str:
        rate, share, angle = self.conflict_rate, self.turned_share, self.turned_degrees
        weights = ", ".join(f"{w:.2g}" for w in self.static_weights.tolist())
        turns = f"AGS turns the gradient in {share:.0%} of the batches (median {angle:.0f} degrees)"
        return {
            "no": (
                f"No: the tasks hardly fight. {rate:.0%} of the pairs conflict, and where nothing "
                "conflicts AGS and PCGrad weigh every task 1, the plain sum."
            ),
            "rescale": (
                f"Only the length: {rate:.0%} of the pairs conflict, but AGS's direction is "
                f"{angle:.1f} degrees from the plain sum's. (With two tasks of equal norms it IS "
                f"the plain sum.) PCGrad's gradient has {self.pcgrad_scale:.2f} of the sum's "
                "length: a learning rate does that for free, and Adam mostly divides it out."
            ),
            "static": (
                f"Perhaps not: {turns}, but static task weights of about {weights} turn it "
                f"likewise (cosine {self.static_cosine:.3f}), with one backward pass. Tune those "
                "first, and the plain sum's learning rate."
            ),
            "maybe": (
                f"Maybe: {rate:.0%} of the pairs conflict, and {turns}, as AGS's own mean weights "
                f"do not (cosine {self.static_cosine:.3f}). Whether that helps only a run can "
                "tell: beside the sum with a tuned learning rate, tuned static weights, and the "
                "sum at AGS's length."
            ),
        }[self.verdict]


@torch.enable_grad()
def diagnose(
    model: nn.Module,
    losses_fn: LossesOf,
    batches: Iterable[Any],
    optimizer: torch.optim.Optimizer | None = None,
    *,
    seed: int = 0,
) -> Diagnosis:
    """Measure conflicts, norms, what AGS would change, and what it costs.

    Everything runs on deep copies, so parameters, p.grad, buffers, mode, hooks and the optimizer's
    state stay as they are; the random streams of torch and of Python are put back. What else
    `losses_fn` touches (NumPy's stream, the state of a loss module) is its own affair.

    Args:
        model: as it is in training; measure after some steps, not at the start alone.
        losses_fn: (model, batch) -> the losses, as `backward` takes them. It must use the model
            that it is given.
        batches: some training batches, each used as it comes. Twenty tell more than two.
        optimizer: the training's own (plain, or wrapped): its parameters are looked at, and its
            step is tried on copies. It must step without a closure.
        seed: of the order in which AGS's tasks meet, and of what is random in the forward pass.

    Raises:
        ValueError: no batches, fewer than two losses, other tasks in a later batch, losses that
            share no parameter or reach the original model, gradients that are not finite.

    Source: the facts about AGS are those of SLAM-AGS, arXiv 2511.14639, and PCGrad, 2001.06782; the
    controls are those of Kurin et al., arXiv 2201.04122.

    Example:
        >>> import torch
        >>> from gradsurgery.diagnosis import diagnose
        >>> model = torch.nn.Linear(4, 1)
        >>> def losses(model, x):
        ...     return [model(x).square().mean(), 2 * model(x).square().mean()]
        >>> diagnose(model, losses, torch.ones(8, 32, 4)).verdict
        'no'
    """
    # torch.manual_seed goes to every device.
    on_cuda = any(p.is_cuda for p in model.parameters())
    devices = range(torch.cuda.device_count()) if on_cuda else ()
    stream = random.getstate()
    try:
        with torch.random.fork_rng(devices=list(devices)):
            probe = Probe(model, losses_fn, optimizer, seed)
            for number, batch in enumerate(batches):
                probe.look(number, batch)
            return _conclude(probe, seed)
    finally:
        random.setstate(stream)


def _conclude(probe: Probe, seed: int) -> Diagnosis:
    """What follows from all that was measured."""
    if not probe.grams:
        raise ValueError("batches is empty; diagnose needs at least one batch")
    gram = torch.stack(probe.grams)
    if not gram.any():
        raise ValueError("the losses share no parameter with a gradient: nothing is to weigh")
    order = torch.Generator().manual_seed(seed)
    weights = AGS().weights(gram, generator=order)
    ags = SurgeryReport(probe.names, gram, weights)
    pcgrad = SurgeryReport(probe.names, gram, PCGrad().weights(gram, generator=order))
    first, second = _pairs(len(probe.names))
    rate = float((gram[:, first, second] < 0).double().mean())
    # Where one of two gradients is zero there is no angle, and nothing that has turned.
    angles = ags.cosine_to_sum.nan_to_num(1.0).acos().rad2deg()
    turns = angles > TURNED_DEGREES
    static = weights.mean(0)
    same = _cosine(gram, weights, static.expand_as(weights))[turns]
    likewise = float(same.nanmedian()) if turns.any() else 1.0
    if float(turns.double().mean()) > RARE:
        verdict = "static" if likewise > AS_STATIC else "maybe"
    else:
        verdict = "rescale" if rate > RARE else "no"
    negative = (ags.cosine < 0).double().mean(0)
    return Diagnosis(
        verdict=verdict,
        names=probe.names,
        batches=len(gram),
        gram=gram,
        conflict_rate=rate,
        conflict_interval=_wilson(rate, len(gram)),
        cosine=ags.cosine.mean(0),
        sign_agreement=torch.maximum(negative, 1 - negative),
        norms=ags.norms.median(0).values,
        turned_degrees=float(angles.median()),
        turned_share=float(turns.double().mean()),
        ags_scale=float(ags.scale.nanmedian()),
        pcgrad_scale=float(pcgrad.scale.nanmedian()),
        static_weights=static,
        static_cosine=likewise,
        sum_ms=statistics.median(probe.times_ms["sum"]),
        surgery_ms=statistics.median(probe.times_ms["surgery"][:TRIED]),
        raised={
            method: dict(zip(probe.names, _share_above_zero(effects), strict=True))
            for method, effects in probe.effects.items()
            if effects
        },
    )


def _pairs(tasks: int) -> tuple[Tensor, Tensor]:
    first, second = torch.triu_indices(tasks, tasks, 1)
    return first, second


def _share_above_zero(effects: list[Tensor]) -> list[float]:
    shares: list[float] = (torch.stack(effects) > 0).double().mean(0).tolist()
    return shares


def _cosine(gram: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Between Gᵀw and Gᵀv: [N, T, T], [N, T], [N, T] -> [N]; NaN where either is zero."""

    def product(a: Tensor, b: Tensor) -> Tensor:
        return torch.einsum("ni,nij,nj->n", a, gram, b)

    squares = product(one, one).clamp(min=0).sqrt() * product(other, other).clamp(min=0).sqrt()
    return (product(one, other) / squares).clamp(-1, 1)


def _wilson(rate: float, count: int) -> tuple[float, float]:
    """95% interval of a share, which is never narrower than `count` yes-or-no answers allow."""
    z = 1.96
    middle = rate + z * z / (2 * count)
    margin = z * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    whole = 1 + z * z / count
    return max((middle - margin) / whole, 0.0), min((middle + margin) / whole, 1.0)
