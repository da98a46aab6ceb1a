"""What a method is: a pure rule from the Gram matrix to task weights, plus a little state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor

__all__ = ["Method", "check_number"]


class Method(ABC):
    """A rule M -> w. It never sees anything of size D.

    A subclass defines `name` and `solve`, and, where it keeps state from step to step,
    `state_dict`, `load_state_dict` and `check`.

    A Gram matrix that is not finite gives weights that are not finite: the error must reach whoever
    checks the gradients, GradScaler for one. `kernels.tasks.run` sees to it.
    """

    name: ClassVar[str]
    """The name that `method=` takes."""

    reads_gram: bool = True
    """Whether w depends on M at all."""

    reads_losses: bool = False
    """Whether w depends on the losses' values."""

    known_beforehand: bool = False
    """Whether w is known before any gradient is, so that one backward pass of Σ_t w_t L_t does:
    the plugin then measures no Gram matrix. `Sum` and `Mean` could, and measure on purpose."""

    def weights(
        self,
        gram: Tensor,
        *,
        losses: Tensor | None = None,
        generator: torch.Generator | None = None,
        relative_error: float | None = None,
    ) -> Tensor:
        """Task weights for a Gram matrix, or for a batch of them.

        Args:
            gram: [..., T, T], real, symmetric, M_ij = g_i·g_j.
            losses: [..., T], the losses' values, for methods that look at them.
            generator: source of every random choice; None: torch's default generator.
            relative_error: how accurate `gram` is, relative to the product of two norms: what is
                smaller than that is rounding. None: the rounding of its dtype.

        Returns:
            [..., T], float64, on the device of `gram`. The combined gradient is Σ_t w_t g_t.

        Raises:
            TypeError: `gram` is not a real floating-point tensor.
            ValueError: `gram` is not [..., T, T] with T >= 1, or does not fit the method's state;
                `losses` is missing or does not fit where the method reads it.
        """
        _check_gram(gram)
        self.check(gram.shape[:-1])
        if not (self.reads_gram or self.reads_losses):
            return self.solve(gram, None, generator, 0.0)
        # Inside the caller's autocast region products would run in half precision. The context is
        # most of the time of a small T, so it is entered only where there is one to leave.
        mixed = torch.is_autocast_enabled(gram.device.type)
        quiet = torch.autocast(gram.device.type, enabled=False) if mixed else nullcontext()
        with quiet, torch.no_grad():
            exact = gram.detach().to(torch.float64)
            known = torch.finfo(gram.dtype).eps if relative_error is None else relative_error
            return self.solve(exact, self._values(losses, exact), generator, known)

    def _values(self, losses: Tensor | None, gram: Tensor) -> Tensor | None:
        """The losses' values as [..., T] float64, for methods that read them."""
        if not self.reads_losses:
            return None
        if losses is None:
            raise ValueError(f"{type(self).__name__} needs losses, a tensor [..., T]; got None")
        if losses.shape[-1:] != gram.shape[-1:]:
            raise ValueError(
                f"losses must be [..., T] with T = {gram.shape[-1]} as in gram; got "
                f"{list(losses.shape)}"
            )
        return losses.detach().to(torch.float64).expand(gram.shape[:-1])

    @abstractmethod
    def solve(
        self,
        gram: Tensor,
        losses: Tensor | None,
        generator: torch.Generator | None,
        relative_error: float,
    ) -> Tensor:
        """[..., T, T] float64 -> [..., T] float64, without waiting for the device.

        `losses` is [..., T] float64 where `reads_losses`, else None. A method that reads neither
        gets M as it was given, for its shape and device.
        """

    def check(self, shape: torch.Size, *, grow: bool = False) -> None:  # noqa: B027
        """Raise ValueError where a Gram matrix for tasks of shape [..., T] does not fit.

        Args:
            shape: [..., T].
            grow: whether T may be larger than before: tasks are known by name, and new ones come.
        """

    @contextmanager
    def only(self, present: Sequence[int], total: int) -> Iterator[None]:
        """Within, the method is about some of its tasks; the state of the others rests.

        Args:
            present: the places of those that are there, among all.
            total: T of all. Running state grows where it was smaller.
        """
        del present, total
        yield

    def state_dict(self) -> dict[str, Any]:
        """State that shapes the next step: plain Python values and tensors only.

        Its entries must be the same before the first step as later: see `GradVac`.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Take up what `state_dict` gave."""

    def snapshot(self) -> dict[str, Any]:
        """What `restore` needs to take back one call of `weights`; does not wait for the device."""
        return {
            name: value.clone() if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }

    def restore(self, taken: dict[str, Any]) -> None:
        """Be what `snapshot` saw, in the same memory: captured CUDA graphs read it."""
        for name, value in taken.items():
            now = vars(self)[name]
            if isinstance(value, Tensor) and isinstance(now, Tensor) and now.shape == value.shape:
                now.copy_(value)
            else:
                setattr(self, name, value)

    def __repr__(self) -> str:
        """Class and hyperparameters, as they would be written to make this method again."""
        fields = {k: v for k, v in vars(self).items() if not k.startswith("_")}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in fields.items())})"


def check_number(name: str, value: object) -> None:
    """Raise TypeError where a hyperparameter is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number; got {value!r}")


def _check_gram(gram: Tensor) -> None:
    if not isinstance(gram, Tensor) or not gram.is_floating_point():
        kind = gram.dtype if isinstance(gram, Tensor) else type(gram).__name__
        raise TypeError(f"gram must be a real floating-point tensor [..., T, T]; got {kind}")
    if gram.dim() < 2 or gram.shape[-1] != gram.shape[-2] or gram.shape[-1] == 0:
        raise ValueError(f"gram must be [..., T, T] with T >= 1; got {list(gram.shape)}")
