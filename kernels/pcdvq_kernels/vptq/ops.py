"""The operator on VPTQ weights, y = W x + b:

    torch.ops.pcdvq.vptq_linear(x, columns, scale, shift, codes, tables, bias, layout) -> Tensor

    x        bf16, fp16 or fp32 [..., K]; any M = product of the leading sizes, also 0
    columns  int32 [K]: column of x of each column of the codes
    scale    fp32 [K], in the order of the codes
    shift    fp32 [K], in the order of x
    codes    for each segment uint8 [blocks, row_bytes], or int32 words for the Triton kernels
    tables   for each segment bf16, fp16, fp32 or int8 [rows * vector_len + TABLE_SLACK], all alike
    bias     any float dtype [N], or None
    layout   N, rows to skip, and of each segment its `Segment`
    returns  x.dtype [..., N]

W[n, columns[c]] = scale[c] * (centroid + residual)[c] + shift[columns[c]] for row block and place
of row n + skip. `weight.pack_weight` makes all of it from a checkpoint's tensors.

Importing this module registers the operator. It raises PCDVQError (a ValueError) for arguments that
do not fit together, on the CPU also for columns outside of [0, K), which elsewhere the device
reports as it does for any index. Whatever bits codes have they stay inside of the tables. On the
CPU the result for a row of x does not depend on the others or on the number of threads; the Triton
kernels multiply with 11 significant bits (TF32).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import lcm
from typing import NamedTuple

import torch
from torch import Tensor

from pcdvq_kernels import cpu
from pcdvq_kernels.arguments import (
    ACTIVATION_DTYPES,
    check_activations,
    check_columns,
    check_same_device,
    expect,
)
from pcdvq_kernels.errors import PCDVQError
from pcdvq_kernels.fallback import warn_slow
from pcdvq_kernels.ops import check_words_on_cpu
from pcdvq_kernels.packing import unpack_codes
from pcdvq_kernels.vptq import cpu as vptq_cpu
from pcdvq_kernels.vptq.layout import MOST_ROWS, Segment
from pcdvq_kernels.vptq.weight import TABLE_SLACK

CHUNK_WEIGHTS = 1 << 20  # decoded at a time by the fallback


class Shape(NamedTuple):
    """What the operator's `layout` says.

    Attributes:
        rows: N.
        skip: rows of the first row blocks that are not part of the weight.
        segments: the segments.
    """

    rows: int
    skip: int
    segments: tuple[Segment, ...]

    def blocks(self, segment: Segment) -> int:
        return -(-(self.skip + self.rows) // segment.vector_len)


@lru_cache(maxsize=4096)
def _shape(layout: tuple[int, ...]) -> Shape:
    if len(layout) < 6 or (len(layout) - 2) % 4:
        raise PCDVQError(
            f"layout has {len(layout)} integers, expected 2 and 4 for each segment. Make it with "
            "pcdvq_kernels.vptq.weight.pack_weight."
        )
    segments = tuple(Segment(*layout[i : i + 4]) for i in range(2, len(layout), 4))
    for segment in segments:
        if (
            not 1 <= segment.vector_len <= MOST_ROWS
            or not 1 <= segment.index_bits <= 16
            or not 0 <= segment.residual_bits <= 16
            or segment.columns < 1
        ):
            raise PCDVQError(
                f"{segment} is out of bounds: vector_len in [1, {MOST_ROWS}], index_bits in "
                "[1, 16], residual_bits in [0, 16], at least one column"
            )
    if layout[0] < 0 or not 0 <= layout[1] < lcm(*(each.vector_len for each in segments)):
        raise PCDVQError(f"layout begins with {layout[:2]}: rows, and what to skip of one block")
    return Shape(layout[0], layout[1], segments)


def check(
    x: Tensor,
    columns: Tensor,
    scale: Tensor,
    shift: Tensor,
    codes: Sequence[Tensor],
    tables: Sequence[Tensor],
    bias: Tensor | None,
    layout: Sequence[int],
) -> Shape:
    """Raise PCDVQError unless the arguments fit together; no values are looked at."""
    shape = _shape(tuple(layout))
    k = sum(segment.columns for segment in shape.segments)
    check_activations(x)
    if x.shape[-1] != k:
        raise PCDVQError(f"x is {x.dtype} {list(x.shape)}; expected bf16, fp16 or fp32 [..., {k}]")
    expect("columns", columns, torch.int32, (k,), x.device)
    expect("scale", scale, torch.float32, (k,), x.device)
    expect("shift", shift, torch.float32, (k,), x.device)
    if not len(codes) == len(tables) == len(shape.segments):
        raise PCDVQError(
            f"there are {len(codes)} codes and {len(tables)} tables for {len(shape.segments)} "
            "segments; give one of each for every segment"
        )
    kind = torch.int32 if codes[0].dtype == torch.int32 else torch.uint8
    if kind == torch.int32 and x.is_cpu:
        check_words_on_cpu("codes")
    dtype = tables[0].dtype
    if dtype not in (*ACTIVATION_DTYPES, torch.int8):
        raise PCDVQError(f"tables are {dtype}; expected bf16, fp16, fp32 or int8")
    for segment, code, table in zip(shape.segments, codes, tables, strict=True):
        row = segment.row_bytes() // kind.itemsize
        expect("codes", code, kind, (shape.blocks(segment), row), x.device)
        size = segment.rows * segment.vector_len + TABLE_SLACK
        expect("table", table, dtype, (size,), x.device)
    if bias is not None:
        if not bias.is_floating_point():
            raise PCDVQError(f"bias is {bias.dtype}; expected a float dtype")
        expect("bias", bias, bias.dtype, (shape.rows,), x.device)
    return shape


def fallback(
    x: Tensor,
    columns: Tensor,
    scale: Tensor,
    shift: Tensor,
    codes: Sequence[Tensor],
    tables: Sequence[Tensor],
    bias: Tensor | None,
    shape: Shape,
) -> Tensor:
    """The operator in torch, in fp32 and a chunk of rows at a time; slow."""
    warn_slow(x.device.type)
    if x.is_cpu:  # elsewhere looking would wait for the device, which checks itself
        check_columns(columns)
    rows = x.reshape(-1, x.shape[-1]).float()
    scaled = (rows[:, columns.long()] * scale).split([s.columns for s in shape.segments], dim=1)
    y = (rows * shift).sum(1, keepdim=True).repeat(1, shape.skip + shape.rows)
    for segment, code, table, part in zip(shape.segments, codes, tables, scaled, strict=True):
        step = max(1, CHUNK_WEIGHTS // (segment.columns * segment.vector_len))
        for first in range(0, len(code), step):
            dense = _decode(code[first : first + step], table, segment)
            start = first * segment.vector_len
            to = y[:, start : start + len(dense)]
            to += part @ dense[: to.shape[1]].T
    y = y[:, shape.skip :]
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], shape.rows)


def _decode(codes: Tensor, table: Tensor, segment: Segment) -> Tensor:
    """The weight of some row blocks without scale and shift, fp32 [rows, columns]."""
    vectors = table[:-TABLE_SLACK].float().view(-1, segment.vector_len)
    found = unpack_codes(codes.view(torch.uint8), segment.bits, segment.columns)
    dense = vectors[found & ((1 << segment.index_bits) - 1)]
    if segment.residual_bits:
        dense = dense + vectors[(found >> segment.index_bits) + (1 << segment.index_bits)]
    return dense.transpose(1, 2).flatten(0, 1)


def _vptq_linear(
    x: Tensor,
    columns: Tensor,
    scale: Tensor,
    shift: Tensor,
    codes: Sequence[Tensor],
    tables: Sequence[Tensor],
    bias: Tensor | None,
    layout: Sequence[int],
) -> Tensor:
    shape = check(x, columns, scale, shift, codes, tables, bias, layout)
    arguments = x, columns, scale, shift, codes, tables, bias, shape
    if codes[0].dtype == torch.int32:
        from pcdvq_kernels.triton import vptq

        return vptq.linear(*arguments)
    if x.is_cpu and cpu.available():
        return vptq_cpu.linear(*arguments)
    return fallback(*arguments)


def _vptq_linear_fake(
    x: Tensor,
    columns: Tensor,
    scale: Tensor,
    shift: Tensor,
    codes: Sequence[Tensor],
    tables: Sequence[Tensor],
    bias: Tensor | None,
    layout: Sequence[int],
) -> Tensor:
    check_same_device(x, columns, scale, shift, *codes, *tables, bias)
    return x.new_empty(*x.shape[:-1], _shape(tuple(layout)).rows)


# Registrations last as long as this object.
_LIBRARY = torch.library.Library("pcdvq", "FRAGMENT")
_LIBRARY.define(
    "vptq_linear(Tensor x, Tensor columns, Tensor scale, Tensor shift, Tensor[] codes, "
    "Tensor[] tables, Tensor? bias, int[] layout) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("vptq_linear", _vptq_linear, "CompositeExplicitAutograd")
torch.library.register_fake("pcdvq::vptq_linear", _vptq_linear_fake, lib=_LIBRARY)
