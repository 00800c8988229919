"""Codes of integer pyramids (FORMAT.md, "Pyramid codes"): their numbers, and tables to decode them.

A pyramid P(n, k) is the set of integer vectors of n coordinates whose magnitudes sum to k (Fischer,
"A pyramid vector quantizer", 1986). Here n is 8; a point is a pair of points of P(4, .), which
are in tables made from the definition.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

DIM, HALF = 8, 4
MIN_CODE_BITS, MAX_CODE_BITS = 12, 32
TABULATED_BITS = 18  # of codes that are so few that kernels look up the levels of each
MOST_PULSES = 36  # P(8, 37) has more than 2^32 points
MOST_MAGNITUDES = 64
RANGE_BITS = 12  # the top bits of a code, which tell its range

# The tables as the kernels read them (kernels/csrc/pyramid.h), in bytes.
_STARTS_BYTES = 2 << RANGE_BITS
_RANGE_BYTES = 32
# Of a reciprocal: products in fp32 with numbers below 2^31 then are too small, if anything, and by
# less than 1 where they are below 2^17.
_REDUCTION = 1 - 2**-21
_SCALE_BITS = 7
_MAX_LEVEL = 127
_LOW = (1 << 32) - 1


class Range(NamedTuple):
    """Consecutive codes of one magnitude with the same numbers of pulses in both halves.

    Attributes:
        magnitude: its number.
        first, second: pulses (sums of magnitudes) of the halves.
        start: the first code.
    """

    magnitude: int
    first: int
    second: int
    start: int

    @property
    def size(self) -> int:
        """Codes that are points of their own."""
        return count_points(HALF, self.first) * count_points(HALF, self.second)


@cache
def count_points(dim: int, pulses: int) -> int:
    """Number of points of P(dim, pulses)."""
    if not pulses or not dim:
        return int(not pulses)
    fewer = count_points(dim - 1, pulses - 1) + count_points(dim, pulses - 1)
    return count_points(dim - 1, pulses) + fewer


@lru_cache(maxsize=64)
def make_ranges(pulses: tuple[int, ...], code_bits: int) -> tuple[tuple[Range, ...], int]:
    """The ranges of all codes, and where the last one ends; above 2 ** code_bits they do not fit.

    Args:
        pulses: K of each magnitude.
        code_bits: bits of a code, at least `MIN_CODE_BITS`.
    """
    step = 1 << (code_bits - RANGE_BITS)
    ranges: list[Range] = []
    end = 0
    for magnitude, total in enumerate(pulses):
        for first in range(total + 1):
            ranges.append(Range(magnitude, first, total - first, end))
            end += -(-ranges[-1].size // step) * step
    return tuple(ranges), end


@cache
def make_points(dim: int, pulses: int) -> Tensor:
    """P(dim, pulses) in lexicographic order, int8 [count_points(dim, pulses), dim]."""
    if dim == 1:
        return torch.tensor([[-pulses], [pulses]] if pulses else [[0]], dtype=torch.int8)
    parts = []
    for value in range(-pulses, pulses + 1):
        rest = make_points(dim - 1, pulses - abs(value))
        parts.append(torch.nn.functional.pad(rest, (1, 0), value=value))
    return torch.cat(parts)


def table_rows(pulses: Sequence[int], code_bits: int) -> int:
    """Rows of `make_tables`."""
    ranges, _ = make_ranges(tuple(pulses), code_bits)
    points = sum(count_points(HALF, k) for k in range(max(pulses) + 1))
    size = _STARTS_BYTES + _RANGE_BYTES * len(ranges) + HALF * points
    return -(-size // DIM)


def make_tables(pulses: Sequence[int], code_bits: int, magnitudes: Tensor, shift: int) -> Tensor:
    """What decodes a code, int8 [table_rows(pulses, code_bits), 8].

    In bytes: for each value of a code's top bits where its range's fields are, int16 in units of 8;
    the fields of each range, 8 words of 32 bits: first code, most that is added to it, points of
    the second half, an fp32 a little below the reciprocal of that, bytes at which the points of the
    first and of the second half begin, `scales` (twice an int16), 0; the points of P(4, 0), P(4, 1)
    and so on.

    Args:
        pulses: K of each magnitude.
        code_bits: bits of a code.
        magnitudes: uint8, as many as `pulses`, each in [1, 128].
        shift: as in the format, at most 7.
    """
    ranges, _ = make_ranges(tuple(pulses), code_bits)
    points = [make_points(HALF, k) for k in range(max(pulses) + 1)]
    at = _STARTS_BYTES + _RANGE_BYTES * len(ranges)
    places = [at]
    for table in points:
        places.append(places[-1] + table.numel())
    each: list[int] = scales(magnitudes, shift).tolist()
    fields = []
    for item in ranges:
        divisor, scale = count_points(HALF, item.second), each[item.magnitude]
        reciprocal = int(torch.tensor(_REDUCTION / divisor).view(torch.int32).item())
        fields.append(
            [
                item.start | (item.size - 1) << 32,
                divisor | reciprocal << 32,
                places[item.first] | places[item.second] << 32,
                scale | scale << 16,
            ]
        )
    starts = torch.tensor([item.start for item in ranges])
    tops = torch.arange(1 << RANGE_BITS) << (code_bits - RANGE_BITS)
    found = torch.searchsorted(starts, tops, right=True) - 1
    tables = [
        ((_STARTS_BYTES + _RANGE_BYTES * found) // 8).to(torch.int16).view(torch.int8),
        torch.tensor(fields).view(torch.int8).flatten(),
        *(table.flatten() for table in points),
    ]
    table = torch.cat(tables)
    return torch.nn.functional.pad(table, (0, -len(table) % DIM)).view(-1, DIM)


def decode(codes: Tensor, tables: Tensor, code_bits: int) -> Tensor:
    """Levels of `codes` (int64 [...]) by `make_tables`: int8 [..., 8]."""
    table = tables.flatten()
    places = table[:_STARTS_BYTES].view(torch.int16)
    fields = table[: len(table) // 8 * 8].view(torch.int64)
    at = places[codes >> (code_bits - RANGE_BITS)].long()
    start, last = _halves(fields[at])
    divisor, _ = _halves(fields[at + 1])
    first, second = _halves(fields[at + 2])
    scale, _ = _halves(fields[at + 3])
    rest = torch.minimum(codes - start, last)
    index = rest // divisor
    corner = torch.arange(HALF, device=codes.device)
    places = torch.stack([first + HALF * index, second + HALF * (rest - index * divisor)], -1)
    points = table[places.unsqueeze(-1) + corner].flatten(-2)
    return scale_points(points.int(), (scale & 0xFFFF).int()).to(torch.int8)


def scales(magnitudes: Tensor, shift: int) -> Tensor:
    """Levels of a pulse at each magnitude (uint8 [M]) in units of 2 ** -7: int32 [M]."""
    return magnitudes.int() << (_SCALE_BITS - shift)


def scale_points(points: Tensor, scale: Tensor) -> Tensor:
    """Levels of points (int32 [..., 8]) by `scales` (int32 [...])."""
    half = 1 << (_SCALE_BITS - 1)
    levels = (points * scale.unsqueeze(-1) + half) >> _SCALE_BITS
    return levels.clamp(-_MAX_LEVEL, _MAX_LEVEL)


def encode(points: Tensor, magnitude: Tensor, pulses: Sequence[int], code_bits: int) -> Tensor:
    """Codes of points: the inverse of `decode`.

    Args:
        points: integers in any dtype, [..., 8], of P(8, pulses[magnitude]).
        magnitude: int64 [...], numbers of magnitudes.
        pulses: K of each magnitude.
        code_bits: bits of a code.

    Returns:
        int64 [...].
    """
    most = max(pulses)
    keys, offsets = _ranks(most)
    ranges, _ = make_ranges(tuple(pulses), code_bits)
    start = torch.zeros(len(pulses), most + 1, dtype=torch.int64)
    for item in ranges:
        start[item.magnitude, item.first] = item.start
    halves = points.long().unflatten(-1, (2, HALF))
    sums = halves.abs().sum(-1)  # [..., 2]
    index = torch.searchsorted(keys, _key(halves, sums)) - offsets[sums]
    counts = offsets[1:] - offsets[:-1]
    return start[magnitude, sums[..., 0]] + index[..., 0] * counts[sums[..., 1]] + index[..., 1]


@cache
def _ranks(most: int) -> tuple[Tensor, Tensor]:
    """Keys of the points of P(4, 0) to P(4, most), rising, and where each begins."""
    points = [make_points(HALF, k).long() for k in range(most + 1)]
    keys = torch.cat([_key(table, table.abs().sum(-1)) for table in points])
    return keys, torch.tensor([0, *map(len, points)]).cumsum(0)


def _key(points: Tensor, sums: Tensor) -> Tensor:
    """Integers in the order of the tables' points [..., 4], whose pulses are `sums` [...]."""
    key = sums
    for j in range(HALF):
        key = key * 128 + points[..., j] + 64
    return key


def _halves(words: Tensor) -> tuple[Tensor, Tensor]:
    """The unsigned lower and upper 32 bits of int64 words."""
    return words & _LOW, (words >> 32) & _LOW
