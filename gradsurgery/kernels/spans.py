"""gram and combine for many spans of columns at once, each with its own Gram matrix and weights.

The number of operations grows with D and not with the number of spans.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gradsurgery.kernels import native
from gradsurgery.kernels._backend import choose
from gradsurgery.kernels._dispatch import real_rows

__all__ = ["combine_spans", "gram_spans", "resolution"]

# Columns that a product takes at a time; TaskGradients begins every parameter at such a multiple.
_UNIT_BYTES = 64
# Numbers that the products of units may take up at a time.
_PRODUCTS = 1 << 20


@torch.library.custom_op("gradsurgery::gram_spans", mutates_args=())
def _gram(rows: Tensor, bounds: list[int]) -> Tensor:
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


@_gram.register_fake
def _(rows: Tensor, bounds: list[int]) -> Tensor:
    count = rows.shape[0]
    return rows.new_empty(len(bounds) // 2, count, count, dtype=torch.float64)


@torch.library.custom_op("gradsurgery::combine_spans", mutates_args=("out",))
def _combine(rows: Tensor, weights: Tensor, bounds: list[int], out: Tensor) -> None:
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


@_combine.register_fake
def _(rows: Tensor, weights: Tensor, bounds: list[int], out: Tensor) -> None:
    return None


@torch.no_grad()
def gram_spans(gradients: Tensor, bounds: Sequence[tuple[int, int]]) -> Tensor:
    """M of each span: [T, D] and S spans [start, stop) -> [S, T, T] float64.

    Spans are in ascending order and begin and end at multiples of 64 bytes.
    """
    with torch.autocast(gradients.device.type, enabled=False):
        found: Tensor = _gram(*_real(gradients, bounds))
    return found


@torch.no_grad()
def combine_spans(
    gradients: Tensor, weights: Tensor, bounds: Sequence[tuple[int, int]], out: Tensor
) -> None:
    """Over each span out = Gᵀ w with the span's weights, [S, T] float64.

    `out` is [D], a row of G or memory of its own.
    """
    rows, flat = _real(gradients, bounds)
    target = torch.view_as_real(out).flatten() if out.is_complex() else out
    with torch.autocast(gradients.device.type, enabled=False):
        _combine(rows, weights, flat, target)


def resolution(gradients: Tensor) -> float:
    """How accurate `gram_spans` of these rows is, relative to the product of two norms."""
    # The C version sums float32 over up to 64 terms, and a short span averages nothing out.
    native_sums = choose(real_rows(gradients), "auto") == "native"
    return 2e-7 if native_sums else torch.finfo(torch.float64).eps


def _real(gradients: Tensor, bounds: Sequence[tuple[int, int]]) -> tuple[Tensor, list[int]]:
    wide = 2 if gradients.is_complex() else 1
    return real_rows(gradients), [wide * end for span in bounds for end in span]


def _tiles(rows: Tensor, bounds: Sequence[int]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The spans in pieces that fit into the cache.

    Yields:
        The first span of the piece; [spans] int64 on the rows' device, the number of units of each
        of its spans; [units, T, unit], a view of their columns.
    """
    count, unit = rows.shape[0], _UNIT_BYTES // rows.element_size()
    most = max(_PRODUCTS // max(count * count, count * unit), 1)
    first, start = 0, 0
    lengths: list[int] = []
    pieces: list[tuple[int, list[int], int]] = []
    for span in range(len(bounds) // 2):
        begin, stop = bounds[2 * span], bounds[2 * span + 1]
        while begin < stop:
            full = sum(lengths) >= most
            gap = lengths and begin != start + sum(lengths) * unit
            if full or gap:
                pieces.append((first, lengths, start))
                lengths = []
            if not lengths:
                first, start = span, begin
            taken = min((stop - begin) // unit, most - sum(lengths))
            lengths = [*lengths, *[0] * (span - first - len(lengths)), taken]
            begin += taken * unit
    if lengths:
        pieces.append((first, lengths, start))
    along, across = rows.stride(1), rows.stride(0)
    for first, lengths, start in pieces:
        offset = rows.storage_offset() + start * along
        shape, strides = (sum(lengths), count, unit), (unit * along, across, along)
        sizes = torch.tensor(lengths).to(rows.device, non_blocking=True)
        yield first, sizes, rows.as_strided(shape, strides, offset)
