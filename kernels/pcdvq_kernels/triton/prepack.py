"""From a checkpoint's codes to the words of `format`; runs once, when a model loads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from pcdvq_kernels.arguments import LayoutFields
from pcdvq_kernels.fallback import decode_levels
from pcdvq_kernels.packing import unpack_codes
from pcdvq_kernels.triton.format import (
    LANE_ROWS,
    LANES,
    TILE_COLUMNS,
    TILE_ROWS,
    Format,
    format_of,
)
from pcdvq_kernels.triton.tuning import describe

# Bounds scratch: packing holds a few int64 per weight of a chunk of rows.
CHUNK_WEIGHTS = 1 << 22


def prepack_weight(
    qweight: Tensor, codewords: Tensor, layout: Sequence[int], in_features: int
) -> Tensor:
    """Words of a weight.

    Args:
        qweight: uint8 [N, row_bytes], the checkpoint's codes, on any device.
        codewords: int8, `Codebook.codewords()`, on that device.
        layout: `Layout(...).to_ints()`.
        in_features: K.

    Returns:
        int32 `format_of(layout).weight_shape(N, K)`.

    Raises:
        PCDVQError: the device is a GPU that the kernels do not run on.
    """
    describe(qweight.device)
    fields = LayoutFields(*layout)
    fmt = format_of(fields)
    shape = fmt.weight_shape(qweight.shape[0], in_features)
    words = torch.empty(shape, dtype=torch.int32, device=qweight.device)
    step = max(1, CHUNK_WEIGHTS // (TILE_ROWS * in_features))
    for first in range(0, shape[0], step):
        chunk = qweight[first * TILE_ROWS : (first + step) * TILE_ROWS]
        if fmt.code_bits:
            codes = unpack_codes(chunk, fmt.code_bits, in_features // fields.vector_dim)
            packed = _pack_pieces(codes, fmt)
        else:
            packed = _pack_levels(decode_levels(chunk, codewords, fields, in_features))
        # The upper half of 32 bits becomes negative.
        words[first : first + step] = ((packed ^ (1 << 31)) - (1 << 31)).flatten(1)
    return words


def prepack_codewords(codewords: Tensor) -> Tensor:
    """What is left of a table beside words, which need none: int8 [0, vector_dim]."""
    return codewords[:0]


def _pack_pieces(codes: Tensor, fmt: Format) -> Tensor:
    """Codes [N, G] of whole chains to words, int64 [row tiles, tiles, vectors, lanes, 4]."""
    bits = fmt.code_bits
    steps = _tiles(codes, 4)  # [row tiles, r, j, tiles, b, t, q]
    shifts = bits * torch.arange(LANE_ROWS - 1, -1, -1, device=codes.device)
    pieces = (steps << shifts.view(-1, 1, 1, 1, 1)).sum(2)
    # [row tiles, tiles, b, q, lanes]
    pieces = pieces.permute(0, 2, 3, 5, 1, 4).flatten(4)
    if bits == 3:
        halves = _join(pieces & 0xFFFF, 3, 2, 16).flatten(2, 3).unflatten(2, (2, 4))
        vectors = torch.cat([halves, _byte(pieces, 2)], 2)
    else:
        low, high = pieces & 0xFFFFFFFF, [_byte(pieces, v) for v in range(4, bits)]
        if bits == 8:
            high = [pieces >> 32 & 0xFFFFFFFF]
        vectors = torch.cat([low, *high], 2)
    return vectors.transpose(3, 4)


def _byte(pieces: Tensor, byte: int) -> Tensor:
    """One byte of pieces [row tiles, tiles, b, q, lanes], as a vector [..., 1, b, lanes]."""
    return _join(pieces >> (8 * byte) & 255, 3, 4, 8).transpose(2, 3)


def _join(values: Tensor, dim: int, count: int, bits: int) -> Tensor:
    """Runs of `count` values along `dim` as one number each, the first lowest."""
    values = values.unflatten(dim, (-1, count)).movedim(dim + 1, -1)
    return (values << bits * torch.arange(count, device=values.device)).sum(-1)


def _pack_levels(levels: Tensor) -> Tensor:
    """Levels fp32 [N, K] to words, int64 [row tiles, tiles, vectors, lanes, 4]."""
    # [row tiles, r, j, tiles, b, t, c] with all 8 columns of a run, then with four of them.
    levels = _join(_tiles(levels.long() & 255, 8), 6, 4, 8)
    # [row tiles, tiles, b, j / 2, r, t, j % 2, h]
    words = levels.unflatten(2, (4, 2)).permute(0, 4, 5, 2, 1, 6, 3, 7)
    return words.reshape(*words.shape[:2], -1, LANES, 4)


def _tiles(values: Tensor, run: int) -> Tensor:
    """[N, ...] to [row tiles, r 8, j 8, tiles, b 4, t 4, run]: `run` values in 8 columns."""
    columns = TILE_COLUMNS // 8 * run
    padded = pad(values, (0, -values.shape[1] % columns, 0, -values.shape[0] % TILE_ROWS))
    return padded.view(-1, 8, LANE_ROWS, padded.shape[1] // columns, 4, 4, run)
