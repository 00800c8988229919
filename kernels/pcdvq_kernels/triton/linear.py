"""y = R Q x for few tokens: codes to tensor-core products, the weight never materialised."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pcdvq_kernels.arguments import expect
from pcdvq_kernels.triton.decode import as_int8, decode_part, load_tile, operand, part_rows
from pcdvq_kernels.triton.format import LANES, Format
from pcdvq_kernels.triton.hadamard import QuantizedActivations
from pcdvq_kernels.triton.tuning import INSTRUCTIONS, LinearConfig


@triton.jit
def accumulate(
    words, x, scales, tokens, padded, first, last, tiles, FMT: tl.constexpr, ASM: tl.constexpr
):
    """Sums over tiles `first` to `last` of levels times activations.

    Args:
        words: pointer to a row of tiles.
        x, scales: `QuantizedActivations`.
        tokens: int32 [M], rows of x.
        padded: rows that x has.

    Returns:
        fp32 [32, M] for the rows of `part_rows` 0, then of 1.
    """
    M: tl.constexpr = tokens.shape[0]
    LINE: tl.constexpr = 32 * FMT.lane_words
    lane = tl.arange(0, 4)[None, :, None] * 8 + tl.arange(0, 4)[None, None, :]
    x += tokens.to(tl.int64)[:, None, None] * (tiles * 32) + lane
    scales += tokens
    first_sum = tl.zeros([32, M], tl.float32)
    second_sum = tl.zeros([32, M], tl.float32)
    for tile in tl.range(first, last, num_stages=1):
        loaded = load_tile(words + tile * LINE, FMT)
        first_product = tl.zeros([32, M], tl.int32)
        second_product = tl.zeros([32, M], tl.int32)
        for half in tl.static_range(2):
            lanes = tl.load(x + tile * 32 + half * 4)  # [M, t, (b & 1, h)]
            columns = tl.permute(lanes.to(tl.uint32, bitcast=True), [0, 2, 1])
            factor = tl.trans(as_int8(tl.reshape(columns, [M, 16])))
            levels = operand(decode_part(loaded, 0, half, FMT, ASM))
            first_product = tl.dot(levels, factor, first_product, out_dtype=tl.int32)
            levels = operand(decode_part(loaded, 1, half, FMT, ASM))
            second_product = tl.dot(levels, factor, second_product, out_dtype=tl.int32)
        scale = tl.load(scales + tile * padded)[None, :]
        first_sum += first_product.to(tl.float32) * scale
        second_sum += second_product.to(tl.float32) * scale
    return first_sum, second_sum


@triton.jit
def scale_rows(acc, row_scale, bias, rows, N, BIAS: tl.constexpr):
    """Row scales and bias on [rows, M]."""
    inside = rows < N
    acc *= tl.load(row_scale + rows, mask=inside, other=0.0)[:, None]
    if BIAS:
        acc += tl.load(bias + rows, mask=inside, other=0.0).to(tl.float32)[:, None]
    return acc


@triton.jit(do_not_specialize=["M", "padded", "tiles", "split_tiles"])
def linear_kernel(
    x,
    scales,
    words,
    row_scale,
    bias,
    out,
    M,
    N,
    padded,
    tiles,
    split_tiles,
    M_TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    BIAS: tl.constexpr,
    FMT: tl.constexpr,
    ASM: tl.constexpr,
):
    """Program (g, s, m): row of tiles g, tiles of split s, M_TILE tokens.

    Writes out [M, N], or with SPLIT fp32 [splits, M, N] for `sum_splits_kernel` to finish.
    """
    LINE: tl.constexpr = 32 * FMT.lane_words
    row = tl.program_id(0)
    first = tl.program_id(1) * split_tiles
    last = tl.minimum(first + split_tiles, tiles)
    tokens = tl.program_id(2) * M_TILE + tl.arange(0, M_TILE)
    words += row.to(tl.int64) * (tiles * LINE)
    sums = accumulate(words, x, scales, tokens, padded, first, last, tiles, FMT, ASM)
    if SPLIT:
        out += tl.program_id(1).to(tl.int64) * M * N
    for part in tl.static_range(2):
        rows = part_rows(row, part)
        acc = sums[part]
        if not SPLIT:
            acc = scale_rows(acc, row_scale, bias, rows, N, BIAS)
        to = out + tokens.to(tl.int64)[None, :] * N + rows[:, None]
        inside = (rows < N)[:, None] & (tokens < M)[None, :]
        tl.store(to, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M", "SPLITS"])
def sum_splits_kernel(
    parts, row_scale, bias, out, M, N, SPLITS, BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    """out [M, N] = sum over splits of parts fp32 [SPLITS, M, N], scaled, plus bias."""
    token = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < N
    acc = tl.zeros([BLOCK], tl.float32)
    for split in range(SPLITS):
        acc += tl.load(parts + (split * M + token) * N + rows, mask=inside, other=0.0)
    y = tl.reshape(scale_rows(acc[:, None], row_scale, bias, rows, N, BIAS), [BLOCK])
    tl.store(out + token * N + rows, y.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Weight:
    """A prepacked layer.

    Attributes:
        words: int32 `fmt.weight_shape(N, K)`; for experts [E, ...].
        row_scale: fp32 [N]; for experts [E, N].
        fmt: how words are laid out.
    """

    words: Tensor
    row_scale: Tensor
    fmt: Format

    @property
    def tiles(self) -> int:
        """Tiles in a row of tiles."""
        return self.words.shape[-1] // (LANES * self.fmt.lane_words)

    def check(self, rows: int, columns: int, device: torch.device) -> None:
        """Raise PCDVQError unless the words are those of a prepacked weight [rows, columns]."""
        shape = self.fmt.weight_shape(rows, columns)
        expect("qweight", self.words, torch.int32, shape, device)


def linear(
    x: QuantizedActivations,
    weight: Weight,
    bias: Tensor | None,
    dtype: torch.dtype,
    config: LinearConfig,
) -> Tensor:
    """R Q x + b.

    Args:
        x: activations after signs, rotation and quantization, M tokens.
        weight: the layer, N rows.
        bias: float [N] or None.
        dtype: of the result.
        config: launch parameters.

    Returns:
        dtype [M, N].
    """
    m, n = x.tokens, weight.row_scale.shape[0]
    tiles, row_tiles = weight.tiles, weight.words.shape[0]
    split_tiles = -(-tiles // config.splits)
    splits = -(-tiles // split_tiles)
    out = weight.row_scale.new_empty((m, n), dtype=dtype)
    parts = out if splits == 1 else weight.row_scale.new_empty((splits, m, n))
    linear_kernel[row_tiles, splits, -(-m // config.m_tile)](
        x.values,
        x.scales,
        weight.words,
        weight.row_scale,
        weight.row_scale if bias is None else bias,
        parts,
        m,
        n,
        x.padded_tokens,
        tiles,
        split_tiles,
        M_TILE=config.m_tile,
        SPLIT=splits > 1,
        BIAS=bias is not None,
        FMT=weight.fmt,
        ASM=INSTRUCTIONS,
        num_warps=1,
    )
    return out if splits == 1 else _sum_splits(parts, weight.row_scale, bias, out)


def _sum_splits(parts: Tensor, row_scale: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """`out` [M, N], filled from parts fp32 [splits, M, N]."""
    splits, m, n = parts.shape
    sum_splits_kernel[m, -(-n // 512)](
        parts,
        row_scale,
        row_scale if bias is None else bias,
        out,
        m,
        n,
        splits,
        BIAS=bias is not None,
        BLOCK=512,
    )
    return out
