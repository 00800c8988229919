"""Bit-packing of codes and signs (FORMAT.md, "Rows of `qweight`")."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_codes(codes: Tensor, code_bits: int) -> Tensor:
    """Pack codes into rows of bytes.

    Args:
        codes: int64 [N, groups], each in [0, 2 ** code_bits).
        code_bits: bits of one code, at most 32.

    Returns:
        uint8 [N, ceil(groups * code_bits / 8)].
    """
    rows, groups = codes.shape
    # Eight codes fill exactly `code_bits` bytes, so a row is packed in such runs.
    padded = torch.nn.functional.pad(codes, (0, -groups % 8)).view(rows, -1, 8)
    packed = torch.zeros(rows, padded.shape[1], code_bits, dtype=torch.int64)
    for index in range(8):
        first = index * code_bits
        for byte in range(first // 8, (first + code_bits - 1) // 8 + 1):
            offset = first - 8 * byte
            code = padded[..., index]
            packed[..., byte] |= (code << offset if offset >= 0 else code >> -offset) & 0xFF
    return packed.to(torch.uint8).flatten(1)[:, : -(-groups * code_bits // 8)].contiguous()


def unpack_codes(qweight: Tensor, code_bits: int, groups: int) -> Tensor:
    """Inverse of `pack_codes`: uint8 [N, bytes] to int64 [N, groups]."""
    rows = qweight.shape[0]
    runs = -(-groups // 8)
    padded = torch.nn.functional.pad(qweight, (0, runs * code_bits - qweight.shape[1]))
    packed = padded.view(rows, runs, code_bits).to(torch.int64)
    codes = torch.zeros(rows, runs, 8, dtype=torch.int64, device=qweight.device)
    for index in range(8):
        first = index * code_bits
        for byte in range(first // 8, (first + code_bits - 1) // 8 + 1):
            offset = first - 8 * byte
            value = packed[..., byte]
            codes[..., index] |= value >> offset if offset >= 0 else value << -offset
    return (codes & ((1 << code_bits) - 1)).flatten(1)[:, :groups]


def pack_signs(signs: Tensor) -> Tensor:
    """Pack signs (+1 / -1, [K], K a multiple of 8) into uint8 [K / 8], bit set for -1."""
    weights = 1 << torch.arange(8, device=signs.device)
    return ((signs < 0).view(-1, 8) * weights).sum(1).to(torch.uint8)


def unpack_signs(packed: Tensor) -> Tensor:
    """Inverse of `pack_signs`: uint8 [K / 8] to fp32 [K] of +1 / -1."""
    bits = (packed.unsqueeze(1) >> torch.arange(8, device=packed.device, dtype=torch.uint8)) & 1
    return 1.0 - 2.0 * bits.flatten().float()
