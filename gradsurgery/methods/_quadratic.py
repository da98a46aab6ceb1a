"""Nonnegative quadratic programs on the Gram matrix, batched, in a fixed number of torch ops."""

from __future__ import annotations

import torch
from torch import Tensor

from gradsurgery.methods._projection import divide_or_zero

__all__ = ["Path", "lift", "noise_of", "ridge_of", "scale", "solve_program"]

# Fewest steps and rounds for 1e-12 on the hardest input found, and a few steps more.
_STEPS = 28
_LEVELS = 16
_ROUNDS = 4


def ridge_of(relative_error: float) -> float:
    """What is added to the scaled diagonal: a rounding error of M.

    It makes every solution the only one, and changes a condition by less than 1e-12 of its terms
    where M is good to float64.
    """
    return max(1e-13, 4 * relative_error)


def noise_of(relative_error: float) -> float:
    """Lengths ‖Gᵀw‖ of less than this beside Σ_i |w_i| ‖g_i‖ are rounding: M holds squares."""
    return 2 * float(relative_error**0.5)


def scale(gram: Tensor) -> tuple[Tensor, Tensor]:
    """C_ij = M_ij / (n_i n_j) and n, so that norms however far apart are no matter.

    Args:
        gram: [..., T, T] float64.

    Returns:
        [..., T, T] with ones on the diagonal, and zeros beside it for a task without gradient;
        [..., T], norms, 0 for such a task.
    """
    norms = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    divisors = torch.where(norms > 0, norms, torch.inf)
    cosines = (gram / divisors[..., None] / divisors[..., None, :]).clamp(-1, 1)
    eye = torch.eye(gram.shape[-1], dtype=torch.bool, device=gram.device)
    return torch.where(eye, 1.0, cosines), norms


def lift(cosines: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    """a_i = smallest norm / n_i, and C + aaᵀ, in which even opposite gradients are none."""
    present = norms > 0
    least = torch.where(present, norms, torch.inf).amin(-1, keepdim=True)
    a = divide_or_zero(least, norms)
    return a, cosines + a[..., :, None] * a[..., None, :]


def solve_program(a: Tensor, q: Tensor, ridge: float) -> Tensor:
    """min ½ zᵀ(A + ridge)z + qᵀz over z >= 0, by a primal-dual interior point method.

    Args:
        a: [..., T, T], positive semidefinite.
        q: [..., T].
        ridge: positive.

    Returns:
        z, [..., T].

    Source: Mehrotra's predictor and corrector, as in Nocedal and Wright, "Numerical Optimization",
    algorithm 16.4.
    """
    size = q.abs().amax(-1, keepdim=True)
    size = torch.where(size > 0, size, 1.0)
    q = q / size + torch.zeros_like(a[..., 0])
    a = a + ridge * torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    # Both of a pair in one tensor: z, and its condition's slack Az + q.
    both = torch.ones_like(q).expand(2, *q.shape)
    for _ in range(_STEPS):
        z, slack = both
        matrix = a.expand(*q.shape, -1).clone()
        matrix.diagonal(dim1=-2, dim2=-1).add_(slack / z)
        factor, _ = torch.linalg.cholesky_ex(matrix)
        right = -q - _product(a, z)
        mean = (z * slack).mean(-1, keepdim=True)
        step = _newton(factor, right, both)
        ahead = both + step / _excess(both, step)
        centre = (ahead.prod(0).mean(-1, keepdim=True) / mean).clamp(0, 1) ** 3 * mean
        added = (centre - step.prod(0)) / z
        step = _newton(factor, right + added, both, added)
        moved = both + (1 - 1e-3) * step / _excess(both, step)
        # Where it has come to an end, rounding may spoil the next step.
        good = ((moved > 0).all(0) & (mean > 1e-26)).all(-1, keepdim=True)
        both = torch.where(good, moved, both)
    z, slack = both
    # The smaller of a pair is what is left of its zero.
    return torch.where(z > slack, z, 0.0) * size


def _newton(factor: Tensor, right: Tensor, both: Tensor, added: Tensor | float = 0.0) -> Tensor:
    half = torch.linalg.solve_triangular(factor, right[..., None], upper=False)
    step = torch.linalg.solve_triangular(factor.mT, half, upper=True)[..., 0]
    z, slack = both
    return torch.stack([step, added - slack - slack / z * step])


def _excess(both: Tensor, step: Tensor) -> Tensor:
    """By how much a step is too long to leave both positive, at least 1: [..., 1]."""
    return (-step / both).amax((0, -1)).clamp(min=1)[..., None]


class Path:
    """The path d(s) = g_0 + Gᵀz(s), the nearest to the mean g_0 with g_i·d >= s for all i.

    It leads from the mean over its projection onto the dual cone, at s = 0, towards MGDA's
    direction. CAGrad stops where the distance to g_0 is a share of ‖g_0‖, ConicGrad where the
    cosine with g_0 has fallen to a limit: each d is the best for the worst-off task of its ball, or
    of its cone.

    Args:
        gram: [..., T, T] float64.
        cone: whether `limit` is a cosine.
        limit: where to stop.
        ridge: see `ridge_of`.
        noise: see `noise_of`.
    """

    def __init__(
        self, gram: Tensor, *, cone: bool, limit: float, ridge: float, noise: float
    ) -> None:
        self._cone, self._limit, self._ridge, self._noise = cone, limit, ridge, noise
        self._cosines, self._norms = scale(gram)
        most = self._norms.amax(-1, keepdim=True)
        self._most = torch.where(most > 0, most, 1.0)
        self._mean = self._norms / self._most / gram.shape[-1]
        self._b = _product(self._cosines, self._mean)
        self._square = (self._mean * self._b).sum(-1).clamp(min=0)

    def weights(self) -> Tensor:
        """w of the d at which it stops, [..., T]; a cone's is as long as g_0."""
        z = self._stop()
        # From a mean of length 0 there is no way to go.
        z = torch.where(self._square[..., None] > 0, z, 0.0)
        weights = 1 / z.shape[-1] + divide_or_zero(z * self._most, self._norms)
        if not self._cone:
            return weights
        y = self._mean + z
        length = (_product(self._cosines, y) * y).sum(-1).clamp(min=0).sqrt()
        long = (length > self._noise * y.sum(-1)) & (self._square > 0)
        factor = self._square.sqrt() / torch.where(long, length, 1.0)
        return torch.where(long, factor, 1.0)[..., None] * weights

    def _stop(self) -> Tensor:
        a, lifted = lift(self._cosines, self._norms)
        level = solve_program(self._cosines, self._b, self._ridge)
        # Below level 0 every program has a solution. Above it none may; one on C + aaᵀ always has,
        # and it solves the plain one at the level s - Σ az.
        above = self._beyond(level, torch.zeros_like(level))[0] < 0
        matrix = torch.where(above[..., None, None], lifted, self._cosines)[..., None, :, :]
        sign = torch.where(above, 1.0, -1.0)
        start = torch.where(above, (a * level).sum(-1), 0.0)
        size = self._b.abs().amax(-1) + self._square.sqrt()
        size = torch.where(size > 0, size, 1.0)
        least = -torch.where(a > 0, self._b / torch.where(a > 0, a, 1.0), torch.inf).amin(-1)
        near, far = 1e-16 * size, torch.maximum(1e10 * size, 2 * least)
        guess = torch.zeros_like(near)
        # The limit changes nothing: at levels below 0 no product moves by more than ‖g_0‖.
        most = 4 * size[..., None, None]
        for _ in range(_ROUNDS):
            distances = _levels(near, far, guess)
            s = start[..., None] + sign[..., None] * distances
            q = self._b[..., None, :] - s[..., None] * a[..., None, :]
            z = solve_program(matrix, torch.minimum(q, most), self._ridge)
            passed = (self._beyond(z, torch.zeros_like(z))[0] > 0) == above[..., None]
            beyond = (~passed).to(torch.int64).cumprod(-1).sum(-1)
            index = torch.stack([beyond - 1, beyond], -1).clamp(0, z.shape[-2] - 1)
            near, far = distances.gather(-1, index).unbind(-1)
            ends = z.gather(-2, index[..., None].expand(*index.shape, z.shape[-1]))
            first, change = ends[..., 0, :], ends[..., 1, :] - ends[..., 0, :]
            share = self._root(first, change)
            guess = near + share * (far - near)
        z = first + share[..., None] * change
        length = (_product(self._cosines, z) * z).sum(-1)
        if self._cone:
            length = length + 2 * (self._b * z).sum(-1) + self._square
        # Where Gᵀz is what rounding leaves of terms that cancel, gradients oppose each other and no
        # direction serves all: level 0 is the best, and the nearest d that reaches it stands.
        noisy = above & (z.sum(-1) * self._noise > length.clamp(min=0).sqrt())
        return torch.where(noisy[..., None], level, z)

    def _beyond(self, z: Tensor, change: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """How far z + t·change is beyond the stop, as a quadratic in t: negative before it."""
        levels = z.dim() - self._b.dim()
        square, b, cosines = self._square, self._b, self._cosines
        if levels:
            square, b, cosines = square[..., None], b[..., None, :], cosines[..., None, :, :]
        turned, turned_change = _product(cosines, z), _product(cosines, change)
        along, slope = (b * z).sum(-1), (b * change).sum(-1)
        apart = (turned * z).sum(-1).clamp(min=0)
        cross = 2 * (turned_change * z).sum(-1)
        own = (turned_change * change).sum(-1).clamp(min=0)
        share = self._limit**2 * square
        if not self._cone:
            return apart - share, cross, own
        value = square + along
        return (
            share * (square + 2 * along + apart) - value * value.abs(),
            share * (2 * slope + cross) - 2 * value.abs() * slope,
            share * own - torch.where(value > 0, 1.0, -1.0) * slope.square(),
        )

    def _root(self, z: Tensor, change: Tensor) -> Tensor:
        """t in [0, 1] at which z + t·change is at the stop."""
        constant, linear, square = self._beyond(z, change)
        root = (linear.square() - 4 * square * constant).clamp(min=0).sqrt()
        # Towards the stop from the side where it starts.
        divisor = linear + torch.where(constant > 0, -1.0, 1.0) * root
        return (-2 * constant / torch.where(divisor == 0, 1.0, divisor)).clamp(0, 1)


def _levels(near: Tensor, far: Tensor, guess: Tensor) -> Tensor:
    """Distances to try, in order: evenly in the logarithm, and close around a guess."""
    even = torch.linspace(0, 1, _LEVELS, dtype=near.dtype, device=near.device)
    spread = near[..., None] * (far / near)[..., None] ** even
    off = 10 ** torch.linspace(-11, -2, 4, dtype=near.dtype, device=near.device)
    close = guess[..., None] * torch.cat([1 - off, 1 + off])
    levels = torch.cat([near[..., None], far[..., None], spread, close], -1)
    return levels.clamp(near[..., None], far[..., None]).sort(-1).values


def _product(matrix: Tensor, vector: Tensor) -> Tensor:
    """[..., T, T], [..., T] -> [..., T]."""
    return (matrix @ vector[..., None])[..., 0]
