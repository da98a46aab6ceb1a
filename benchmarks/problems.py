"""Three small multi-task problems with an answer that is known: digits, a Pareto front, an ODE."""

from __future__ import annotations

import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

__all__ = ["PROBLEMS", "Digits", "Oscillator", "Pareto", "Problem", "distance_to_front", "front"]


class Problem(ABC):
    """A model, its batches and its metrics; the seed decides the weights and the batches."""

    name: ClassVar[str]
    objectives: ClassVar[tuple[str, ...]]
    metrics: ClassVar[tuple[str, ...]]
    """What `evaluate` gives. The first is the score that settings are tuned by."""
    higher_is_better: ClassVar[bool] = False
    """Whether that holds of the score."""
    optimizer: ClassVar[type[torch.optim.Optimizer]] = torch.optim.Adam
    rates: ClassVar[tuple[float, ...]]
    """The grid of learning rates, the same for every contender."""
    weights: ClassVar[tuple[tuple[float, ...], ...]]
    """The grid of static weights."""
    steps: ClassVar[int]

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = self._make()

    @abstractmethod
    def _make(self) -> nn.Module:
        """The model, drawn from torch's default generator."""

    @abstractmethod
    def losses(self) -> dict[str, Tensor]:
        """Objective -> loss of the next batch."""

    @abstractmethod
    def evaluate(self, split: str) -> dict[str, float]:
        """Metric -> value; `split` is "validation" or "test", for problems that have data."""


# ------------------------------------------------------------------------------------ digits

_IMAGES = {"train": 997, "validation": 300, "test": 500}
_PAIRS = {"validation": 1000, "test": 2000}
_DOWN, _ACROSS = 2, 4


@functools.cache
def _images() -> dict[str, tuple[Tensor, Tensor]]:
    """split -> images [n, 8, 8] with values 0 to 1, and classes [n]; no image is in two splits."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32) / 16
    classes = torch.tensor(data.target, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    parts = torch.split(order, list(_IMAGES.values()))
    return {name: (images[i], classes[i]) for name, i in zip(_IMAGES, parts, strict=True)}


def _overlay(split: str, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pairs of digits on one canvas: pixels [count, 10 * 12], classes [2, count]."""
    images, classes = _images()[split]
    chosen = torch.randint(len(images), (2, count), generator=generator)
    left = pad(images[chosen[0]], (0, _ACROSS, 0, _DOWN))
    right = pad(images[chosen[1]], (_ACROSS, 0, _DOWN, 0))
    return torch.maximum(left, right).flatten(1), classes[chosen]


@functools.cache
def _pairs(split: str) -> tuple[Tensor, Tensor]:
    """The same pairs for everyone."""
    return _overlay(split, _PAIRS[split], torch.Generator().manual_seed(1))


class Digits(Problem):
    """Two handwritten digits of 8x8 pixels, half over each other: which are they?

    As MultiMNIST (Sabour et al., arXiv 1710.09829; as two tasks in Sener and Koltun, arXiv
    1810.04650), of the digits that come with scikit-learn.
    """

    name = "digits"
    objectives = ("left", "right")
    metrics = ("accuracy", "accuracy_left", "accuracy_right")
    higher_is_better = True
    rates = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    weights = ((1.0, 4.0), (1.0, 2.0), (1.0, 1.0), (2.0, 1.0), (4.0, 1.0))
    steps = 400

    def _make(self) -> nn.Module:
        pixels = (8 + _DOWN) * (8 + _ACROSS)
        self.trunk = nn.Sequential(nn.Linear(pixels, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(32, 10) for _ in self.objectives)
        return nn.ModuleList([self.trunk, self.heads])

    def losses(self) -> dict[str, Tensor]:
        """Cross-entropy of each digit, over 64 new pairs of training images."""
        pixels, classes = _overlay("train", 64, self.generator)
        features = self.trunk(pixels)
        return {
            name: cross_entropy(head(features), own)
            for name, head, own in zip(self.objectives, self.heads, classes, strict=True)
        }

    @torch.no_grad()
    def evaluate(self, split: str) -> dict[str, float]:
        """Share of digits that are recognised: of both, and of each."""
        pixels, classes = _pairs(split)
        features = self.trunk(pixels)
        left, right = (
            (head(features).argmax(-1) == own).double().mean().item()
            for head, own in zip(self.heads, classes, strict=True)
        )
        return dict(zip(self.metrics, ((left + right) / 2, left, right), strict=True))


# ------------------------------------------------------------------------------------ pareto

_WIDTH, _SAMPLES, _BATCH = 20, 256, 32
_TARGET_SCALE = 3.0


@functools.cache
def _regressions() -> tuple[Tensor, Tensor]:
    """Inputs [2, n, d] and targets [2, n], float64: the same at every seed.

    Each task has its own inputs, so the trade-off is a curve; curvatures span 1 to 100.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, _SAMPLES, _WIDTH, generator=generator, dtype=torch.float64)
    scales = torch.logspace(0, -1, _WIDTH, dtype=torch.float64)
    order = torch.randperm(_WIDTH, generator=generator)
    inputs *= torch.stack([scales, scales[order]])[:, None]
    truth = torch.randn(2, _WIDTH, 1, generator=generator, dtype=torch.float64)
    truth[1] *= _TARGET_SCALE
    noise = torch.randn(2, _SAMPLES, generator=generator, dtype=torch.float64)
    return inputs, (inputs @ truth).squeeze(-1) + 0.1 * noise


def _mean_squares(x: Tensor) -> Tensor:
    """Both losses over all samples: [..., d] -> [..., 2], float64."""
    inputs, targets = _regressions()
    return (torch.einsum("tnd,...d->...tn", inputs, x) - targets).square().mean(-1)


def _optima(share: Tensor) -> Tensor:
    """argmin of share · L_1 + (1 - share) · L_2: [k] -> [k, d], by the normal equations."""
    inputs, targets = _regressions()
    both = torch.stack([share, 1 - share], -1)
    curvature = torch.einsum("kt,tde->kde", both, inputs.mT @ inputs)
    pull = both @ torch.einsum("tnd,tn->td", inputs, targets)
    optima: Tensor = torch.linalg.solve(curvature, pull)
    return optima


@functools.cache
def _corners() -> tuple[Tensor, Tensor]:
    """Each loss at its own optimum, and at the other task's: [2], [2]."""
    ends = _mean_squares(_optima(torch.tensor([1.0, 0.0], dtype=torch.float64)))
    return ends.diagonal(), ends.flip(0).diagonal()


def _normalized(losses: Tensor) -> Tensor:
    """0 at the task's own optimum, 1 at the other task's."""
    best, worst = _corners()
    return (losses - best) / (worst - best)


@functools.cache
def front(points: int = 4001) -> Tensor:
    """The Pareto front of `Pareto`, [points, 2] normalized losses from (0, 1) to (1, 0).

    Both losses are strictly convex, so x is Pareto optimal just where it minimizes
    s L_1 + (1 - s) L_2 for an s in [0, 1]: a linear system for each s.
    """
    logits = torch.linspace(-12, 12, points - 2, dtype=torch.float64)
    share = torch.cat([logits.new_zeros(1), logits.sigmoid(), logits.new_ones(1)]).flip(0)
    return _normalized(_mean_squares(_optima(share)))


def distance_to_front(losses: Tensor) -> float:
    """Euclidean distance of normalized losses [2] to the polygon through `front`."""
    start, end = front()[:-1], front()[1:]
    along = end - start
    place = ((losses - start) * along).sum(-1) / along.square().sum(-1)
    nearest = start + place.clamp(0, 1)[:, None] * along
    return float((losses - nearest).norm(dim=-1).min())


class Pareto(Problem):
    """Two linear regressions, each on its own data, that share one weight vector.

    The losses are normalized: 0 at the task's own optimum, 1 at the other task's. Trained by plain
    SGD, where the length of a gradient counts; Adam takes most of it away.
    """

    name = "pareto"
    objectives = ("first", "second")
    metrics = ("distance", "loss_first", "loss_second")
    optimizer = torch.optim.SGD
    rates = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
    weights = ((1.0, 9.0), (1.0, 3.0), (1.0, 1.0), (3.0, 1.0), (9.0, 1.0))
    steps = 400

    def _make(self) -> nn.Module:
        inputs, targets = _regressions()
        self.inputs, self.targets = inputs.float(), targets.float()
        return nn.Linear(_WIDTH, 1, bias=False)

    def losses(self) -> dict[str, Tensor]:
        """Mean squared error of each task, over 32 of its samples."""
        chosen = torch.randint(_SAMPLES, (2, _BATCH), generator=self.generator)
        return {
            name: (self.model(x[i]).squeeze(-1) - y[i]).square().mean()
            for name, x, y, i in zip(
                self.objectives, self.inputs, self.targets, chosen, strict=True
            )
        }

    @torch.no_grad()
    def evaluate(self, split: str) -> dict[str, float]:
        """Distance to the front, and the place; both splits are the one closed form."""
        place = _normalized(_mean_squares(next(self.model.parameters())[0].double()))
        return dict(zip(self.metrics, (distance_to_front(place), *place.tolist()), strict=True))


# ----------------------------------------------------------------------------------- physics

_DAMPING, _FREQUENCY, _POINTS = 2.0, 10.0, 64


def _displacement(t: Tensor) -> Tensor:
    """The exact solution at times [n]."""
    frequency = math.sqrt(_FREQUENCY**2 - _DAMPING**2)
    swing = (frequency * t).cos() + _DAMPING / frequency * (frequency * t).sin()
    return (-_DAMPING * t).exp() * swing


class Oscillator(Problem):
    """A network that is to solve u'' + 2δu' + ω²u = 0, u(0) = 1, u'(0) = 0 on [0, 1].

    A physics-informed network (Raissi et al., arXiv 1711.10561); δ = 2, ω = 10. The residual's
    gradient is thousands of times as long as the others', and u = 0 solves it alone.
    """

    name = "physics"
    objectives = ("residual", "position", "velocity")
    metrics = ("relative_error", "residual", "position", "velocity")
    rates = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    weights = tuple(
        (1.0, *both) for both in itertools.product((1.0, 1e2, 1e4, 1e6), (1.0, 1e2, 1e4))
    )
    steps = 500

    def _make(self) -> nn.Module:
        return nn.ModuleList([nn.Linear(1, 32), nn.Linear(32, 32), nn.Linear(32, 1)])

    def jet(self, t: Tensor) -> Tensor:
        """u, u' and u'' at times [n]: [3, n], carried through the layers by the chain rule."""
        x = torch.stack([t, torch.ones_like(t), torch.zeros_like(t)])[..., None]
        layers = list(self._layers())
        for layer in layers[:-1]:
            value, first, second = (x @ layer.weight.T).unbind()
            value = (value + layer.bias).tanh()
            slope = 1 - value.square()
            x = torch.stack(
                [value, slope * first, slope * (second - 2 * value * first.square())],
            )
        value, first, second = (x @ layers[-1].weight.T).squeeze(-1).unbind()
        return torch.stack([value + layers[-1].bias, first, second])

    def _layers(self) -> Iterator[nn.Linear]:
        for layer in self.model.children():
            assert isinstance(layer, nn.Linear)
            yield layer

    def _losses_at(self, inner: Tensor) -> dict[str, Tensor]:
        jet = self.jet(torch.cat([inner.new_zeros(1), inner]))
        value, first, second = jet[:, 1:]
        residual = second + 2 * _DAMPING * first + _FREQUENCY**2 * value
        squares = residual.square().mean(), (jet[0, 0] - 1).square(), jet[1, 0].square()
        return dict(zip(self.objectives, squares, strict=True))

    def losses(self) -> dict[str, Tensor]:
        """The equation's residual at 64 random times, and both initial conditions."""
        return self._losses_at(torch.rand(_POINTS, generator=self.generator))

    @torch.no_grad()
    def evaluate(self, split: str) -> dict[str, float]:
        """Relative L2 error against the exact solution, and the losses, on an even grid."""
        t = torch.linspace(0, 1, 501)
        exact = _displacement(t)
        error = ((self.jet(t)[0] - exact).norm() / exact.norm()).item()
        losses = {name: loss.item() for name, loss in self._losses_at(t).items()}
        return {"relative_error": error, **losses}


PROBLEMS: dict[str, type[Problem]] = {each.name: each for each in (Digits, Pareto, Oscillator)}
