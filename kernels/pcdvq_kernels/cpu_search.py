"""The searches for codes in the compiled CPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from pcdvq_kernels.cpu import (
    CHAINS,
    NEAREST,
    check_device,
    isa_number,
    loaded,
    raise_status,
)
from pcdvq_kernels.errors import PCDVQError
from pcdvq_kernels.search_arguments import check_chains, check_nearest
from pcdvq_kernels.trellis import SINGLES_FROM

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


def chain_codes(
    x: Tensor,
    row_weight: Tensor,
    code_bits: int,
    chain_rows: int,
    effort: str = EFFORTS[0],
    *,
    isa: str = "auto",
) -> Tensor:
    """`search.chain_codes` on the CPU; `isa` is "auto" or one of `isas()`."""
    library = loaded()
    check_chains(x, row_weight, code_bits, chain_rows)
    if effort not in EFFORTS:
        raise PCDVQError(f"effort is {effort!r}; expected one of {EFFORTS}")
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
            code_bits >= SINGLES_FROM,
            chain_rows,
            EFFORTS.index(effort),
            torch.get_num_threads(),
            isa_number(isa),
        )
    )
    if status:
        raise_status(status, "chain search")
    return out
