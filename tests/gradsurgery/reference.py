"""The definition in float64 and plain loops, independent of the library that it judges."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Gradients = list[list["Tensor | None"]]
"""[task][parameter]: the gradient in float64 (complex128), or None where autograd gives none."""
Orders = list[list[int]]
"""[i]: the order in which task i meets the tasks; i itself is left out on the way."""

# The share of trace(M) under which a squared length counts as rounding noise; see `ags`.
CANCELLED = 1e-7


def task_gradients(losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> Gradients:
    """One row of gradients for each loss; the graph stays, and p.grad is left alone."""
    rows: Gradients = []
    for loss in losses:
        if parameters:
            found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        else:
            found = ()
        rows.append([None if g is None else widen(g) for g in found])
    return rows


def widen(tensor: Tensor) -> Tensor:
    """A dense copy in float64, or complex128."""
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    return tensor.detach().to_dense().to(wide, copy=True)


def add_gradients(earlier: Gradients, later: Gradients) -> Gradients:
    """Micro-batches: gradients of the same tasks and parameters add up, None counts as nothing."""
    return [
        [add(a, b) for a, b in zip(row_a, row_b, strict=True)]
        for row_a, row_b in zip(earlier, later, strict=True)
    ]


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum of what is there."""
    if a is None or b is None:
        return b if a is None else a
    return a + b


def reached_by(gradients: Gradients) -> list[set[int]]:
    """For each parameter the tasks that give it a gradient."""
    count = len(gradients[0])
    return [{t for t, row in enumerate(gradients) if row[i] is not None} for i in range(count)]


def flatten(parts: Iterable[tuple[Tensor | None, Tensor]]) -> Tensor:
    """(gradient, something of its shape) pairs -> one float64 vector; None counts as zeros."""
    pieces = [torch.zeros(0, dtype=torch.float64)]
    for gradient, like in parts:
        dense = torch.zeros_like(widen(like)) if gradient is None else gradient
        vector = dense.resolve_conj().reshape(-1)
        pieces.append(torch.view_as_real(vector).reshape(-1) if vector.is_complex() else vector)
    return torch.cat(pieces)


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `flatten`: real and imaginary parts go back into one complex tensor."""
    parts: list[Tensor] = []
    start = 0
    for tensor in like:
        length = tensor.numel() * (2 if tensor.is_complex() else 1)
        piece = vector[start : start + length]
        start += length
        if tensor.is_complex():
            piece = torch.complex(piece[0::2], piece[1::2])
        parts.append(piece.reshape(tensor.shape))
    return parts


# ------------------------------------------------------------------------------------ methods


def plain_sum(vectors: list[Tensor], orders: Orders) -> Tensor:
    """g = Σ_t g_t."""
    total = torch.zeros_like(vectors[0])
    for vector in vectors:
        total = total + vector
    return total


def mean(vectors: list[Tensor], orders: Orders) -> Tensor:
    """g = Σ_t g_t / T."""
    return plain_sum(vectors, orders) / len(vectors)


def pcgrad(vectors: list[Tensor], orders: Orders) -> Tensor:
    """arXiv 2001.06782, algorithm 1: take from each task what opposes another, then add up."""
    total = torch.zeros_like(vectors[0])
    for i, original in enumerate(vectors):
        altered = original.clone()
        for j in orders[i]:
            square = float(vectors[j] @ vectors[j])
            if j == i or square == 0:
                continue
            dot = float(altered @ vectors[j])
            if dot < 0:
                altered = altered - dot / square * vectors[j]
        total = total + altered
    return total


def ags(vectors: list[Tensor], orders: Orders) -> Tensor:
    """PCGrad, rescaled to the length of the plain sum; not where only rounding noise is left."""
    combined = pcgrad(vectors, orders)
    before = float(plain_sum(vectors, orders).norm())
    after = float(combined.norm())
    trace = sum(float(vector @ vector) for vector in vectors)
    if after**2 <= CANCELLED * trace:
        return combined
    return combined * (before / after)


@dataclass
class GradVac:
    """arXiv 2010.05874, algorithm 1, with a running target cosine for each ordered pair."""

    beta: float = 1e-2
    target: list[list[float]] = field(default_factory=list)

    def __call__(self, vectors: list[Tensor], orders: Orders) -> Tensor:
        """One step: the altered gradients' sum, and the targets moved."""
        count = len(vectors)
        if not self.target:
            self.target = [[0.0] * count for _ in range(count)]
        total = torch.zeros_like(vectors[0])
        for i, original in enumerate(vectors):
            altered = original.clone()
            for j in orders[i]:
                length, other = float(altered.norm()), float(vectors[j].norm())
                if j == i or length == 0 or other == 0:
                    continue
                cosine = max(-1.0, min(1.0, float(altered @ vectors[j]) / (length * other)))
                wanted = self.target[i][j]
                if cosine < wanted:
                    sine = math.sqrt(1 - wanted**2)
                    pull = wanted * math.sqrt(1 - cosine**2) - cosine * sine
                    altered = altered + length * pull / (other * sine) * vectors[j]
                self.target[i][j] = (1 - self.beta) * wanted + self.beta * cosine
            total = total + altered
        return total


Method = Callable[[list[Tensor], Orders], Tensor]
METHODS: dict[str, Method] = {"sum": plain_sum, "mean": mean, "pcgrad": pcgrad, "ags": ags}


def draw_orders(generator: torch.Generator, count: int, *, shared: bool) -> Orders:
    """Random orders: one for every task (AGS) or a fresh one each; none drawn where T <= 2."""
    if count <= 2:
        return [list(range(count)) for _ in range(count)]
    rows = 1 if shared else count
    noise = torch.rand(rows, count, generator=generator, dtype=torch.float64)
    drawn = noise.argsort(dim=-1).tolist()
    return drawn * count if shared else drawn


# -------------------------------------------------------------------------------- whole answer


@dataclass
class Surgery:
    """What p.grad should become, and the lengths that tell how much rounding may matter."""

    gradients: list[Tensor | None]
    operated: list[bool]
    """Whether the parameter was under surgery; a head is not."""
    lengths: list[float]
    """‖g_t‖ over the parameters under surgery."""
    before: float
    """‖Σ_t g_t‖ over them."""
    after: float
    """‖g‖ over them, and for AGS that before the rescale."""


def surgery(
    gradients: Gradients,
    parameters: Sequence[Tensor],
    method: Method,
    *,
    scope: str,
    orders: Orders,
) -> Surgery:
    """The definition: surgery where it applies, plain gradients for heads, None elsewhere."""
    reach = reached_by(gradients)
    least = 2 if scope == "shared" else 1
    chosen = [i for i, tasks in enumerate(reach) if len(tasks) >= least]
    like = [parameters[i] for i in chosen]
    vectors = [flatten((row[i], parameters[i]) for i in chosen) for row in gradients]
    combined = method(vectors, orders)
    after = pcgrad(vectors, orders) if method is ags else combined
    result: list[Tensor | None] = [None] * len(parameters)
    for i, part in zip(chosen, unflatten(combined, like), strict=True):
        result[i] = part
    for i, tasks in enumerate(reach):
        if i not in chosen and tasks:
            (only,) = tasks
            result[i] = gradients[only][i]
    return Surgery(
        gradients=result,
        operated=[len(tasks) >= least for tasks in reach],
        lengths=[float(vector.norm()) for vector in vectors],
        before=float(plain_sum(vectors, orders).norm()),
        after=float(after.norm()),
    )


def published_ags_loop(
    parameters: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    losses_at: Callable[[int], Sequence[Tensor]],
    steps: int,
    *,
    rescale: bool = True,
) -> None:
    """The published training loop for two tasks, written plainly; `rescale=False` is PCGrad."""
    for step in range(steps):
        flat: list[Tensor] = []
        for loss in losses_at(step):
            optimizer.zero_grad()
            loss.backward(retain_graph=True)
            flat.append(flatten((None if p.grad is None else widen(p.grad), p) for p in parameters))
        first, second = flat
        total = first + second
        dot = float(first @ second)
        if dot < 0:
            altered_first = first - dot / float(second @ second) * second
            altered_second = second - dot / float(first @ first) * first
            combined = altered_first + altered_second
        else:
            combined = total
        if rescale:
            combined = combined * (total.norm() / combined.norm())
        for p, part in zip(parameters, unflatten(combined, parameters), strict=True):
            p.grad = part.to(p.dtype)
        optimizer.step()
