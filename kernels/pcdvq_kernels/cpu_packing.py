"""The order of the codes that `cpu.prepack` makes (csrc/block_codes.h, chain_tiles.h)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pcdvq_kernels.arguments import BLOCK_COLUMNS, BLOCK_ROWS, TILE_BLOCKS, linear_shape
from pcdvq_kernels.packing import pack_codes, unpack_codes

QUADS = BLOCK_COLUMNS // 4


def unpack(packed: Tensor, layout: Sequence[int], rows: int, in_features: int) -> Tensor:
    """Inverse of `cpu.prepack`.

    Args:
        packed: uint8 [strips, blocks, bytes of a block].
        layout: `Layout(...).to_ints()`.
        rows: N.
        in_features: K.

    Returns:
        uint8 [N or more, row_bytes], the checkpoint's codes: whole chains.
    """
    shape = linear_shape(tuple(layout), in_features)
    strips, blocks, _ = packed.shape
    stored = shape.stored_rows(rows)
    if not shape.layout.chain_rows:  # rows of a block one after another
        in_rows = packed.view(strips, blocks, BLOCK_ROWS, -1).transpose(1, 2)
        return in_rows.reshape(strips * BLOCK_ROWS, -1)[:stored, : shape.row_bytes].contiguous()
    bits = shape.layout.code_bits
    # A group has the codes of 16 rows, the last one lowest, of two pairs of columns.
    if shape.layout.chain_rows == BLOCK_ROWS:
        groups = packed.view(-1, blocks, QUADS // 2, TILE_BLOCKS, 2, 2, 2 * bits)
        groups = groups.transpose(3, 4).flatten(
            2, 3
        )  # [tiles, blocks, quads, strips, pairs, bytes]
    else:
        groups = packed.view(-1, blocks, QUADS, TILE_BLOCKS, 2, 2 * bits).flip(3)
    codes = unpack_codes(groups.flatten(0, 4), bits, BLOCK_ROWS).flip(1)
    codes = codes.view(*groups.shape[:5], BLOCK_ROWS)
    codes = codes.permute(0, 3, 5, 1, 2, 4)  # [tiles, strips, rows, blocks, quads, pairs]
    codes = codes.reshape(strips * BLOCK_ROWS, -1)[:stored, : in_features // 2]
    return pack_codes(codes, bits)
