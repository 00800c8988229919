"""The dense weight: levels of whole tiles for prefill, rows of W' for embeddings."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pcdvq_kernels.triton.decode import decode_half, fold, load_tile, operand
from pcdvq_kernels.triton.format import TILE_COLUMNS, TILE_ROWS
from pcdvq_kernels.triton.hadamard import hadamard, negate, warps_for
from pcdvq_kernels.triton.linear import Weight, tile_rows
from pcdvq_kernels.triton.tuning import INSTRUCTIONS


@triton.jit(do_not_specialize=["tiles"])
def levels_kernel(words, table, row_scale, out, N, K, tiles, FMT: tl.constexpr, ASM: tl.constexpr):
    """out [N, K] = R Q; program (g, tile) has a tile."""
    LINE: tl.constexpr = 32 * FMT.lane_words
    SIGNS: tl.constexpr = FMT.signs
    words += tl.program_id(0).to(tl.int64) * (tiles * LINE)
    tile = tl.program_id(1)
    rows = tile_rows(tl.program_id(0))
    scale = tl.load(row_scale + rows, mask=rows < N, other=0.0)
    d = tl.arange(0, 64)
    loaded = load_tile(words, tile, tiles, FMT)
    for half in tl.static_range(2):
        levels, masks = decode_half(loaded, table, half, FMT, ASM)
        values = operand(levels)
        if SIGNS:
            values += operand(masks) + 1
        columns = tile * 128 + half * 64 + d // 32 * 32 + d // 4 % 4 * 8 + d // 16 % 2 * 4 + d % 4
        to = out + rows.to(tl.int64)[:, None] * K + columns[None, :]
        inside = (rows < N)[:, None] & (columns < K)[None, :]
        dense = values.to(tl.float32) * scale[:, None]
        tl.store(to, dense.to(out.dtype.element_ty), mask=inside)


@triton.jit
def plane_word(plane, tile, lane, word, WORDS: tl.constexpr, mask):
    """Words `word` of lanes `lane` of a plane of `load_words`, uint32."""
    LOAD: tl.constexpr = WORDS if WORDS < 4 else 4
    place = tile * (32 * WORDS) + word // LOAD * (32 * LOAD) + lane * LOAD + word % LOAD
    return tl.load(plane + place, mask=mask, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def row_levels(words, table, row, columns, inside, tiles, FMT: tl.constexpr):
    """Levels of one row at int32 [COLUMNS], fp32, a weight at a time."""
    DIM: tl.constexpr = FMT.vector_dim
    SIGNS: tl.constexpr = FMT.signs
    PARITY: tl.constexpr = FMT.parity
    STATE: tl.constexpr = FMT.state_bits
    INDEX_WORDS: tl.constexpr = FMT.index_words
    WIDTH: tl.constexpr = FMT.extra_width
    TOP: tl.constexpr = FMT.top_width
    LINE: tl.constexpr = 32 * FMT.lane_words
    words += row // 32 * (tiles * LINE)
    i = (row % 4).to(tl.int32)
    r = (row % 32 // 4).to(tl.int32)
    tile = columns // 128
    b, t, h, j = columns // 32 % 4, columns // 8 % 4, columns // 4 % 2, columns % 4
    lane = 4 * r + t
    if DIM == 1:
        word = plane_word(words, tile, lane, 8 * i + 2 * b + h, 32, inside)
        return (word >> (8 * j).to(tl.uint32)).to(tl.int8).to(tl.float32)
    bit = (i + 4 * (b % 2)).to(tl.uint32)
    high = tl.zeros(columns.shape, tl.uint32)
    negative = inside
    if SIGNS:
        pair = b // 2 * 2
        sign = plane_word(words, tile, lane, pair + h, 4, inside)
        negative = (sign >> (8 * j.to(tl.uint32) + bit)) & 1 == 0
        if PARITY:
            if DIM == 8:
                sign ^= plane_word(words, tile, lane, pair + 1 - h, 4, inside)
            high = (fold(sign) >> bit) & 1
        words += tiles * 128
    q = b if DIM == 8 else 2 * b + h
    byte = (8 * i).to(tl.uint32)
    index = plane_word(words, tile, lane, q, INDEX_WORDS, inside)
    low = (index >> byte) & 255
    if STATE > 0:
        # The row above is in this lane, or the last of the lane four before; where a segment
        # starts, what is read there counts for nothing.
        owner = tl.maximum(lane - tl.where(i == 0, 4, 0), 0)
        above = plane_word(words, tile, owner, q, INDEX_WORDS, inside)
        above >>= (8 * ((i + 3) % 4) + 8 - STATE).to(tl.uint32)
        mask = tl.where(row % 16 == 0, 0, (1 << STATE) - 1).to(tl.uint32)
        high |= (above & mask) << PARITY
    words += tiles * (32 * INDEX_WORDS)
    if WIDTH > 0:
        extra = plane_word(words, tile, lane, q * WIDTH // 8, INDEX_WORDS * WIDTH // 8, inside)
        extra >>= byte + (q * WIDTH % 8).to(tl.uint32)
        high |= (extra & ((1 << WIDTH) - 1)) << (PARITY + STATE)
        words += tiles * (4 * INDEX_WORDS * WIDTH)
    if TOP > 0:
        extra = plane_word(words, tile, lane, q * TOP // 8, INDEX_WORDS * TOP // 8, inside)
        extra >>= byte + (q * TOP % 8).to(tl.uint32)
        high |= (extra & ((1 << TOP) - 1)) << 8
    place = (low | (high << 8)) * DIM + (4 * h * (DIM == 8) + j).to(tl.uint32)
    level = tl.load(table + place, mask=inside, other=0).to(tl.float32)
    if SIGNS:
        level = tl.where(negative, level + 1, -1 - level)
    return level


@triton.jit(do_not_specialize=["tiles"])
def embedding_kernel(
    ids,
    words,
    table,
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
    levels = row_levels(words, table, row, columns, inside, tiles, FMT)
    levels = tl.where(inside, levels, 0.0)
    scale = tl.where(known, tl.load(row_scale + row), float("nan"))
    dense = negate(hadamard(levels, BLOCK, LOG), signs, columns, inside) * scale
    tl.store(out + place * K + columns, dense.to(out.dtype.element_ty), mask=inside)


def levels(weight: Weight, in_features: int, dtype: torch.dtype, rows: slice) -> Tensor:
    """Rows of R Q, the weight that rotated activations are multiplied with.

    Args:
        weight: the layer, N rows.
        in_features: K.
        dtype: of the result.
        rows: which rows; starts at a multiple of 32.

    Returns:
        dtype [rows, K].
    """
    row_scale = weight.row_scale[rows]
    first = rows.start // TILE_ROWS
    n = row_scale.shape[0]
    words = weight.words[first : first - (-n // TILE_ROWS)]
    out = row_scale.new_empty((n, in_features), dtype=dtype)
    levels_kernel[words.shape[0], weight.tiles](
        words,
        weight.entries(),
        row_scale,
        out,
        n,
        in_features,
        weight.tiles,
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
            weight.table,
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
