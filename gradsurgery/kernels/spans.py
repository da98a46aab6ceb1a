"""gram and combine for many spans of columns at once, each with its own Gram matrix and weights.

The number of operations grows with D and not with the number of spans.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from gradsurgery.kernels import native
from gradsurgery.kernels._backend import choose, with_fallback
from gradsurgery.kernels._dispatch import real_rows

__all__ = ["combine_spans", "gram_spans", "relative_error"]

# Columns that a product takes at a time; TaskGradients begins every parameter at such a multiple.
_UNIT_BYTES = 64
# Numbers that the products of units may take up at a time.
_PRODUCTS = 1 << 20
# Numbers that are scaled at a time: on the CPU they stay in the cache.
_SCALED = {True: 1 << 19, False: 1 << 24}


@torch.library.custom_op("gradsurgery::gram_spans", mutates_args=())
def _gram(
    rows: Tensor, bounds: list[int], parts: list[int], part_count: int, roots: Tensor | None
) -> Tensor:
    def plainly() -> Tensor:
        found = _gram_plain(rows, bounds) if roots is None else _gram_scaled(rows, bounds, roots)
        return _sum_by_part(found, parts, part_count)

    if choose(rows, "auto") != "triton":
        return plainly()
    from gradsurgery.kernels import triton_rows

    return with_fallback(
        lambda: triton_rows.gram_segments(rows, bounds, parts, part_count, roots), plainly
    )


@_gram.register_fake
def _(
    rows: Tensor, bounds: list[int], parts: list[int], part_count: int, roots: Tensor | None
) -> Tensor:
    count = rows.shape[0]
    return rows.new_empty(part_count, count, count, dtype=torch.float64)


def _gram_plain(rows: Tensor, bounds: Sequence[int]) -> Tensor:
    """[T, D] -> [S, T, T] float64."""
    if choose(rows, "auto") == "native":
        return native.gram_spans(rows, bounds)
    count = rows.shape[0]
    totals = rows.new_zeros(len(bounds) // 2, count, count, dtype=torch.float64)
    for first, lengths, tiles in _tiles(rows, bounds):
        wide = tiles.to(torch.float64)
        # Sums in a fixed order, so that the same rows give the same bits; index_add_ does not.
        sums = torch.segment_reduce(wide @ wide.mT, "sum", lengths=lengths, unsafe=True)
        totals[first : first + len(sums)] += sums
    return totals


@torch.library.custom_op("gradsurgery::combine_spans", mutates_args=("out",))
def _combine(
    rows: Tensor, weights: Tensor, bounds: list[int], parts: list[int], out: Tensor
) -> None:
    def plainly() -> None:
        _combine_plain(rows, _of_parts(weights, parts), bounds, out)

    if choose(rows, "auto") != "triton":
        plainly()
        return
    from gradsurgery.kernels import triton_rows

    with_fallback(lambda: triton_rows.combine_segments(rows, weights, bounds, parts, out), plainly)


@_combine.register_fake
def _(rows: Tensor, weights: Tensor, bounds: list[int], parts: list[int], out: Tensor) -> None:
    return None


def _combine_plain(rows: Tensor, weights: Tensor, bounds: Sequence[int], out: Tensor) -> None:
    """With the weights of each span, [S, T]."""
    if choose(rows, "auto") == "native":
        native.combine_spans(rows, weights, bounds, out)
        return
    for first, lengths, tiles in _tiles(rows, bounds):
        units, _, unit = tiles.shape
        factors = torch.repeat_interleave(
            weights[first : first + len(lengths)], lengths, 0, output_size=units
        )
        total = (tiles.to(torch.float64) * factors[:, :, None]).sum(1)
        start = (tiles.storage_offset() - rows.storage_offset()) // rows.stride(1)
        out[start : start + units * unit].copy_(total.view(-1))


@torch.no_grad()
def gram_spans(
    gradients: Tensor,
    bounds: Sequence[tuple[int, int]],
    parts: Sequence[int],
    part_count: int,
    roots: Tensor | None = None,
) -> Tensor:
    """M of each part: [T, D] and S spans [start, stop) -> [part_count, T, T] float64.

    Args:
        gradients: [T, D].
        bounds: ascending; each begins and ends at a multiple of 64 bytes.
        parts: S numbers, the part of each span.
        part_count: how many parts there are; one without a span gets zeros.
        roots: [D] (of complex rows [2 D], for real and imaginary parts), float32 or wider: a
            factor for each column of all rows. M_ij is then Σ_d roots_d² g_id g_jd.
    """
    rows, flat = _real(gradients, bounds)
    with torch.autocast(gradients.device.type, enabled=False):
        found: Tensor = _gram(rows, flat, list(parts), part_count, roots)
    return found


def _gram_scaled(rows: Tensor, bounds: Sequence[int], roots: Tensor) -> Tensor:
    """Pieces of the rows are scaled into scratch memory, and stay there for the product."""
    count, unit = rows.shape[0], _UNIT_BYTES // rows.element_size()
    totals = rows.new_zeros(len(bounds) // 2, count, count, dtype=torch.float64)
    most = max(_SCALED[rows.device.type == "cpu"] // (count * unit), 1)
    for first, lengths, start in _pieces(bounds, unit, most):
        ends = [0, *accumulate(length * unit for length in lengths)]
        columns = slice(start, start + ends[-1])
        scaled = rows[:, columns].to(roots.dtype) * roots[columns]
        inner = [end for pair in pairwise(ends) for end in pair]
        totals[first : first + len(lengths)] += _gram_plain(scaled, inner)
    return totals


def _sum_by_part(found: Tensor, parts: Sequence[int], part_count: int) -> Tensor:
    """[S, ...] of spans, and the part of each -> [part_count, ...], in a fixed order."""
    if list(parts) == list(range(part_count)):
        return found
    order = sorted(range(len(parts)), key=lambda span: parts[span])
    lengths = [0] * part_count
    for part in parts:
        lengths[part] += 1
    picked = found[torch.tensor(order).to(found.device, non_blocking=True)]
    sizes = torch.tensor(lengths).to(found.device, non_blocking=True)
    return torch.segment_reduce(picked, "sum", lengths=sizes, unsafe=True, initial=0)


def _of_parts(values: Tensor, parts: Sequence[int]) -> Tensor:
    """[parts, ...] -> [S, ...]: what belongs to each span's part."""
    if list(parts) == list(range(len(values))):
        return values
    return values[torch.tensor(parts).to(values.device, non_blocking=True)]


@torch.no_grad()
def combine_spans(
    gradients: Tensor,
    weights: Tensor,
    bounds: Sequence[tuple[int, int]],
    parts: Sequence[int],
    out: Tensor,
) -> None:
    """Over each span out = Gᵀ w with its part's weights, [part_count, T] float64.

    `out` is [D], a row of G or memory of its own.
    """
    rows, flat = _real(gradients, bounds)
    target = torch.view_as_real(out).flatten() if out.is_complex() else out
    with torch.autocast(gradients.device.type, enabled=False):
        _combine(rows, weights, flat, list(parts), target)


def relative_error(gradients: Tensor) -> float:
    """How accurate `gram_spans` of these rows is, relative to the product of two norms."""
    rows = real_rows(gradients)
    chosen = choose(rows, "auto")
    if chosen == "triton":
        from gradsurgery.kernels import triton_rows

        return triton_rows.segments_relative_error(rows)
    # The C version sums float32 over up to 64 terms, and a short span averages nothing out.
    return 2e-7 if chosen == "native" else torch.finfo(torch.float64).eps


def _real(gradients: Tensor, bounds: Sequence[tuple[int, int]]) -> tuple[Tensor, list[int]]:
    wide = 2 if gradients.is_complex() else 1
    return real_rows(gradients), [wide * end for span in bounds for end in span]


def _tiles(rows: Tensor, bounds: Sequence[int]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The spans in pieces whose products stay small.

    Yields:
        The first span of the piece; [spans] int64 on the rows' device, the number of units of each
        of its spans; [units, T, unit], a view of their columns.
    """
    count, unit = rows.shape[0], _UNIT_BYTES // rows.element_size()
    most = max(_PRODUCTS // max(count * count, count * unit), 1)
    along, across = rows.stride(1), rows.stride(0)
    for first, lengths, start in _pieces(bounds, unit, most):
        offset = rows.storage_offset() + start * along
        shape, strides = (sum(lengths), count, unit), (unit * along, across, along)
        sizes = torch.tensor(lengths).to(rows.device, non_blocking=True)
        yield first, sizes, rows.as_strided(shape, strides, offset)


def _pieces(bounds: Sequence[int], unit: int, most: int) -> Iterator[tuple[int, list[int], int]]:
    """Neighbouring spans together, up to `most` units; longer ones cut.

    Yields:
        The first span, how many units of it and of those that follow it, and the first column.
    """
    first, start, held = 0, 0, 0
    lengths: list[int] = []
    for span in range(len(bounds) // 2):
        begin, stop = bounds[2 * span], bounds[2 * span + 1]
        while begin < stop:
            if lengths and (held >= most or begin != start + held * unit):
                yield first, lengths, start
                lengths, held = [], 0
            if not lengths:
                first, start = span, begin
            taken = min((stop - begin) // unit, most - held)
            lengths = [*lengths, *[0] * (span - first - len(lengths)), taken]
            begin, held = begin + taken * unit, held + taken
    if lengths:
        yield first, lengths, start
