"""Checks of the arguments of the searches for codes, the same for every backend."""

from __future__ import annotations

import torch
from torch import Tensor

from pcdvq_kernels import windows
from pcdvq_kernels.arguments import MAX_STATE_BITS, describe
from pcdvq_kernels.errors import PCDVQError


def check_nearest(x: Tensor, codewords: Tensor, bias: Tensor) -> None:
    """Raise PCDVQError unless the arguments of `nearest_codeword` fit together."""
    if x.dtype != torch.float32 or x.dim() != 2 or x.shape[1] not in (2, 4, 8):
        raise PCDVQError(f"x is {describe(x)}; expected fp32 [G, dim] with dim 2, 4 or 8")
    count = codewords.shape[0] if codewords.dim() else 0
    if not 1 <= count < 1 << 31:
        raise PCDVQError(f"codewords is {describe(codewords)}; expected at least one codeword")
    for name, tensor, shape in (
        ("codewords", codewords, (count, x.shape[1])),
        ("bias", bias, (count,)),
    ):
        if tensor.dtype != x.dtype or tensor.shape != shape or tensor.device != x.device:
            raise PCDVQError(
                f"{name} is {describe(tensor)}; expected {x.dtype} {list(shape)} on {x.device}"
            )


def check_trellis(
    x: Tensor, row_weight: Tensor, codewords: Tensor, parity: bool, state_bits: int
) -> int:
    """Raise PCDVQError unless the arguments of `trellis_codes` fit together.

    Returns:
        Bits of the fields beside the signs.
    """
    if x.dtype != torch.float32 or x.dim() != 3 or x.shape[2] not in (2, 4, 8):
        raise PCDVQError(f"x is {describe(x)}; expected fp32 [N, G, dim] with dim 2, 4 or 8")
    if not 1 <= state_bits <= MAX_STATE_BITS:
        raise PCDVQError(f"state_bits is {state_bits}; expected 1 to {MAX_STATE_BITS}")
    count = codewords.shape[0] if codewords.dim() else 0
    field_bits = count.bit_length() - 1 - state_bits - parity
    if count != 1 << max(0, field_bits + state_bits + parity) or field_bits < state_bits:
        raise PCDVQError(
            f"codewords is {describe(codewords)}; expected a power of two of them, at least "
            f"{1 << (2 * state_bits + parity)}"
        )
    for name, tensor, shape in (
        ("row_weight", row_weight, x.shape[:1]),
        ("codewords", codewords, (count, x.shape[2])),
    ):
        if tensor.dtype != x.dtype or tensor.shape != shape or tensor.device != x.device:
            raise PCDVQError(
                f"{name} is {describe(tensor)}; expected {x.dtype} {list(shape)} on {x.device}"
            )
    return field_bits


def check_windows(x: Tensor, row_weight: Tensor, table: Tensor, code_bits: int) -> None:
    """Raise PCDVQError unless the arguments of `window_codes` fit together."""
    if x.dtype != torch.float32 or x.dim() != 3 or x.shape[2] != windows.DIM:
        raise PCDVQError(f"x is {describe(x)}; expected fp32 [N, G, {windows.DIM}]")
    if code_bits not in windows.CODE_BITS:
        raise PCDVQError(f"code_bits is {code_bits}; expected one of {windows.CODE_BITS}")
    for name, tensor, shape in (
        ("row_weight", row_weight, x.shape[:1]),
        ("table", table, (1 << windows.INDEX_BITS, windows.DIM)),
    ):
        if tensor.dtype != x.dtype or tensor.shape != shape or tensor.device != x.device:
            raise PCDVQError(
                f"{name} is {describe(tensor)}; expected {x.dtype} {list(shape)} on {x.device}"
            )
