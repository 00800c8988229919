"""The dense weight: levels of whole tiles for prefill, rows of W' for embeddings."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pcdvq_kernels.triton.decode import (
    MULTIPLIER,
    decode_part,
    half_columns,
    load_tile,
    operand,
    part_rows,
)
from pcdvq_kernels.triton.format import TILE_COLUMNS, TILE_ROWS
from pcdvq_kernels.triton.hadamard import hadamard, negate, warps_for
from pcdvq_kernels.triton.linear import Weight
from pcdvq_kernels.triton.tuning import INSTRUCTIONS

# Levels to one: a product with fp16 activations is then of about the size of the layer's output,
# and levels are no subnormal numbers.
UNITS = 4096


@triton.jit(do_not_specialize=["tiles"])
def levels_kernel(
    words, out, N, K, tiles, UNIT: tl.constexpr, FMT: tl.constexpr, ASM: tl.constexpr
):
    """out [N, K] = UNIT Q; program (g, tile, part) has a quarter of a tile."""
    LINE: tl.constexpr = 32 * FMT.lane_words
    row = tl.program_id(0)
    tile = tl.program_id(1)
    for part in tl.static_range(4):
        if tl.program_id(2) == part:
            loaded = load_tile(words + (row.to(tl.int64) * tiles + tile) * LINE, FMT)
            levels = operand(decode_part(loaded, part // 2, part % 2, FMT, ASM))
            rows = part_rows(row, part // 2)
            columns = half_columns(tile, part % 2)
            to = out + rows.to(tl.int64)[:, None] * K + columns[None, :]
            inside = (rows < N)[:, None] & (columns < K)[None, :]
            values = levels.to(tl.float32) * UNIT
            tl.store(to, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def row_words(words, vector, lane, word, mask):
    """Words of lanes of vectors of a row of tiles, uint32."""
    place = (vector * 32 + lane) * 4 + word
    return tl.load(words + place, mask=mask, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def low_words(words, vector, lane, b, q, inside, FMT: tl.constexpr):
    """Low bytes of pieces (b, q) of a row of tiles, uint64: two of them at 3 bits, else four."""
    if FMT.code_bits == 3:
        word = row_words(words, vector + b // 2, lane, b % 2 * 2 + q // 2, inside)
        return ((word >> (16 * (q % 2)).to(tl.uint32)) & 0xFFFF).to(tl.uint64)
    else:
        return row_words(words, vector + b, lane, q, inside).to(tl.uint64)


@triton.jit
def row_windows(words, row, columns, inside, FMT: tl.constexpr):
    """Windows of one row's weights in int32 [COLUMNS], uint32."""
    BITS: tl.constexpr = FMT.code_bits
    LANES: tl.constexpr = FMT.chain_lanes
    LOW: tl.constexpr = 2 if BITS == 3 else 4
    PAIRS: tl.constexpr = 8 // LANES
    j = row % 8
    r = row % 64 // 8
    vector = columns // 128 * BITS
    b, t, q = columns // 32 % 4, columns // 8 % 4, columns // 2 % 4
    lane = 4 * r + t
    piece = low_words(words, vector, lane, b, q, inside, FMT)
    if BITS == 8:
        high = row_words(words, vector + 4 + b, lane, q, inside).to(tl.uint64)
        piece |= high << 32
    else:
        for byte in tl.static_range(LOW, BITS):
            word = row_words(words, vector + byte, lane, b, inside)
            piece |= ((word >> (8 * q).to(tl.uint32)) & 255).to(tl.uint64) << (8 * byte)
    starts = r % LANES == 0
    lane = 4 * (r // LANES * LANES + (r + LANES - 1) % LANES) + t
    entered = tl.where(starts, q // PAIRS * PAIRS + (q + PAIRS - 1) % PAIRS, q)
    before = low_words(words, vector, lane, b, entered, inside, FMT)
    shift = BITS * (7 - j) + tl.zeros(columns.shape, tl.int32)
    if FMT.singles:
        shift += tl.where(columns % 2 == 0, BITS - FMT.window_bits, 0)
    # Bits of the piece above `shift`, then those before it: none if 16 are above.
    above = tl.minimum(8 * BITS - shift, 16)
    window = (piece >> shift.to(tl.uint64)) | (before << above.to(tl.uint64))
    return (window & 0xFFFF).to(tl.uint32)


@triton.jit
def row_levels(words, row, columns, inside, tiles, FMT: tl.constexpr):
    """Levels of one row at int32 [COLUMNS], fp32, a weight at a time."""
    words += row // 64 * (tiles * (32 * FMT.lane_words))
    row = (row % 64).to(tl.int32)
    if FMT.code_bits == 0:
        b, t, h, c = columns // 32 % 4, columns // 8 % 4, columns // 4 % 2, columns % 4
        vector = columns // 128 * 16 + 4 * b + row % 8 // 2
        word = row_words(words, vector, row // 8 * 4 + t, row % 2 * 2 + h, inside)
        return (word >> (8 * c).to(tl.uint32)).to(tl.int8).to(tl.float32)
    else:
        product = row_windows(words, row, columns, inside, FMT) * MULTIPLIER
        u = ((product & 255) + ((product >> 16) & 255) + 1) >> 1
        v = (((product >> 8) & 255) + (product >> 24) + 1) >> 1
        level = (u + v + 1) >> 1 if FMT.singles else tl.where(columns % 2 == 0, u, v)
        return level.to(tl.float32) - 128.0


@triton.jit(do_not_specialize=["tiles"])
def embedding_kernel(
    ids,
    words,
    row_scale,
    signs,
    out,
    N,
    K,
    tiles,
    FMT: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    LOG: tl.constexpr,
):
    """out [ids, K] = rows of R Q H S; program (id, c) has COLUMNS columns, whole blocks."""
    place = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.load(ids + place).to(tl.int64)
    known = (row >= 0) & (row < N)
    row = tl.where(known, row, 0)
    inside = columns < K
    levels = row_levels(words, row, columns, inside, tiles, FMT)
    levels = tl.where(inside, levels, 0.0)
    scale = tl.where(known, tl.load(row_scale + row), float("nan"))
    dense = negate(hadamard(levels, BLOCK, LOG), signs, columns, inside) * scale
    tl.store(out + place * K + columns, dense.to(out.dtype.element_ty), mask=inside)


def levels(weight: Weight, in_features: int, dtype: torch.dtype, rows: slice) -> Tensor:
    """Rows of Q / `UNITS`, exact in every dtype.

    Args:
        weight: the layer, N rows.
        in_features: K.
        dtype: of the result.
        rows: which rows; starts at a multiple of 64.

    Returns:
        dtype [rows, K].
    """
    first = rows.start // TILE_ROWS
    n = weight.row_scale[rows].shape[0]
    words = weight.words[first : first - (-n // TILE_ROWS)]
    out = torch.empty((n, in_features), dtype=dtype, device=words.device)
    levels_kernel[words.shape[0], weight.tiles, 4](
        words,
        out,
        n,
        in_features,
        weight.tiles,
        UNIT=1 / UNITS,
        FMT=weight.fmt,
        ASM=INSTRUCTIONS,
        num_warps=1,
    )
    return out


def embedding(
    ids: Tensor, weight: Weight, signs_in: Tensor, block: int, dtype: torch.dtype
) -> Tensor:
    """Rows of the dense weight W' = R Q H S, decoded, rotated and scaled in one launch.

    Args:
        ids: int32 or int64 [...]; one that is no row gives NaN.
        weight: the layer.
        signs_in: uint8 [K / 8].
        block: Hadamard block.
        dtype: of the result.

    Returns:
        dtype [..., K].
    """
    k = 8 * signs_in.shape[0]
    out = torch.empty((*ids.shape, k), dtype=dtype, device=ids.device)
    columns = max(block, TILE_COLUMNS)
    if ids.numel():
        embedding_kernel[ids.numel(), -(-k // columns)](
            ids.contiguous(),
            weight.words,
            weight.row_scale,
            signs_in,
            out,
            weight.row_scale.shape[0],
            k,
            weight.tiles,
            FMT=weight.fmt,
            COLUMNS=columns,
            BLOCK=block,
            LOG=block.bit_length() - 1,
            num_warps=warps_for(columns),
        )
    return out


def dequantize(weight: Weight, signs_in: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """The whole dense weight W' = R Q H S, dtype [N, K]."""
    rows = torch.arange(weight.row_scale.shape[0], device=signs_in.device)
    return embedding(rows, weight, signs_in, block, dtype)
