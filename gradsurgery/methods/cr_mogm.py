"""CR-MOGM: a moving average over the weights of another method."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradsurgery.methods._base import Method, check_number
from gradsurgery.methods._running import extended, narrowed, put_back
from gradsurgery.methods._wrapping import Wrapping

__all__ = ["CRMOGM"]


class CRMOGM(Wrapping):
    """λ_k = α λ_{k-1} + (1 - α) λ̂_k, with λ̂_k the other method's weights and λ_1 = λ̂_1.

    Weights that follow one mini-batch correlate with its noise, which biases the direction; their
    mean over many does not. The paper lets α grow from 0 towards 1 as the learning rate η falls
    (corollary 1): set `method.alpha = 1 - η / η_1` where a schedule sets η.

    Args:
        method: a name out of `available()`, or an instance.
        alpha: α, the weight of the past. The default is the usual one of a moving average.

    Raises:
        TypeError, ValueError: `alpha` is not in [0, 1); the number of tasks changes.

    Source: Zhou et al., "On the Convergence of Stochastic Multi-Objective Gradient Manipulation and
    Beyond", NeurIPS 2022, algorithm 1. The paper tries it around MGDA, PCGrad and CAGrad; of them
    the first is taken by default.

    Example:
        >>> import torch
        >>> method = CRMOGM("pcgrad", alpha=0.5)
        >>> first = method.weights(torch.eye(2))
        >>> method.weights(torch.tensor([[1.0, -1.0], [-1.0, 4.0]]))
        tensor([1.5000, 1.1250], dtype=torch.float64)
    """

    name: ClassVar[str] = "cr_mogm"

    def __init__(self, method: str | Method = "mgda", alpha: float = 0.9) -> None:
        check_number("alpha", alpha)
        if not 0 <= alpha < 1:
            raise ValueError(f"alpha must be in [0, 1); got {alpha!r}")
        super().__init__(method)
        self.alpha = alpha
        self.reads_gram = self.method.reads_gram
        self.reads_losses = self.method.reads_losses
        self.known_beforehand = self.method.known_beforehand
        self._average: Tensor | None = None

    @contextmanager
    def only(self, present: Sequence[int], total: int) -> Iterator[None]:
        held = self._average
        whole = None if held is None else extended(held, 1, total, math.nan)
        self._average = None if whole is None else narrowed(whole, 1, present)
        try:
            with super().only(present, total):
                yield
            if whole is None and self._average is not None:
                shape = (*self._average.shape[:-1], total)
                whole = self._average.new_full(shape, math.nan)
            if whole is not None and self._average is not None:
                put_back(whole, self._average, 1, present)
            self._average = whole
        except BaseException:
            self._average = held
            raise

    def check(self, shape: torch.Size, *, grow: bool = False) -> None:
        super().check(shape, grow=grow)
        known = None if self._average is None else self._average.shape
        more = grow and known is not None and known[:-1] == shape[:-1] and known < shape
        if self._average is not None and known != shape and not more:
            raise ValueError(
                f"CRMOGM keeps running weights: it has seen tasks of shape "
                f"{list(self._average.shape)} and now gets {list(shape)}; use a new CRMOGM() where "
                "the number of tasks changes"
            )

    def solve(
        self,
        gram: Tensor,
        losses: Tensor | None,
        generator: torch.Generator | None,
        relative_error: float,
    ) -> Tensor:
        new = self.method.solve(gram, losses, generator, relative_error)
        if self._average is None:
            self._average = torch.full_like(new, torch.nan)
        average = self._average = self._average.to(new.device, non_blocking=True)
        mixed = torch.where(average.isnan(), new, average * self.alpha + (1 - self.alpha) * new)
        # Weights that are not finite stay so, and leave no trace. Nor does a loss that is not, also
        # where the other method does not read it: see `Rescaled`.
        valid = new.isfinite().all(-1, keepdim=True)
        if losses is not None:
            valid = valid & losses.isfinite().all(-1, keepdim=True)
        average.copy_(torch.where(valid, mixed, average))
        return mixed

    def state_dict(self) -> dict[str, Any]:
        own = "" if self._average is None else json.dumps(self._average.tolist())
        return super().state_dict() | {"average": own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        values = state.get("average")
        self._average = torch.tensor(json.loads(values), dtype=torch.float64) if values else None
