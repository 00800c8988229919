"""The searches for codes in the compiled CPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from pcdvq_kernels.arguments import check_nearest
from pcdvq_kernels.cpu import (
    NEAREST,
    check_device,
    isa_number,
    loaded,
    raise_status,
)


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
