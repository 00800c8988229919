"""The searches for codes in the compiled CPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from pcdvq_kernels.arguments import check_nearest, check_trellis, check_windows
from pcdvq_kernels.cpu import (
    CHAINS,
    NEAREST,
    TRELLIS,
    WINDOWS,
    check_device,
    isa_number,
    loaded,
    raise_status,
)
from pcdvq_kernels.errors import PCDVQError

CHAIN_CODE_BITS = range(3, 9)
CHAIN_ROWS = (64, 32, 16)
EFFORTS = ("exhaustive", "quick")  # by their number in a PcdvqChains


def nearest(x: Tensor, codewords: Tensor, bias: Tensor, *, isa: str = "auto") -> Tensor:
    """Nearest codeword of each group: argmax over c of x . codewords[c] - bias[c].

    Args:
        x: fp32 [G, dim], dim 2, 4 or 8, on the CPU, finite.
        codewords: fp32 [C, dim].
        bias: fp32 [C]; half the squared norms for the nearest in Euclidean distance.
        isa: "auto" or one of `isas()`.

    Returns:
        int32 [G]; of equal scores the lowest index.

    Raises:
        PCDVQError: other dtypes, shapes or devices.
    """
    library = loaded()
    check_nearest(x, codewords, bias)
    check_device(x)
    x, codewords, bias = x.contiguous(), codewords.contiguous(), bias.contiguous()
    out = torch.empty(x.shape[0], dtype=torch.int32)
    status = library.pcdvq_nearest(
        NEAREST.pack(
            x.data_ptr(),
            codewords.data_ptr(),
            bias.data_ptr(),
            out.data_ptr(),
            x.shape[0],
            codewords.shape[0],
            x.shape[1],
            torch.get_num_threads(),
            isa_number(isa),
        )
    )
    if status:
        raise_status(status, "nearest codeword")
    return out


def trellis(
    x: Tensor,
    row_weight: Tensor,
    codewords: Tensor,
    parity: bool,
    state_bits: int,
    *,
    isa: str = "auto",
) -> Tensor:
    """`trellis_codes` on the CPU; `isa` is "auto" or one of `isas()`."""
    library = loaded()
    field_bits = check_trellis(x, row_weight, codewords, parity, state_bits)
    check_device(x)
    x, row_weight, codewords = x.contiguous(), row_weight.contiguous(), codewords.contiguous()
    bias = codewords.square().sum(1) / 2
    out = torch.empty(x.shape[:2], dtype=torch.int32)
    status = library.pcdvq_trellis(
        TRELLIS.pack(
            x.data_ptr(),
            row_weight.data_ptr(),
            codewords.data_ptr(),
            bias.data_ptr(),
            out.data_ptr(),
            x.shape[0],
            x.shape[1],
            x.shape[2],
            parity,
            field_bits,
            state_bits,
            torch.get_num_threads(),
            isa_number(isa),
        )
    )
    if status:
        raise_status(status, "trellis search")
    return out


def window_codes(
    x: Tensor, row_weight: Tensor, table: Tensor, code_bits: int, *, isa: str = "auto"
) -> Tensor:
    """`trellis.window_codes` on the CPU; `isa` is "auto" or one of `isas()`."""
    library = loaded()
    check_windows(x, row_weight, table, code_bits)
    check_device(x)
    x, row_weight, table = x.contiguous(), row_weight.contiguous(), table.contiguous()
    out = torch.empty(x.shape[:2], dtype=torch.int32)
    status = library.pcdvq_windows(
        WINDOWS.pack(
            x.data_ptr(),
            row_weight.data_ptr(),
            table.data_ptr(),
            out.data_ptr(),
            x.shape[0],
            x.shape[1],
            code_bits,
            torch.get_num_threads(),
            isa_number(isa),
        )
    )
    if status:
        raise_status(status, "window search")
    return out


def chain_codes(
    x: Tensor,
    row_weight: Tensor,
    code_bits: int,
    singles: bool,
    chain_rows: int,
    effort: str,
    *,
    isa: str = "auto",
) -> Tensor:
    """`trellis.chain_codes` on the CPU; `isa` is "auto" or one of `isas()`."""
    library = loaded()
    _check_chains(x, row_weight, code_bits, chain_rows, effort)
    check_device(x)
    x, row_weight = x.contiguous(), row_weight.contiguous()
    out = torch.empty(x.shape[0], x.shape[1] // 2, dtype=torch.uint8)
    status = library.pcdvq_chains(
        CHAINS.pack(
            x.data_ptr(),
            row_weight.data_ptr(),
            out.data_ptr(),
            *x.shape,
            code_bits,
            singles,
            chain_rows,
            EFFORTS.index(effort),
            torch.get_num_threads(),
            isa_number(isa),
        )
    )
    if status:
        raise_status(status, "chain search")
    return out


def _check_chains(
    x: Tensor, row_weight: Tensor, code_bits: int, chain_rows: int, effort: str
) -> None:
    if code_bits not in CHAIN_CODE_BITS:
        raise PCDVQError(f"code_bits is {code_bits}; expected one of {[*CHAIN_CODE_BITS]}")
    if chain_rows not in CHAIN_ROWS:
        raise PCDVQError(f"chain_rows is {chain_rows}; expected one of {CHAIN_ROWS}")
    if effort not in EFFORTS:
        raise PCDVQError(f"effort is {effort!r}; expected one of {EFFORTS}")
    shape = list(x.shape)
    if x.dtype != torch.float32 or len(shape) != 2 or shape[1] % 2:
        raise PCDVQError(f"x is {x.dtype} {shape}; expected fp32 [N, K] with an even K")
    if shape[0] % chain_rows:
        raise PCDVQError(
            f"x has {shape[0]} rows; expected a multiple of chain_rows {chain_rows}: append rows "
            "of weight 0"
        )
    if row_weight.dtype != x.dtype or row_weight.shape != x.shape[:1] or not row_weight.is_cpu:
        raise PCDVQError(
            f"row_weight is {row_weight.dtype} {list(row_weight.shape)} on {row_weight.device}; "
            f"expected fp32 {shape[:1]} on the CPU"
        )
