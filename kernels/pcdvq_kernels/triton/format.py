"""How prepacked weights are laid out.

A weight is cut into tiles of 64 rows x 128 columns, one warp's work. Lane 4 r + t of a warp
(r < 8, t < 4) owns rows 8 r + j (j < 8) of a tile, and of each the runs of 8 columns
32 b + 8 t + 4 h + c (b < 4, h < 2, c < 4). That is what an int8 tensor-core instruction (m16n8k32)
wants of a lane if its K index 16 h + 4 t + c means column 8 t + 4 h + c, so codes become operands
without crossing lanes.

Of codec `trellis` a lane holds *pieces*: the codes of its 8 rows and of pair q (q < 4) of a run of
8 columns, 8 steps that follow each other in a chain. A piece is a number of code_bits bytes whose
highest bits are those of the first step. Before it in the ring lies the piece of the lane with the
rows above, or, where a chain enters its next pair, that of the lane with the segment's last rows.

The words of a row of tiles are int32 [tiles, vectors, 32 lanes, 4], so that a load is 16 bytes:

    3 bits       vectors 0 and 1: word 2 b + (q >> 1), half q & 1: the low two bytes of pieces;
                 vector 2: word b, byte q: their top bytes
    4 to 8 bits  vector b: word q: the low four bytes of pieces
    5 to 7 bits  vector v: word b, byte q: bytes v of pieces
    8 bits       vector 4 + b: word q: the top four bytes of pieces

Every other codec has its levels stored, which takes 8 bits a weight:

    levels       vector 4 b + (j >> 1), word 2 (j & 1) + h, byte c
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from pcdvq_kernels.arguments import LayoutFields
from pcdvq_kernels.trellis import SINGLES_FROM

TILE_ROWS = 64
TILE_COLUMNS = 128
LANES = 32
LANE_ROWS = 8  # consecutive rows of one lane
LEVEL_WORDS = 64  # of a lane and tile whose levels are stored


@dataclass(frozen=True)
class Format:
    """How the codes of one layout are stored; a compile-time constant of the kernels.

    Attributes:
        code_bits: of codec `trellis`; 0 where levels are stored.
        chain_rows: of codec `trellis`.
    """

    code_bits: int = 0
    chain_rows: int = 0

    @property
    def singles(self) -> bool:
        """Whether each column of a pair has windows of its own."""
        return self.code_bits >= SINGLES_FROM

    @property
    def window_bits(self) -> int:
        """New bits of the first window of a step."""
        return -(-self.code_bits // 2) if self.singles else self.code_bits

    @property
    def chain_lanes(self) -> int:
        """Lanes, 4 apart, that a chain runs through before it enters its next pair."""
        return self.chain_rows // LANE_ROWS

    @property
    def lane_words(self) -> int:
        """Words a lane has of a tile."""
        return 4 * self.code_bits or LEVEL_WORDS

    def weight_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Shape of a prepacked weight [rows, columns]: a line of words per 64 rows."""
        tiles = -(-columns // TILE_COLUMNS)
        return -(-rows // TILE_ROWS), tiles * LANES * self.lane_words


@lru_cache(maxsize=256)
def format_of(layout: LayoutFields) -> Format:
    """The format for codes of `layout`."""
    return Format(layout.code_bits, layout.chain_rows) if layout.chain_rows else Format()
