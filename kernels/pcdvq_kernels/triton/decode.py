"""Device functions that turn prepacked words (`format`) into int8 tensor-core operands.

A tensor [8, 4] holds one word per lane: lane 4 r + t has element [r, t]. All is arithmetic inside a
lane. `ASM` chooses a single instruction of NVIDIA GPUs where the plain expression beside it
compiles to several.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pcdvq_kernels import trellis

MULTIPLIER = tl.constexpr(trellis.MULTIPLIER)
# Where byte 1 is a mean: a half that rounds, and the sign of int8.
ROUNDED = tl.constexpr(0x8080)


@triton.jit
def load_vector(pointer, r):
    """A vector of a tile of which each lane has what lane 4 r + t holds: 4 uint32 [8, 4].

    Args:
        pointer: to the vector.
        r: int32 [8].
    """
    lane = r[:, None, None] * 4 + tl.arange(0, 4)[None, :, None]
    loaded = tl.load(pointer + lane * 4 + tl.arange(0, 4)[None, None, :])
    even, odd = tl.split(tl.reshape(loaded.to(tl.uint32, bitcast=True), [8, 4, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def load_tile(words, FMT: tl.constexpr):
    """Words of a tile.

    Args:
        words: pointer to the tile.

    Returns:
        Two tuples of uint32 [8, 4]: the words of `format`, and those of the lanes before in the
        chain that have the low bytes of pieces; none of these where levels are stored.
    """
    VECTORS: tl.constexpr = FMT.lane_words // 4
    r = tl.arange(0, 8)
    own = ()
    for vector in tl.static_range(VECTORS):
        own = own + load_vector(words + vector * 128, r)
    before = ()
    if FMT.code_bits > 0:
        LANES: tl.constexpr = FMT.chain_lanes
        LOW: tl.constexpr = 2 if FMT.code_bits == 3 else 4
        for vector in tl.static_range(LOW):
            above = r // LANES * LANES + (r + LANES - 1) % LANES
            before = before + load_vector(words + vector * 128, above)
    return own, before


@triton.jit
def pick(low, high, BYTE: tl.constexpr):
    """Byte BYTE of 0 to 3 of `low` and 4 to 7 of `high`."""
    if BYTE < 4:
        return (low >> (8 * BYTE)) & 255
    else:
        return (high >> (8 * BYTE - 32)) & 255


@triton.jit
def permute(low, high, SELECTOR: tl.constexpr, ASM: tl.constexpr):
    """Bytes by number, 0 to 3 of `low` and 4 to 7 of `high`; a hexadecimal digit for each."""
    if ASM:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [low, high, tl.full(low.shape, SELECTOR, tl.uint32)],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )
    else:
        word = low * 0
        for place in tl.static_range(4):
            word |= pick(low, high, (SELECTOR >> (4 * place)) & 7) << (8 * place)
        return word


@triton.jit
def dot4(word, FACTORS: tl.constexpr, addend, ASM: tl.constexpr):
    """`addend` plus the products of the bytes of `word` and FACTORS, all unsigned."""
    if ASM:
        factors = tl.full(word.shape, FACTORS, tl.uint32)
        return tl.inline_asm_elementwise(
            "dp4a.u32.u32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [word, factors, word * 0 + addend],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )
    else:
        for byte in tl.static_range(4):
            word_byte = (word >> (8 * byte)) & 255
            addend = word_byte * ((FACTORS >> (8 * byte)) & 255) + addend
        return addend


@triton.jit
def low_bytes(words, b: tl.constexpr, q: tl.constexpr, FMT: tl.constexpr):
    """The word whose lowest bytes are those of piece (b, q), 4 or at 3 bits 2 of them."""
    if FMT.code_bits == 3:
        word = words[2 * b + q // 2]
        return word >> 16 if q % 2 == 1 else word
    else:
        return words[4 * b + q]


@triton.jit
def bytes_before(before, b: tl.constexpr, q: tl.constexpr, FMT: tl.constexpr):
    """The word whose two lowest bytes lie before piece (b, q) in its ring."""
    LANES: tl.constexpr = FMT.chain_lanes
    PAIRS: tl.constexpr = 8 // LANES  # of a strip
    word = low_bytes(before, b, q, FMT)
    if PAIRS > 1:
        entered: tl.constexpr = q // PAIRS * PAIRS + (q + PAIRS - 1) % PAIRS
        starts = tl.arange(0, 8)[:, None] % LANES == 0
        word = tl.where(starts, low_bytes(before, b, entered, FMT), word)
    return word


@triton.jit
def overlapping(loaded, b: tl.constexpr, q: tl.constexpr, FMT: tl.constexpr, ASM: tl.constexpr):
    """Piece (b, q) and what lies before it, cut into words that begin every 16 bits.

    Returns:
        A tuple of uint32 [8, 4]: word m has bits 16 m to 16 m + 31, as far as windows need them.
    """
    BITS: tl.constexpr = FMT.code_bits
    own, before = loaded
    low = low_bytes(own, b, q, FMT)
    ring = bytes_before(before, b, q, FMT)
    if BITS == 3:
        piece = permute(low, own[8 + b], 0x4410 + 0x100 * q, ASM)
        return permute(piece, ring, 0x4210, ASM), permute(piece, ring, 0x5542, ASM)
    elif BITS == 4:
        return low, permute(low, ring, 0x5432, ASM)
    elif BITS == 5:
        high = permute(low, own[16 + b], 0x4432 + 0x100 * q, ASM)
        return low, permute(high, ring, 0x4210, ASM), permute(high, ring, 0x5542, ASM)
    elif BITS == 8:
        high = own[16 + 4 * b + q]
        return low, permute(low, high, 0x5432, ASM), high, permute(high, ring, 0x5432, ASM)
    else:
        high = permute(own[16 + b], own[20 + b], 0x4440 + 0x11 * q, ASM)
        if BITS == 6:
            return low, permute(low, high, 0x5432, ASM), permute(high, ring, 0x5410, ASM)
        else:
            high = permute(high, own[24 + b], 0x4410 + 0x100 * q, ASM)
            return (
                low,
                permute(low, high, 0x5432, ASM),
                permute(high, ring, 0x4210, ASM),
                permute(high, ring, 0x5542, ASM),
            )


@triton.jit
def window_product(words, SHIFT: tl.constexpr, ASM: tl.constexpr):
    """The window whose lowest bit is bit SHIFT of `overlapping` words, times the multiplier."""
    # Bytes are permuted by half of a processor's lanes, words shifted (multiplied) by the others.
    LEFT: tl.constexpr = -SHIFT % 8
    BYTE: tl.constexpr = (SHIFT % 16 + LEFT) // 8
    word = words[SHIFT // 16] << LEFT
    return permute(word, word * 0, 0x4410 + 0x11 * BYTE, ASM) * MULTIPLIER


@triton.jit
def level_word(left, right, j: tl.constexpr, FMT: tl.constexpr, ASM: tl.constexpr):
    """Levels of four columns in row j, int8 in uint32 [8, 4], from their pairs' `overlapping`."""
    BITS: tl.constexpr = FMT.code_bits
    END: tl.constexpr = BITS * (7 - j)
    if FMT.singles:
        FIRST: tl.constexpr = END + BITS - FMT.window_bits
        a, b = single_levels(window_product(left, FIRST, ASM), window_product(left, END, ASM), ASM)
        c, d = single_levels(
            window_product(right, FIRST, ASM), window_product(right, END, ASM), ASM
        )
    else:
        a, b = pair_levels(window_product(left, END, ASM), ASM)
        c, d = pair_levels(window_product(right, END, ASM), ASM)
    return permute(permute(a, b, 0x4451, ASM), permute(c, d, 0x4451, ASM), 0x5410, ASM)


@triton.jit
def pair_levels(product, ASM: tl.constexpr):
    """Both levels of a window's product, int8 in bytes 1 of two words."""
    u = dot4(product, 0x00800080, ROUNDED, ASM)
    v = dot4(product, 0x80008000, ROUNDED, ASM)
    return u, v


@triton.jit
def single_levels(first, second, ASM: tl.constexpr):
    """The levels of two windows' products, int8 in bytes 1 of two words.

    A level is the mean, rounded up, of means that were rounded up: a fourth of the bytes' sum and
    of one for each odd sum of two.
    """
    low, high = permute(first, second, 0x5410, ASM), permute(first, second, 0x7632, ASM)
    odd = (low ^ high) & 0x01010101
    a = dot4(first, 0x40404040, dot4(odd, 0x00004040, ROUNDED, ASM), ASM)
    b = dot4(second, 0x40404040, dot4(odd, 0x40400000, ROUNDED, ASM), ASM)
    return a, b


@triton.jit
def decode_part(
    loaded, ROWS: tl.constexpr, HALF: tl.constexpr, FMT: tl.constexpr, ASM: tl.constexpr
):
    """Levels of a quarter of a tile: rows j = 4 ROWS to 4 ROWS + 3, b = 2 HALF and 2 HALF + 1.

    Args:
        loaded: what `load_tile` returned.

    Returns:
        16 uint32 [8, 4], ordered (b & 1, j & 3, h).
    """
    levels = ()
    for b in tl.static_range(2 * HALF, 2 * HALF + 2):
        if FMT.code_bits == 0:
            for k in tl.static_range(8 * ROWS, 8 * ROWS + 8):
                levels = levels + (loaded[0][16 * b + k],)
        else:
            pairs = ()
            for q in tl.static_range(4):
                pairs = pairs + (overlapping(loaded, b, q, FMT, ASM),)
            for j in tl.static_range(4 * ROWS, 4 * ROWS + 4):
                for h in tl.static_range(2):
                    levels = levels + (level_word(pairs[2 * h], pairs[2 * h + 1], j, FMT, ASM),)
    return levels


@triton.jit
def as_int8(words):
    """uint32 [N, W] to int8 [N, 4 W], byte c of word w at 4 w + c; moves nothing on a GPU."""
    N: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    even = tl.join(words.to(tl.int8), (words >> 16).to(tl.int8))
    odd = tl.join((words >> 8).to(tl.int8), (words >> 24).to(tl.int8))
    return tl.reshape(tl.join(even, odd), [N, 4 * W])


@triton.jit
def operand(words):
    """What `decode_part` returns as int8 [32, 64].

    Row 8 (j & 3) + r is row 8 r + j of the tile; column 32 (b & 1) + 16 h + 4 t + c is column
    32 b + 8 t + 4 h + c of the tile.
    """
    parts = words
    for level in tl.static_range(4):
        joined = ()
        for k in tl.static_range(8 >> level):
            joined = joined + (tl.join(parts[k], parts[k + (8 >> level)]),)
        parts = joined
    stacked = tl.reshape(parts[0], [8, 4, 2, 4, 2])  # [r, t, b, j, h]
    return as_int8(tl.reshape(tl.permute(stacked, [3, 0, 2, 4, 1]), [32, 16]))


@triton.jit
def part_rows(row, ROWS: tl.constexpr):
    """Weight rows of the rows of `operand`, of row of tiles `row`: int32 [32]."""
    d = tl.arange(0, 32)
    return row * 64 + d % 8 * 8 + 4 * ROWS + d // 8


@triton.jit
def half_columns(tile, HALF: tl.constexpr):
    """Weight columns of the columns of `operand`, of tile `tile` of a row: int32 [64]."""
    d = tl.arange(0, 64)
    return tile * 128 + HALF * 64 + d // 32 * 32 + d // 4 % 4 * 8 + d // 16 % 2 * 4 + d % 4
