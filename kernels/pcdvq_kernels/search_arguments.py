"""Checks of the arguments of the searches for codes, the same for every backend."""

from __future__ import annotations

import torch
from torch import Tensor

from pcdvq_kernels import trellis
from pcdvq_kernels.arguments import describe, expect
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


def check_chains(x: Tensor, row_weight: Tensor, code_bits: int, chain_rows: int) -> None:
    """Raise PCDVQError unless the arguments of `chain_codes` fit together."""
    if code_bits not in trellis.CODE_BITS or chain_rows not in trellis.CHAIN_ROWS:
        raise PCDVQError(
            f"code_bits is {code_bits} and chain_rows {chain_rows}; expected "
            f"{trellis.CODE_BITS[0]} to {trellis.CODE_BITS[-1]} and one of {trellis.CHAIN_ROWS}"
        )
    fits = x.dim() == 2 and not x.shape[0] % chain_rows and not x.shape[1] % trellis.PAIR
    if x.dtype != torch.float32 or not fits:
        raise PCDVQError(
            f"x is {describe(x)}; expected fp32 [N, K], N a multiple of {chain_rows}, "
            f"K of {trellis.PAIR}"
        )
    expect("row_weight", row_weight, torch.float32, x.shape[:1], x.device)
