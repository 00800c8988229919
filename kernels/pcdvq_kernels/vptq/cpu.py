"""`pcdvq::vptq_linear` in the compiled CPU kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pcdvq_kernels.arguments import ACTIVATION_DTYPES, check_columns
from pcdvq_kernels.cpu import (
    BAD_ID,
    DTYPES,
    VPTQ,
    VPTQ_SEGMENT,
    check_device,
    isa_number,
    loaded,
    raise_status,
)

if TYPE_CHECKING:
    from pcdvq_kernels.vptq.ops import Shape

TABLE_DTYPES = {**DTYPES, torch.int8: 3}


def linear(
    x: Tensor,
    columns: Tensor,
    scale: Tensor,
    shift: Tensor,
    codes: Sequence[Tensor],
    tables: Sequence[Tensor],
    bias: Tensor | None,
    shape: Shape,
    *,
    isa: str = "auto",
    out: Tensor | None = None,
) -> Tensor:
    """The operator on the CPU; arguments as in `ops`, checked.

    Args:
        shape: of `ops.check`.
        isa: "auto" or one of `cpu.isas()`.
        out: contiguous buffer to write, x.dtype [..., N]; by default a new one.

    Raises:
        PCDVQError: `columns` has an entry that is no column of x.
    """
    library = loaded()
    check_device(x)
    k = x.shape[-1]
    x = x.contiguous()
    if out is None:
        out = x.new_empty((*x.shape[:-1], shape.rows))
    if bias is not None and bias.dtype not in ACTIVATION_DTYPES:
        bias = bias.float()
    segments = b"".join(
        VPTQ_SEGMENT.pack(
            code.data_ptr(),
            table.data_ptr(),
            segment.columns,
            segment.row_bytes(),
            segment.vector_len,
            segment.index_bits,
            segment.residual_bits,
        )
        for segment, code, table in zip(shape.segments, codes, tables, strict=True)
    )
    buffer = ctypes.create_string_buffer(segments, len(segments))
    status = library.pcdvq_vptq(
        VPTQ.pack(
            x.data_ptr(),
            columns.data_ptr(),
            scale.data_ptr(),
            shift.data_ptr(),
            ctypes.addressof(buffer),
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
            *(x.numel() // k, shape.rows, k, shape.skip, len(codes)),
            DTYPES[x.dtype],
            TABLE_DTYPES[tables[0].dtype],
            0 if bias is None else DTYPES[bias.dtype],
            torch.get_num_threads(),
            isa_number(isa),
        )
    )
    if status == BAD_ID:
        check_columns(columns)
    if status:
        raise_status(status, f"pcdvq::vptq_linear {list(x.shape)} x [{shape.rows}, {k}]")
    return out
