"""The searches for codes in the compiled CPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from pcdvq_kernels.cpu import (
    NEAREST,
    TRELLIS,
    WINDOWS,
    check_device,
    isa_number,
    loaded,
    raise_status,
)
from pcdvq_kernels.search_arguments import check_nearest, check_trellis, check_windows


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
