"""The order of the codes that `cpu.prepack` makes (csrc/block_decode.h, block_planes.h)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pcdvq_kernels import windows
from pcdvq_kernels.arguments import BLOCK_COLUMNS, BLOCK_ROWS, LayoutFields, linear_shape
from pcdvq_kernels.packing import pack_codes

_TOGETHER = 4  # codes of a row that are side by side in planes


def unpack(packed: Tensor, layout: Sequence[int], rows: int, in_features: int) -> Tensor:
    """Inverse of `cpu.prepack`.

    Args:
        packed: uint8 [strips, blocks, bytes of a block].
        layout: `Layout(...).to_ints()`.
        rows: N.
        in_features: K.

    Returns:
        uint8 [N, row_bytes], the checkpoint's codes.
    """
    shape = linear_shape(tuple(layout), in_features)
    strips, blocks, _ = packed.shape
    if not _has_planes(shape.layout):  # rows of a block one after another
        in_rows = packed.view(strips, blocks, BLOCK_ROWS, -1).transpose(1, 2)
        return in_rows.reshape(strips * BLOCK_ROWS, -1)[:rows, : shape.row_bytes].contiguous()
    dim = shape.layout.vector_dim
    planes = packed.view(strips, blocks, -1, BLOCK_ROWS, _TOGETHER).long()
    if shape.layout.windows:
        codes = _window_codes(planes, shape.layout.code_bits)
    else:
        vectors = BLOCK_COLUMNS // dim // _TOGETHER
        # Vectors of signs of 4 bits share bytes.
        signs = _split(planes[:, :, -vectors * dim // 8 :], vectors)
        codes = planes[:, :, : -vectors * dim // 8] << dim | signs
    codes = codes.permute(0, 3, 1, 2, 4)  # [strips, 16, blocks, vectors, 4]
    codes = codes.reshape(strips * BLOCK_ROWS, -1)[:rows, : in_features // dim]
    return pack_codes(codes, shape.layout.code_bits)


def _window_codes(planes: Tensor, code_bits: int) -> Tensor:
    """Codes [strips, blocks, vectors, 16, 4] of codec `compact` (csrc/block_windows.h)."""
    vectors = BLOCK_COLUMNS // windows.DIM // _TOGETHER
    stream, extra = planes[:, :, :vectors], planes[:, :, vectors:]
    if windows.extra_bits(code_bits) == 1:
        # Of two vectors, one a place above the other.
        extra = torch.stack([extra, extra >> 1], 3).flatten(2, 3)
        places = (2, 4, 6, 0)  # of the coordinates
        bits = [(extra >> place & 1) << j for j, place in enumerate(places)]
        extra = torch.stack(bits).sum(0)
    elif windows.extra_bits(code_bits) == 2:
        extra = _rotate(extra, 6)
    else:
        extra = torch.zeros_like(stream)
    return _rotate(stream, 1) << (code_bits - 8) | extra


def _rotate(bytes: Tensor, left: int) -> Tensor:
    return (bytes << left | bytes >> (8 - left)) & 255


def _split(planes: Tensor, vectors: int) -> Tensor:
    """[strips, blocks, vectors, 16, 4] of vectors that share bytes, the first in the low bits."""
    share = vectors // planes.shape[2]
    width = 8 // share
    parts = [planes >> width * i & ((1 << width) - 1) for i in range(share)]
    return torch.stack(parts, 3).flatten(2, 3)


def _has_planes(fields: LayoutFields) -> bool:
    """Whether codes are packed by place (block_planes.h, block_windows.h), not by row."""
    if fields.windows:
        return True
    states = {0: 0, 8: 3, 4: 2}.get(fields.vector_dim if fields.state_bits else 0)
    return (
        fields.code_bits == 8 + fields.sign_bits == 8 + fields.vector_dim
        and fields.parity == 1
        and fields.state_bits == fields.rotation_bits == states
    )
