"""The optimizer contract: a roster of optimizers and methods, and what each of them must do."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import gradsurgery
from gradsurgery import AdaptiveGradientSurgery

__all__ = [
    "CASES",
    "MEASURING",
    "OPTIMIZERS",
    "VARIANTS",
    "Case",
    "Net",
    "Reference",
    "assert_same",
    "batch",
    "pair",
    "train",
]

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    name: kind
    for name, kind in sorted(vars(torch.optim).items())
    if inspect.isclass(kind)
    and issubclass(kind, torch.optim.Optimizer)
    and kind is not torch.optim.Optimizer
}

# Takes sparse gradients only, which surgery refuses: it has a test of its own.
_SPARSE_ONLY = {"SparseAdam"}
# Takes matrices only.
_MATRICES_ONLY = {"Muon"}
# Steps over the first group only, and calls the closure by itself as often as it likes.
_ONE_GROUP = {"LBFGS"}
# Flattens gradients with .view(-1), which torch refuses for channels_last, with or without us.
_CONTIGUOUS_ONLY = {"LBFGS"}
# Keeps its parameters in an attribute that its own pickling leaves out.
_COPIES_CANNOT_STEP = {"LBFGS"}

# Every option is tried where the optimizer's signature has it.
_OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"foreach": True},
    {"foreach": False},
    {"fused": True},
    {"capturable": True},
    {"tensor_lr": True},
    {"tensor_lr": True, "fused": True},
    {"maximize": True},
    {"weight_decay": 0.1},
    {"maximize": True, "weight_decay": 0.1},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True, "fused": True},
    {"amsgrad": True},
    {"amsgrad": True, "fused": True},
    {"centered": True},
    {"line_search_fn": "strong_wolfe"},
)


MEASURING = tuple(
    name
    for name in gradsurgery.methods.available()
    if not gradsurgery.methods.resolve(name).known_beforehand
)
"""The methods that look at gradients: a backward pass for each task."""


class Net(nn.Module):
    """A trunk and three heads whose losses conflict; a convolution in channels_last, if wanted."""

    def __init__(self, *, matrices_only: bool = False, contiguous: bool = False) -> None:
        super().__init__()
        self.conv = None if matrices_only else nn.Conv2d(2, 3, 2)
        if self.conv is not None and not contiguous:
            self.conv.to(memory_format=torch.channels_last)
        self.trunk = nn.Linear(12 if self.conv else 18, 5, bias=not matrices_only)
        self.heads = nn.ModuleList(nn.Linear(5, 2, bias=not matrices_only) for _ in range(3))

    def forward(self, images: Tensor) -> list[Tensor]:
        """[N, 2, 3, 3] -> one [N, 2] per head."""
        features = images if self.conv is None else self.conv(images)
        shared = torch.tanh(self.trunk(features.flatten(1)))
        return [head(shared) for head in self.heads]

    def losses(self, images: Tensor) -> dict[str, Tensor]:
        """Three tasks that pull the trunk in different directions, with very different lengths."""
        a, b, c = self(images)
        return {
            "near": (a - 1).square().mean(),
            "far": (a + 2).square().mean() * 0.3 + b.square().mean(),
            "odd": (b - c + 1).square().mean() * 3,
        }


def batch(index: int) -> Tensor:
    """The images of one step; the same for the same index."""
    generator = torch.Generator().manual_seed(1000 + index)
    return torch.randn(6, 2, 3, 3, generator=generator)


@dataclass(frozen=True)
class Case:
    """One optimizer with options, and one method."""

    optimizer: str
    options: tuple[tuple[str, Any], ...] = ()
    method: str = "ags"

    def __str__(self) -> str:
        """What pytest shows."""
        options = ",".join(f"{key}={value}" for key, value in self.options)
        return f"{self.optimizer}({options})-{self.method}"

    @property
    def one_group(self) -> bool:
        """Whether the optimizer refuses a second group of parameters."""
        return self.optimizer in _ONE_GROUP

    @property
    def copies_step(self) -> bool:
        """Whether torch's own copies of this optimizer can go on."""
        return self.optimizer not in _COPIES_CANNOT_STEP

    def model(self) -> Net:
        """The model that this optimizer can train; always with the same weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            return Net(
                matrices_only=self.optimizer in _MATRICES_ONLY,
                contiguous=self.optimizer in _CONTIGUOUS_ONLY,
            )

    def base(self, parameters: Iterable[Any]) -> torch.optim.Optimizer:
        """The plain optimizer."""
        options: dict[str, Any] = dict(self.options)
        rate: Any = 0.01
        if options.pop("tensor_lr", False):
            rate = torch.tensor(rate)
        if self.optimizer == "LBFGS":
            options |= {"max_iter": 3, "history_size": 3}
        return OPTIMIZERS[self.optimizer](parameters, lr=rate, **options)

    def plugin(self, model: nn.Module, *, seed: int = 0) -> AdaptiveGradientSurgery:
        """The plugin around the plain optimizer."""
        return AdaptiveGradientSurgery(self.base(model.parameters()), method=self.method, seed=seed)


def pair(case: Case, *, seed: int = 0) -> tuple[Net, AdaptiveGradientSurgery]:
    """A model and its plugin."""
    model = case.model()
    return model, case.plugin(model, seed=seed)


class Reference:
    """The plain optimizer on the same gradients: surgery by a plugin whose step is never used.

    The gradients are cloned, so that the plain optimizer sees memory of its own.
    """

    def __init__(self, case: Case, *, model: Net | None = None, seed: int = 0) -> None:
        self.model = case.model() if model is None else model
        self.optimizer = case.base(self.model.parameters())
        idle = torch.optim.SGD(self.model.parameters(), lr=1.0)
        self._source = AdaptiveGradientSurgery(idle, method=case.method, seed=seed)

    def zero_grad(self) -> None:
        """As of any optimizer."""
        self._source.zero_grad()

    def backward(self, losses: Mapping[str, Tensor]) -> None:
        """Surgery into gradients of the usual kind."""
        self._source.backward(losses)
        for p in self.model.parameters():
            p.grad = None if p.grad is None else p.grad.clone()

    def step(self, closure: Callable[[], Any]) -> Any:
        """The plain step."""
        return self.optimizer.step(closure)


def train(model: Net, optimizer: Any, steps: range) -> list[float]:
    """Train with a closure, which every optimizer takes; returns what `step` returned."""
    returned = []
    for index in steps:

        def closure(index: int = index) -> Tensor:
            optimizer.zero_grad()
            losses = model.losses(batch(index))
            optimizer.backward(losses)
            return torch.stack(list(losses.values())).sum().detach()

        returned.append(float(optimizer.step(closure)))
    return returned


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """Equal to the bit, however deep."""
    if isinstance(expected, Tensor):
        assert isinstance(found, Tensor), where
        assert found.dtype == expected.dtype, where
        assert found.shape == expected.shape, where
        assert torch.equal(found, expected), f"{where}: {found} is not {expected}"
    elif isinstance(expected, Mapping):
        assert list(found) == list(expected), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}[{key!r}]")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{where}[{index}]")
    else:
        assert found == expected, f"{where}: {found!r} is not {expected!r}"


def _works_here(case: Case) -> bool:
    """Whether the plain optimizer takes these options at all on this machine's CPU."""
    known = inspect.signature(OPTIMIZERS[case.optimizer]).parameters
    if not case.options:
        return True
    if any(key not in known for key, _ in case.options if key != "tensor_lr"):
        return False
    model = case.model()
    try:
        optimizer = case.base(model.parameters())
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step(lambda: torch.ones(()))
    except (RuntimeError, ValueError, AssertionError):
        # "capturable" needs an accelerator, and some have no fused form on the CPU.
        return False
    return True


def _variants() -> Iterator[Case]:
    for name in OPTIMIZERS:
        if name in _SPARSE_ONLY:
            continue
        for options in _OPTIONS:
            case = Case(name, tuple(options.items()))
            if _works_here(case):
                yield case


VARIANTS: tuple[Case, ...] = tuple(_variants())
"""Every optimizer with every option that the CPU supports, under the default method."""


def _others() -> Iterator[Case]:
    """Every other method with two optimizers, and every optimizer with some other methods.

    What a method does is not the optimizer's business: all pairs would say little more.
    """
    optimizers = sorted({case.optimizer for case in VARIANTS})
    methods = [name for name in gradsurgery.methods.available() if name != "ags"]
    for index, method in enumerate(methods):
        for number in dict.fromkeys((index, index + len(optimizers) // 2)):
            yield Case(optimizers[number % len(optimizers)], (), method)
    for index, optimizer in enumerate(optimizers):
        yield Case(optimizer, (), methods[index % len(methods)])


CASES: tuple[Case, ...] = tuple(dict.fromkeys([*VARIANTS, *_others()]))
"""And the other methods."""
