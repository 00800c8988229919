"""Codec `compact`: windows that slide over a row's bits select levels (FORMAT.md, "Windows")."""

from __future__ import annotations

import torch
from torch import Tensor

DIM = 4
INDEX_BITS = 7  # of a row of the table
CODE_BITS = 8, 12, 16


def extra_bits(code_bits: int) -> int:
    """Bits that a coordinate has in a code beside its two of the stream."""
    return (code_bits - 8) // DIM


def state_bits(code_bits: int) -> int:
    """Bits of a window that come before those of its coordinate."""
    return INDEX_BITS - 2 - extra_bits(code_bits)


def table_rows(codes: Tensor, states: Tensor, code_bits: int) -> Tensor:
    """Rows of the table that the coordinates of codes select.

    Args:
        codes: int64 [...].
        states: int64, broadcast to codes: the top bits of the codes above.
        code_bits: bits of a code.

    Returns:
        int64 [..., DIM].
    """
    width, older = extra_bits(code_bits), state_bits(code_bits)
    new = codes >> (DIM * width)
    # The lowest bit is the last of the stream, and no state has it.
    stream = states | (new >> 1) << older | (new & 1) << (older + 7)
    j = torch.arange(DIM, device=codes.device)
    window = (stream.unsqueeze(-1) >> (2 * j)) & ((4 << older) - 1)
    extra = (codes.unsqueeze(-1) >> (width * j)) & ((1 << width) - 1)
    return window | extra << (older + 2)


def look_up(table: Tensor, rows: Tensor) -> Tensor:
    """Levels [..., DIM] of rows [..., DIM] of a table [2 ** INDEX_BITS, DIM]."""
    return table[rows, torch.arange(DIM, device=table.device)]


def expand(table: Tensor, code_bits: int) -> Tensor:
    """Levels of every code in every state: [2 ** state_bits, 2 ** code_bits, DIM]."""
    states = torch.arange(1 << state_bits(code_bits), device=table.device).unsqueeze(1)
    codes = torch.arange(1 << code_bits, device=table.device)
    return look_up(table, table_rows(codes, states, code_bits))
