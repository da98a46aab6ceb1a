"""What `gram_spans` and `combine_spans` must give, whichever backend runs them."""

from __future__ import annotations

import torch

from gradsurgery.kernels import reference, spans


def check(rows: torch.Tensor, bounds: list[tuple[int, int]], tolerance: float) -> None:
    """Both against float64, with every second span in a part of its own and the others in one.

    Args:
        rows: [T, D]; row 0 is overwritten.
        bounds: of the spans.
        tolerance: of an entry of M, relative to the product of two norms.
    """
    count = rows.shape[0]
    where = [(index + 1) // 2 if index % 2 else 0 for index in range(len(bounds))]
    number = max(where, default=0) + 2  # the last part has no span
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(number, count, generator=generator, dtype=torch.float64)
    weights = weights.to(rows.device)
    real = torch.view_as_real(rows).flatten(1) if rows.is_complex() else rows
    roots = torch.rand(real.shape[1], generator=generator, dtype=torch.float64) + 0.5
    if real.dtype != torch.float64:
        roots = roots.float()
    roots = roots.to(rows.device)
    wide = 2 if rows.is_complex() else 1
    for factors in (None, roots):
        found = spans.gram_spans(rows, bounds, where, number, factors)
        exact = torch.zeros(number, count, count, dtype=torch.float64, device=rows.device)
        for part, (start, stop) in zip(where, bounds, strict=True):
            columns = slice(wide * start, wide * stop)
            scaled = real[:, columns].double()
            if factors is not None:
                scaled = scaled * factors[columns].double()
            exact[part] += reference.gram(scaled)
        norms = exact.diagonal(dim1=-2, dim2=-1).sqrt()
        error = (found - exact).abs() - tolerance * norms[:, :, None] * norms[:, None, :]
        assert found.shape == exact.shape
        assert float(error.max()) <= 0, (factors is None, found, exact)
    wanted = rows[0].clone()
    for part, (start, stop) in zip(where, bounds, strict=True):
        piece = rows[:, start:stop]
        exact_dtype = torch.complex128 if rows.is_complex() else torch.float64
        combined = weights[part].to(exact_dtype) @ piece.to(exact_dtype)
        wanted[start:stop] = combined.to(rows.dtype)
    spans.combine_spans(rows, weights, bounds, where, rows[0])
    # One rounding to the rows' dtype, of a sum that may be rounded differently before.
    torch.testing.assert_close(rows[0], wanted)
