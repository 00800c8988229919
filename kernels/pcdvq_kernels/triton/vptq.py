"""Products with VPTQ weights: vectors gathered by their codes as tensor-core operands."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from pcdvq_kernels.triton.tuning import DEFAULT_WARPS, WARPS_PER_PROCESSOR, describe, on_its_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pcdvq_kernels.vptq.layout import Segment
    from pcdvq_kernels.vptq.ops import Shape

TILE_ROWS = 32  # at most: whole row blocks, padded to a power of two
TILE_COLUMNS = 32
TILE_TOKENS = 16  # the least that tensor cores take
WARPS = 2
SHORTEST_SPLIT = 256  # columns


@triton.jit
def load_codes(words, columns, inside, BITS: tl.constexpr):
    """Codes of rows of words [R, 1] at columns [1, C], uint32; bits above them are undefined."""
    bit = columns * BITS
    place = words + bit // 32
    low = tl.load(place, mask=inside, other=0).to(tl.uint32, bitcast=True)
    shift = (bit % 32).to(tl.uint32)
    code = low >> shift
    if 32 % BITS != 0:
        high = tl.load(place + 1, mask=inside, other=0).to(tl.uint32, bitcast=True)
        code |= (high << 1) << (31 - shift)
    return code


@triton.jit(do_not_specialize=["M", "start", "row_words", "split_columns"])
def vptq_kernel(
    x,
    words,
    table,
    out,
    M,
    N,
    skip,
    K,
    start,
    stride,
    row_words,
    split_columns,
    BLOCKS: tl.constexpr,
    LENGTH: tl.constexpr,
    PADDED: tl.constexpr,
    INDEX_BITS: tl.constexpr,
    RESIDUAL_BITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """out fp32 [splits, M, N] of a segment; program (g, s, m): BLOCKS row blocks, split s, TOKENS.

    Args:
        x: fp32 [M, stride]; the segment begins at column `start`.
        words: int32 [row blocks, row_words].
        table: rows of LENGTH; PADDED is the power of two from there.
        skip: rows of the first row blocks that are not part of the weight.
        K: columns of the segment.
    """
    blocks = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    tokens = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    first = tl.program_id(1) * split_columns
    last = tl.minimum(first + split_columns, K)
    part = tl.arange(0, PADDED)
    real = blocks * LENGTH < skip + N
    row = words + blocks.to(tl.int64)[:, None] * row_words
    x += start + tokens.to(tl.int64)[None, :] * stride
    acc = tl.zeros([BLOCKS * PADDED, TOKENS], tl.float32)
    for column in tl.range(first, last, COLUMNS, num_stages=1):
        columns = column + tl.arange(0, COLUMNS)
        inside = real[:, None] & (columns < last)[None, :]
        codes = load_codes(row, columns[None, :], inside, INDEX_BITS + RESIDUAL_BITS)
        index = (codes & ((1 << INDEX_BITS) - 1)).to(tl.int32)
        mask = inside[:, :, None] & (part < LENGTH)[None, None, :]
        place = table + part[None, None, :]
        vectors = tl.load(place + index[:, :, None] * LENGTH, mask=mask, other=0.0).to(tl.float32)
        if RESIDUAL_BITS > 0:
            residual = ((codes >> INDEX_BITS) & ((1 << RESIDUAL_BITS) - 1)).to(tl.int32)
            residual += 1 << INDEX_BITS
            more = tl.load(place + residual[:, :, None] * LENGTH, mask=mask, other=0.0)
            vectors += more.to(tl.float32)
        weight = tl.reshape(tl.permute(vectors, [0, 2, 1]), [BLOCKS * PADDED, COLUMNS])
        known = (columns < last)[:, None] & (tokens < M)[None, :]
        factors = tl.load(x + columns[:, None], mask=known, other=0.0)
        acc = tl.dot(weight, factors, acc, input_precision="tf32")
    rows = tl.reshape(blocks[:, None] * LENGTH + part[None, :], [BLOCKS * PADDED]) - skip
    fits = tl.reshape((blocks[:, None] >= 0) & (part < LENGTH)[None, :], [BLOCKS * PADDED])
    out += tl.program_id(1).to(tl.int64) * M * N
    inside = (fits & (rows >= 0) & (rows < N))[:, None] & (tokens < M)[None, :]
    tl.store(out + tokens.to(tl.int64)[None, :] * N + rows[:, None], acc, mask=inside)


@on_its_device
def linear(
    x: Tensor,
    columns: Tensor,
    scale: Tensor,
    shift: Tensor,
    codes: Sequence[Tensor],
    tables: Sequence[Tensor],
    bias: Tensor | None,
    shape: Shape,
) -> Tensor:
    """`pcdvq::vptq_linear` with codes as int32 words; arguments as in `vptq.ops`, checked."""
    rows = x.reshape(-1, x.shape[-1]).float()
    y = (rows * shift).sum(1, keepdim=True)
    if bias is not None:
        y = y + bias.float()
    y = y.expand(-1, shape.rows)
    scaled, start = rows[:, columns.long()] * scale, 0
    for segment, words, table in zip(shape.segments, codes, tables, strict=True):
        if rows.shape[0] and shape.rows:
            y = y + _segment(scaled, start, words, table, segment, shape)
        start += segment.columns
    return y.to(x.dtype).reshape(*x.shape[:-1], shape.rows)


def _segment(
    x: Tensor, start: int, words: Tensor, table: Tensor, segment: Segment, shape: Shape
) -> Tensor:
    """The product of the segment at column `start` without scale and shift, fp32 [M, N]."""
    m = x.shape[0]
    padded = triton.next_power_of_2(segment.vector_len)
    blocks = TILE_ROWS // padded
    row_tiles, token_tiles = -(-len(words) // blocks), -(-m // TILE_TOKENS)
    split = _split_columns(segment.columns, row_tiles * token_tiles, x.device)
    splits = -(-segment.columns // split)
    parts = x.new_empty((splits, m, shape.rows))
    vptq_kernel[row_tiles, splits, token_tiles](
        x,
        words,
        table,
        parts,
        m,
        shape.rows,
        shape.skip,
        segment.columns,
        start,
        x.stride(0),
        words.shape[1],
        split,
        BLOCKS=blocks,
        LENGTH=segment.vector_len,
        PADDED=padded,
        INDEX_BITS=segment.index_bits,
        RESIDUAL_BITS=segment.residual_bits,
        COLUMNS=TILE_COLUMNS,
        TOKENS=TILE_TOKENS,
        num_warps=WARPS,
    )
    return parts.sum(0)


def _split_columns(columns: int, programs: int, device: torch.device) -> int:
    """Columns of a split: so many splits that every processor has its warps."""
    found = describe(device)
    wanted = WARPS_PER_PROCESSOR.get(found.architecture, DEFAULT_WARPS) * found.processors // WARPS
    splits = max(1, min(-(-wanted // programs), columns // SHORTEST_SPLIT))
    return -(-columns // (splits * TILE_COLUMNS)) * TILE_COLUMNS
