"""From a checkpoint's codes to the words and tables of `format`; runs once, when a model loads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from pcdvq_kernels.arguments import LayoutFields
from pcdvq_kernels.codebook import expand_patterns
from pcdvq_kernels.config import SEGMENT_ROWS
from pcdvq_kernels.fallback import decode_levels
from pcdvq_kernels.packing import unpack_codes
from pcdvq_kernels.triton.format import LANES, TILE_COLUMNS, TILE_ROWS, Format, format_of

# Bounds scratch: packing holds a few int64 per weight of a chunk of rows.
CHUNK_WEIGHTS = 1 << 22
assert TILE_ROWS % SEGMENT_ROWS == 0  # no chain of states enters a tile


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
    """
    fields = LayoutFields(*layout)
    fmt = format_of(fields)
    rows = qweight.shape[0]
    shape = fmt.weight_shape(rows, in_features)
    words = torch.empty(shape, dtype=torch.int32, device=qweight.device)
    step = max(1, CHUNK_WEIGHTS // (TILE_ROWS * in_features))
    for first in range(0, shape[0], step):
        chunk = qweight[first * TILE_ROWS : (first + step) * TILE_ROWS]
        words[first : first + step] = _pack_rows(chunk, codewords, fields, fmt, in_features)
    return words


def prepack_codewords(codewords: Tensor, layout: Sequence[int]) -> Tensor:
    """The table that a prepacked weight's indices select from.

    Args:
        codewords: int8, `Codebook.codewords()`.
        layout: `Layout(...).to_ints()`.

    Returns:
        int8 `format_of(layout).table_shape`: levels, inverted bitwise where codes have signs, so
        that one exclusive or with all ones, where a level is positive, gives it back.
    """
    fields = LayoutFields(*layout)
    fmt = format_of(fields)
    if fmt.vector_dim == 1:
        return codewords.new_zeros(fmt.table_shape)
    index = torch.arange(fmt.table_shape[0], device=codewords.device)
    above = index >> 8
    parity = above & ((1 << fmt.parity) - 1)
    above = above >> fmt.parity
    state = above & ((1 << fmt.state_bits) - 1)
    extra = above >> fmt.state_bits
    pattern = (index & 255) << sum(fmt.extra_widths) | extra
    table = expand_patterns(codewords, fields)[state, pattern, parity]
    return (~table if fmt.signs else table).contiguous()


def _pack_rows(
    qweight: Tensor, codewords: Tensor, layout: LayoutFields, fmt: Format, in_features: int
) -> Tensor:
    """int32 [row tiles, words] of a chunk of rows that starts at a tile."""
    if fmt.vector_dim == 1:
        levels = decode_levels(qweight, codewords, layout, in_features).to(torch.int64)
        return _words([_level_plane(_tiles(levels, 1))])
    groups = in_features // fmt.vector_dim
    codes = _tiles(unpack_codes(qweight, layout.code_bits, groups), fmt.vector_dim)
    fields = codes >> layout.sign_bits
    planes = [_sign_plane(codes, fmt)] if fmt.signs else []
    below = sum(fmt.extra_widths)
    planes.append(_index_plane(fields >> below, fmt, 8))
    for width in fmt.extra_widths:
        # The first plane has the lowest bits: they come first in a table index too.
        planes.append(_index_plane(fields & ((1 << width) - 1), fmt, width))
        fields = fields >> width
    return _words(planes)


def _tiles(values: Tensor, vector_dim: int) -> Tensor:
    """[N, groups] to [row tiles, r 8, i 4, tiles, b 4, t 4, h]: h is 2 for groups of 4, else 1.

    For levels (`vector_dim` 1) to [row tiles, r, i, tiles, b, t, h 2, j 4].
    """
    columns = TILE_COLUMNS // vector_dim
    padded = pad(values, (0, -values.shape[1] % columns, 0, -values.shape[0] % TILE_ROWS))
    run = (2, 4) if vector_dim == 1 else (8 // vector_dim,)
    return padded.view(-1, 8, 4, padded.shape[1] // columns, 4, 4, *run)


def _sign_plane(codes: Tensor, fmt: Format) -> Tensor:
    """[row tiles, tiles, r, t, p 2, h 2]."""
    bits = torch.arange(fmt.vector_dim, device=codes.device)
    positive = 1 - ((codes.unsqueeze(-1) >> bits) & 1)
    rows, _, _, tiles = positive.shape[:4]
    # [row tiles, r, i, tiles, p, b & 1, t, h, j]
    positive = positive.reshape(rows, 8, 4, tiles, 2, 2, 4, 2, 4)
    i, b, j = (torch.arange(n, device=codes.device) for n in (4, 2, 4))
    shift = 8 * j + i.view(4, 1, 1, 1, 1, 1, 1) + 4 * b.view(2, 1, 1, 1)
    return (positive << shift).sum((2, 5, 8)).permute(0, 2, 1, 4, 3, 5)


def _index_plane(values: Tensor, fmt: Format, width: int) -> Tensor:
    """[row tiles, tiles, r, t, words] of values below 2 ** width."""
    rows, _, _, tiles = values.shape[:4]
    words, packed = fmt.extra_words(width), 8 // width
    # [row tiles, tiles, r, t, i, b, h]
    values = values.permute(0, 3, 1, 5, 2, 4, 6).reshape(rows, tiles, 8, 4, 4, words, packed)
    i, position = (torch.arange(n, device=values.device) for n in (4, packed))
    return (values << (8 * i.view(4, 1, 1) + width * position)).sum((4, 6))


def _level_plane(levels: Tensor) -> Tensor:
    """[row tiles, tiles, r, t, i, b, h]."""
    shift = 8 * torch.arange(4, device=levels.device)
    return ((levels & 255) << shift).sum(-1).permute(0, 3, 1, 5, 2, 4, 6)


def _words(planes: list[Tensor]) -> Tensor:
    """Planes of unsigned 32-bit values in int64 to int32 [row tiles, words]."""
    line = torch.cat([_in_fours(plane).flatten(1) for plane in planes], 1)
    return ((line ^ (1 << 31)) - (1 << 31)).to(torch.int32)  # the upper half becomes negative


def _in_fours(plane: Tensor) -> Tensor:
    """[row tiles, tiles, r, t, words...] to [row tiles, tiles, loads, lanes, words up to 4]."""
    words = plane.flatten(4)
    per_load = min(4, words.shape[-1])
    words = words.reshape(*words.shape[:2], LANES, -1, per_load)
    return words.transpose(2, 3).contiguous()
