"""How prepacked weights are laid out.

A weight is cut into tiles of 32 rows x 128 columns, one warp's work. Lane 4 r + t of a warp
(r < 8, t < 4) owns rows 4 r + i (i < 4) of a tile, and of each the runs of 8 columns
32 b + 8 t + 4 h + j (b < 4, h < 2, j < 4). That is what an int8 tensor-core instruction (m16n8k32)
wants of a lane if its K index 16 h + 4 t + j means column 8 t + 4 h + j, so codes become operands
without crossing lanes. Four consecutive rows lie in one lane because the trellis codec needs the
code of the row above.

The words of a row of tiles are planes, one after another, each int32 [tiles, 32 lanes, words], or
[tiles, words / 4, 32 lanes, 4] with more than 4 words to a lane, so that a load is 16 bytes:

    signs   4 words, index 2 (b >> 1) + h: bit 8 j + c, c = i + 4 (b & 1), is set where the level is
            positive; no such plane where codes have no signs
    index   a word per b (or per b and h, where groups have 4 columns), byte i: the top 8 bits of
            the fields beside the signs
    extra   the `width` bits below those, 8 / width index words to a word, at bits
            `width * position` of byte i; one plane for each width of `extra_widths`

A layout that does not fit has its levels stored, as codecs `int8` and `pvq` do:

    levels  32 words, index 8 i + 2 b + h, byte j
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from pcdvq_kernels.arguments import LayoutFields

TILE_ROWS = 32
TILE_COLUMNS = 128
LANES = 32
LANE_ROWS = 4  # consecutive rows of one lane
SIGN_WORDS = 4
LEVEL_WORDS = 32

# Bits of the fields beside the signs, to the widths of the planes below their top 8 bits.
_EXTRA_WIDTHS: dict[int, tuple[int, ...]] = {8: (), 10: (2,), 12: (4,), 16: (8,), 18: (8, 2)}


@dataclass(frozen=True)
class Format:
    """How the codes of one layout are stored; a compile-time constant of the kernels.

    Attributes:
        vector_dim: weights of a group: 8 or 4, 1 where levels are stored.
        signs: whether there is a plane of signs.
        parity: 1 if the parity of a group's signs is a bit of the table index, else 0.
        state_bits: bits of the row above that are bits of the table index.
        extra_widths: bits of the index in each extra plane.
    """

    vector_dim: int
    signs: bool = False
    parity: int = 0
    state_bits: int = 0
    extra_widths: tuple[int, ...] = ()

    @property
    def index_words(self) -> int:
        """Words a lane has of a tile's index plane."""
        return 0 if self.vector_dim == 1 else 32 // self.vector_dim

    def extra_words(self, width: int) -> int:
        return self.index_words * width // 8

    @property
    def extra_width(self) -> int:
        """Bits of the first extra plane, 0 without one."""
        return self.extra_widths[0] if self.extra_widths else 0

    @property
    def top_width(self) -> int:
        """Bits of the second extra plane, 0 without one."""
        return self.extra_widths[1] if len(self.extra_widths) > 1 else 0

    @property
    def lane_words(self) -> int:
        """Words a lane has of a tile."""
        if self.vector_dim == 1:
            return LEVEL_WORDS
        extra = sum(self.extra_words(width) for width in self.extra_widths)
        return SIGN_WORDS * self.signs + self.index_words + extra

    @property
    def index_bits(self) -> int:
        """Bits of a table index: from the lowest, the index byte, parity, state, extra planes."""
        return 8 + self.parity + self.state_bits + sum(self.extra_widths)

    @property
    def table_shape(self) -> tuple[int, int]:
        return (1, 1) if self.vector_dim == 1 else (1 << self.index_bits, self.vector_dim)

    def weight_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Shape of a prepacked weight [rows, columns]: a line of words per 32 rows."""
        tiles = -(-columns // TILE_COLUMNS)
        return -(-rows // TILE_ROWS), tiles * LANES * self.lane_words


STORED_LEVELS = Format(vector_dim=1)


@lru_cache(maxsize=256)
def format_of(layout: LayoutFields) -> Format:
    """The format for codes of `layout`; levels are stored if no table format fits."""
    if layout.pyramid_rows:
        return STORED_LEVELS
    widths = _EXTRA_WIDTHS.get(layout.code_bits - layout.sign_bits)
    if layout.vector_dim not in (4, 8) or widths is None:
        return STORED_LEVELS
    beside = layout.parity + layout.state_bits
    # The bits above the index byte share a byte whose top bit is 0, or are one plane alone.
    if beside + sum(widths) > 7 and (beside or layout.sign_bits):
        return STORED_LEVELS
    return Format(
        vector_dim=layout.vector_dim,
        signs=layout.sign_bits > 0,
        parity=layout.parity,
        state_bits=layout.state_bits,
        extra_widths=widths,
    )
