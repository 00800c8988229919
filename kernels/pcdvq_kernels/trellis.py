"""Codec `trellis`: levels computed from windows of a ring of bits (FORMAT.md, "Trellis").

A bitshift trellis with computed levels and tail-biting chains, as in QTIP (arXiv 2406.11235).
"""

from __future__ import annotations

import torch
from torch import Tensor

PAIR = 2  # columns of a code
CODE_BITS = range(3, 9)
SINGLES_FROM = 6  # bits of a code whose two weights have windows of their own
WINDOW_BITS = 16
CHAIN_WEIGHTS = 128
CHAIN_ROWS = 64, 32, 16
MULTIPLIER = 0x96459645
# Levels of a standard normal variable's standard deviation, by code bits: least mean squared error.
UNITS = {3: 51.2, 4: 49.3, 5: 47.5, 6: 34.2, 7: 33.6, 8: 33.0}


def strip_columns(chain_rows: int) -> int:
    """Columns that a chain runs through."""
    return CHAIN_WEIGHTS // chain_rows


def chain_order(codes: Tensor, chain_rows: int) -> Tensor:
    """Codes [N, G] by chain: [N / chain_rows, strips, steps of a chain]."""
    pairs = strip_columns(chain_rows) // PAIR
    segments = codes.unflatten(0, (-1, chain_rows)).unflatten(2, (-1, pairs))
    return segments.permute(0, 2, 3, 1).flatten(2)


def row_order(steps: Tensor, chain_rows: int) -> Tensor:
    """Inverse of `chain_order`, of what has one more dimension or none: [N, G, ...]."""
    segments = steps.unflatten(2, (-1, chain_rows))  # [segments, strips, pairs, rows, ...]
    order = (0, 3, 1, 2, *range(4, segments.dim()))
    return segments.permute(order).flatten(2, 3).flatten(0, 1)


def window_pairs(windows: Tensor) -> Tensor:
    """Both levels that windows (integers in [0, 2^16)) stand for, int64 [..., 2]."""
    product = windows.long() * MULTIPLIER
    low, mid_low, mid_high, high = (product >> shift & 255 for shift in (0, 8, 16, 24))
    return torch.stack([low + mid_high + 1 >> 1, mid_low + high + 1 >> 1], -1) - 128


def window_levels(windows: Tensor, code_bits: int) -> Tensor:
    """Levels of windows: int64 [..., 2] for pairs, [...] where each weight has its own."""
    pairs = window_pairs(windows)
    return pairs if code_bits < SINGLES_FROM else (pairs.sum(-1) + 257 >> 1) - 128


def decode(codes: Tensor, code_bits: int, chain_rows: int) -> Tensor:
    """Levels of codes.

    Args:
        codes: int64 [N, G], N a multiple of chain_rows, G of the pairs of a strip.

    Returns:
        int8 [N, G, 2].
    """
    steps = chain_order(codes, chain_rows)
    bits = steps.clone()
    for step in range(1, -(-WINDOW_BITS // code_bits) + 1):
        bits |= steps.roll(step, 2) << (step * code_bits)
    ends = [0] if code_bits < SINGLES_FROM else [code_bits // 2, 0]
    windows = torch.stack([bits >> end & ((1 << WINDOW_BITS) - 1) for end in ends], -1)
    levels = window_levels(windows, code_bits).flatten(3)
    return row_order(levels, chain_rows).to(torch.int8)
