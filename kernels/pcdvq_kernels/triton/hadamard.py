"""Signs, block Hadamard transform and quantization of activations, in one launch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pcdvq_kernels.triton.format import TILE_COLUMNS

MAX_LEVEL = tl.constexpr(127.0)
LEAST_SCALE = tl.constexpr(2.0**-126)  # whose inverse is finite; below, activations count as 0


@dataclass(frozen=True)
class QuantizedActivations:
    """H S x of M tokens in int8, with a scale per token and 128 columns.

    Attributes:
        values: int32 [padded tokens, tiles, 4, 8], four int8 each: [t][b][h][c] of `format`.
        scales: fp32 [tiles, padded tokens].
        tokens: M; the rows past them are 0.
    """

    values: Tensor
    scales: Tensor
    tokens: int

    @property
    def padded_tokens(self) -> int:
        return self.values.shape[0]


@triton.jit
def negate(values, signs, columns, inside):
    """`values` with the signs of `signs` uint8 [K / 8]."""
    byte = tl.load(signs + columns // 8, mask=inside, other=0)
    return tl.where((byte >> (columns % 8).to(tl.uint8)) & 1 != 0, -values, values)


@triton.jit
def hadamard(values, BLOCK: tl.constexpr, LOG: tl.constexpr):
    """Orthonormal Hadamard transform of each BLOCK = 2 ** LOG of fp32 [COLUMNS]."""
    COLUMNS: tl.constexpr = values.shape[0]
    for level in tl.static_range(LOG):
        pairs = tl.reshape(values, [COLUMNS >> (level + 1), 2, 1 << level])
        low, high = tl.split(tl.permute(pairs, [0, 2, 1]))
        pairs = tl.join(low + high, low - high)
        values = tl.reshape(tl.permute(pairs, [0, 2, 1]), [COLUMNS])
    return values * BLOCK**-0.5


@triton.jit
def rotate_kernel(x, signs, out, K, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, LOG: tl.constexpr):
    """out [M, K] = H S x; program (m, c) has COLUMNS columns, a multiple of BLOCK."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < K
    values = tl.load(x + token * K + columns, mask=inside, other=0.0).to(tl.float32)
    values = hadamard(negate(values, signs, columns, inside), BLOCK, LOG)
    tl.store(out + token * K + columns, values.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M", "tiles", "padded"])
def rotate_quantize_kernel(
    x,
    signs,
    out,
    scales,
    M,
    K,
    tiles,
    padded,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    LOG: tl.constexpr,
):
    """`QuantizedActivations`; program (m, c) has COLUMNS columns, a multiple of BLOCK and 128."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < tl.where(token < M, K, 0)  # padding is 0
    values = tl.load(x + token * K + columns, mask=inside, other=0.0).to(tl.float32)
    values = hadamard(negate(values, signs, columns, inside), BLOCK, LOG)
    values = tl.reshape(values, [COLUMNS // 128, 128])
    scale = tl.max(tl.abs(values), 1) / MAX_LEVEL
    scale = tl.where(scale < LEAST_SCALE, 0.0, scale)
    # A maximum drops NaN: a block with one, or with an infinity, has the scale NaN.
    scale += tl.sum(values * 0.0, 1)
    inverse = tl.where(scale > 0, 1.0 / scale, 0.0)
    levels = tl.floor(values * inverse[:, None] + 0.5)
    levels = tl.where((scale == scale)[:, None], levels, 0.0)
    tile = tl.program_id(1) * (COLUMNS // 128) + tl.arange(0, COLUMNS // 128)
    tl.store(scales + tile.to(tl.int64) * padded + token, scale, mask=tile < tiles)
    # Column 32 b + 8 t + 4 h + c of a tile goes to 32 t + 8 b + 4 h + c.
    column = tl.arange(0, 128)
    place = column // 8 % 4 * 32 + column // 32 * 8 + column % 8
    to = out + (token * tiles + tile)[:, None] * 128 + place[None, :]
    tl.store(to, levels.to(tl.int8), mask=(tile < tiles)[:, None])


def rotate(x: Tensor, signs_in: Tensor, block: int) -> Tensor:
    """H S x.

    Args:
        x: bf16, fp16 or fp32 [M, K], contiguous.
        signs_in: uint8 [K / 8].
        block: Hadamard block.

    Returns:
        x.dtype [M, K], computed in fp32.
    """
    m, k = x.shape
    out = torch.empty_like(x)
    columns = max(block, TILE_COLUMNS)
    rotate_kernel[m, -(-k // columns)](
        x,
        signs_in,
        out,
        k,
        COLUMNS=columns,
        BLOCK=block,
        LOG=block.bit_length() - 1,
        num_warps=warps_for(columns),
    )
    return out


def rotate_quantize(x: Tensor, signs_in: Tensor, block: int, multiple: int) -> QuantizedActivations:
    """H S x, quantized to int8.

    Args:
        x: bf16, fp16 or fp32 [M, K], contiguous.
        signs_in: uint8 [K / 8].
        block: Hadamard block.
        multiple: what the tokens are padded to a multiple of.
    """
    m, k = x.shape
    tiles = -(-k // TILE_COLUMNS)
    padded = -(-m // multiple) * multiple
    values = torch.empty((padded, tiles, 4, 8), dtype=torch.int32, device=x.device)
    scales = torch.empty((tiles, padded), device=x.device)
    columns = max(block, TILE_COLUMNS)
    rotate_quantize_kernel[padded, -(-k // columns)](
        x,
        signs_in,
        values.view(torch.int8),
        scales,
        m,
        k,
        tiles,
        padded,
        COLUMNS=columns,
        BLOCK=block,
        LOG=block.bit_length() - 1,
        num_warps=warps_for(columns),
    )
    return QuantizedActivations(values, scales, m)


def warps_for(columns: int) -> int:
    """Eight columns to a lane, at most eight warps."""
    return max(1, min(8, columns // 256))
