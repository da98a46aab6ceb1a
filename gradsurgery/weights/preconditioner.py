"""The wrapped optimizer's own geometry: what its step multiplies each coordinate by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradsurgery.gradients.layout import Layout, local_part

__all__ = ["check_metric", "root_preconditioner"]

_DOUBLE = (torch.float64, torch.complex128)
_State = dict[str, Any]
_Group = dict[str, Any]


def _adam(views: list[Tensor], states: list[_State], group: _Group) -> None:
    """sqrt(v / (1 - β₂^t)) + eps."""
    name = "max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"
    _take(views, states, name)
    _divide(views, _correction(states, group))
    torch._foreach_sqrt_(views)
    torch._foreach_add_(views, group["eps"])


def _radam(views: list[Tensor], states: list[_State], group: _Group) -> None:
    """As Adam (the rectification is a common factor); 1 while it takes no account of v."""
    _adam(views, states, group)
    step, beta2 = torch.as_tensor(states[0]["step"], dtype=torch.float64), group["betas"][1]
    most = 2 / (1 - beta2) - 1
    known = most - 2 * step * beta2**step / (1 - beta2**step) > 5.0
    torch._foreach_sub_(views, 1.0)
    torch._foreach_mul_(views, known.to(views[0].device, views[0].dtype, non_blocking=True))
    torch._foreach_add_(views, 1.0)


def _adamax(views: list[Tensor], states: list[_State], group: _Group) -> None:
    """The running maximum, which has eps in it."""
    _take(views, states, "exp_inf")


def _rmsprop(views: list[Tensor], states: list[_State], group: _Group) -> None:
    """sqrt(v) + eps; of a centered one v less the squared mean."""
    _take(views, states, "square_avg")
    if group.get("centered"):
        means = [local_part(state["grad_avg"]) for state in states]
        torch._foreach_sub_(views, torch._foreach_mul(means, means))
        torch._foreach_clamp_min_(views, 0.0)
    torch._foreach_sqrt_(views)
    torch._foreach_add_(views, group["eps"])


def _adagrad(views: list[Tensor], states: list[_State], group: _Group) -> None:
    """sqrt(sum) + eps."""
    _take(views, states, "sum")
    torch._foreach_sqrt_(views)
    torch._foreach_add_(views, group["eps"])


def _take(views: list[Tensor], states: list[_State], name: str) -> None:
    torch._foreach_copy_(views, [_real(local_part(state[name])) for state in states])


def _divide(views: list[Tensor], by: Tensor) -> None:
    torch._foreach_div_(views, by.to(views[0].device, views[0].dtype, non_blocking=True))


def _by_age(states: list[_State]) -> list[list[int]]:
    """Which parameters have made the same number of steps: one that got no gradient made fewer.

    Step counters on the host are read; those on a device, which nobody may wait for, are taken one
    by one.
    """
    steps = [torch.as_tensor(state.get("step", 0.0), dtype=torch.float32) for state in states]
    if any(step.device.type != "cpu" for step in steps):
        return [[i] for i in range(len(steps))]
    found: dict[float, list[int]] = {}
    for i, step in enumerate(torch.stack(steps).tolist() if steps else ()):
        found.setdefault(step, []).append(i)
    return list(found.values())


def _correction(states: list[_State], group: _Group) -> Tensor:
    """1 - β₂^t, where all parameters have made as many steps."""
    correction: Tensor = 1 - group["betas"][1] ** torch.as_tensor(
        states[0]["step"], dtype=torch.float64
    )
    return correction


# Fills views with the denominators of the step, in place. In the order in which they are looked up.
_DENOMINATORS: tuple[tuple[type[Optimizer], Callable[..., None], str], ...] = (
    (torch.optim.RAdam, _radam, "exp_avg_sq"),
    (torch.optim.Adamax, _adamax, "exp_inf"),
    (torch.optim.Adam, _adam, "exp_avg_sq"),
    (torch.optim.AdamW, _adam, "exp_avg_sq"),
    (torch.optim.NAdam, _adam, "exp_avg_sq"),
    (torch.optim.RMSprop, _rmsprop, "square_avg"),
    (torch.optim.Adagrad, _adagrad, "sum"),
)


def check_metric(optimizer: Optimizer) -> None:
    """Raise ValueError where the optimizer's geometry is not known."""
    known = [kind for kind, _, _ in _DENOMINATORS] + [torch.optim.SGD]
    if not isinstance(optimizer, tuple(known)):
        names = sorted(kind.__name__ for kind in known)
        raise ValueError(
            f"metric='optimizer' does not know the geometry of {type(optimizer).__name__}: it has "
            f"no second-moment estimate for each coordinate; known are {', '.join(names)}"
        )


def root_preconditioner(
    optimizer: Optimizer, layout: Layout, chosen: Sequence[bool]
) -> list[Tensor] | None:
    """For each buffer sqrt(lr / denominator), one number per real column; None: all are equal.

    M with these factors is Σ_d g_id g_jd h_d, h what the step multiplies coordinate d by, up to a
    common factor. The second moments are those before this step takes the new gradient in. A
    parameter without any yet counts with h = lr, and where no parameter has one there is nothing
    to weigh.
    """
    rule = next((r for r in _DENOMINATORS if isinstance(optimizer, r[0])), None)
    rates = [group["lr"] for group in optimizer.param_groups]
    moments = rule is not None and any(
        rule[2] in optimizer.state.get(p, {}) for p in layout.parameters
    )
    if not moments and all(rate is rates[0] or _equal(rate, rates[0]) for rate in rates):
        return None
    flats = [
        torch.ones(
            width * (2 if dtype.is_complex else 1),
            dtype=torch.float64 if dtype in _DOUBLE else torch.float32,
            device=device,
        )
        for width, (dtype, device) in zip(layout.widths, layout.kinds, strict=True)
    ]
    place = {id(p): i for i, p in enumerate(layout.parameters) if chosen[i]}
    every = [torch.as_tensor(rate, dtype=torch.float64) for rate in rates]
    together = torch.stack([rate.to(every[0].device, non_blocking=True) for rate in every])
    largest = together.amax()
    shares = torch.where(largest > 0, together / largest, 1.0)
    for number, group in enumerate(optimizer.param_groups):
        own = [p for p in group["params"] if id(p) in place and local_part(p).numel()]
        for device in dict.fromkeys(local_part(p).device for p in own):
            here = [p for p in own if local_part(p).device == device]
            views = [layout.view_as_real(flats, place[id(p)]) for p in here]
            with_state = [
                (view, optimizer.state[p])
                for view, p in zip(views, here, strict=True)
                if rule is not None and rule[2] in optimizer.state.get(p, {})
            ]
            for alike in _by_age([state for _, state in with_state]):
                assert rule is not None
                some = [with_state[i] for i in alike]
                rule[1]([view for view, _ in some], [state for _, state in some], group)
            _divide(views, shares[number])
    for flat in flats:
        flat.rsqrt_()
    return flats


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _equal(one: object, other: object) -> bool:
    numbers = isinstance(one, int | float) and isinstance(other, int | float)
    return numbers and one == other
