"""Device functions that turn prepacked words (`format`) into int8 tensor-core operands.

A tensor [8, 4] holds one word per lane: lane 4 r + t has element [r, t]. All is arithmetic inside a
lane. `ASM` chooses single instructions of NVIDIA GPUs where the plain
expression beside them compiles to several.

Signs cost no carries: the table holds ~level. An exclusive or with the mask m, all ones where the
level is positive, gives level or -level - 1; adding m + 1 would give level or -level. So a product
with x is dot(words, x) + dot(masks, x) + sum(x), and the last term does not depend on the weights.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def unstack(x, WORDS: tl.constexpr):
    """[8, 4, WORDS] to WORDS tensors [8, 4]; WORDS is 1, 2 or 4."""
    parts = (x,)
    for _ in tl.static_range(2):
        if len(parts) < WORDS:
            low = ()
            high = ()
            for k in tl.static_range(len(parts)):
                even, odd = tl.split(tl.reshape(parts[k], [8, 4, WORDS // len(parts) // 2, 2]))
                low = low + (even,)
                high = high + (odd,)
            parts = low + high
    words = ()
    for k in tl.static_range(WORDS):
        words = words + (tl.reshape(parts[k], [8, 4]),)
    return words


@triton.jit
def load_words(pointer, tile, WORDS: tl.constexpr, ABOVE: tl.constexpr = False):
    """The words of a plane that each lane has of tile `tile` of a row of tiles.

    With ABOVE those of the lane that has the row above, 0 where a segment starts.

    Returns:
        WORDS tensors uint32 [8, 4].
    """
    LOAD: tl.constexpr = WORDS if WORDS < 4 else 4
    r = tl.arange(0, 8)[:, None, None]
    lane = (r - ABOVE) * 4 + tl.arange(0, 4)[None, :, None]
    pointer += tile * (32 * WORDS) + lane * LOAD + tl.arange(0, LOAD)[None, None, :]
    words = ()
    for part in tl.static_range(WORDS // LOAD):
        if ABOVE:
            loaded = tl.load(pointer + part * 32 * LOAD, mask=(r % 4 != 0), other=0)
        else:
            loaded = tl.load(pointer + part * 32 * LOAD)
        words = words + unstack(loaded.to(tl.uint32, bitcast=True), LOAD)
    return words


@triton.jit
def as_int8(words):
    """uint32 [N, W] to int8 [N, 4 W], byte j of word w at 4 w + j; moves nothing on a GPU."""
    N: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    even = tl.join(words.to(tl.int8), (words >> 16).to(tl.int8))
    odd = tl.join((words >> 8).to(tl.int8), (words >> 24).to(tl.int8))
    return tl.reshape(tl.join(even, odd), [N, 4 * W])


@triton.jit
def operand(words):
    """16 tensors uint32 [8, 4], ordered (i, b & 1, h), to int8 [32, 64].

    Row 8 i + r is row 4 r + i of the tile; column 32 (b & 1) + 16 h + 4 t + j is column
    32 b + 8 t + 4 h + j of the tile.
    """
    parts = words
    for level in tl.static_range(4):
        joined = ()
        for k in tl.static_range(8 >> level):
            joined = joined + (tl.join(parts[k], parts[k + (8 >> level)]),)
        parts = joined
    stacked = tl.reshape(parts[0], [8, 4, 4, 2, 2])  # [r, t, i, b, h]
    return as_int8(tl.reshape(tl.permute(stacked, [2, 0, 3, 4, 1]), [32, 16]))


@triton.jit
def byte_mask(word, bit: tl.constexpr, ASM: tl.constexpr):
    """All ones in the bytes of `word` that have bit `bit` set."""
    if ASM:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, 0, 0xba98;",
            "=r,r",
            [word << (7 - bit)],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )
    return ((word >> bit) & 0x01010101) * 255


@triton.jit
def byte_pair(low, high, i: tl.constexpr, ASM: tl.constexpr):
    """Byte i of `low`, above it byte i of `high`; above those 0, if no byte of `high` has bit 7."""
    if ASM:
        SELECTOR: tl.constexpr = 0xCC40 + 0x11 * i
        selector = tl.full(low.shape, SELECTOR, tl.uint32)
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [low, high, selector],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )
    return ((low >> (8 * i)) & 255) | (((high >> (8 * i)) & 255) << 8)


@triton.jit
def opaque(word, ASM: tl.constexpr):
    """`word`; keeps LLVM from taking halves of table entries to bytes and together again."""
    if ASM:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [word], dtype=tl.uint32, is_pure=True, pack=1
        )
    return word


@triton.jit
def fold(word):
    """Exclusive or of the four bytes of `word`, in its lowest byte."""
    word ^= word >> 16
    return word ^ (word >> 8)


@triton.jit
def spread(word, first: tl.constexpr):
    """Bits `first` to `first + 3` of `word` to the lowest bits of the four bytes."""
    return (((word >> first) & 15) * 0x204081) & 0x01010101


@triton.jit
def high_bytes(index, above, extra, position: tl.constexpr, FMT: tl.constexpr):
    """Bytes above the index bytes, without parity: state and bits of the first extra plane.

    `above` are the index words of the lane above, `extra` the word with the bits of `index` at
    bits `position` of its bytes; either is 0 where the format has none.
    """
    PARITY: tl.constexpr = FMT.parity
    STATE: tl.constexpr = FMT.state_bits
    WIDTH: tl.constexpr = FMT.extra_width
    high = index * 0
    if STATE > 0:
        # The top bits of a byte's predecessor; that of byte 0 is byte 3 of the lane above.
        SHIFT: tl.constexpr = STATE + PARITY
        MASK: tl.constexpr = (((1 << STATE) - 1) << PARITY) * 0x01010101
        high = ((index << SHIFT) | (above >> (32 - SHIFT))) & MASK
    if WIDTH > 0:
        BELOW: tl.constexpr = PARITY + STATE
        BITS: tl.constexpr = (((1 << WIDTH) - 1) << BELOW) * 0x01010101
        if position >= BELOW:
            high |= (extra >> (position - BELOW)) & BITS
        else:
            high |= (extra << (BELOW - position)) & BITS
    return high


@triton.jit
def load_tile(words, tile, tiles, FMT: tl.constexpr):
    """Words of tile `tile` of a row of tiles.

    Returns:
        Tuples of uint32 [8, 4]: sign words, index words, `high_bytes` of each, words of the
        second extra plane. Where levels are stored: those and three empty ones.
    """
    STORED: tl.constexpr = FMT.vector_dim == 1
    if STORED:
        return load_words(words, tile, 32), (), (), ()
    else:
        return load_codes(words, tile, tiles, FMT)


@triton.jit
def load_codes(words, tile, tiles, FMT: tl.constexpr):
    """`load_tile` where codes are stored."""
    STATE: tl.constexpr = FMT.state_bits
    SIGN_WORDS: tl.constexpr = 4 if FMT.signs else 0
    INDEX_WORDS: tl.constexpr = FMT.index_words
    WIDTH: tl.constexpr = FMT.extra_width
    EXTRA_WORDS: tl.constexpr = INDEX_WORDS * WIDTH // 8
    PACKED: tl.constexpr = 8 // WIDTH if WIDTH > 0 else 1  # indices in an extra word's byte
    TOP: tl.constexpr = FMT.top_width
    TOP_WORDS: tl.constexpr = INDEX_WORDS * TOP // 8
    signs = ()
    if SIGN_WORDS > 0:
        signs = load_words(words, tile, SIGN_WORDS)
    words += tiles * (32 * SIGN_WORDS)
    index = load_words(words, tile, INDEX_WORDS)
    above = index
    if STATE > 0:
        above = load_words(words, tile, INDEX_WORDS, ABOVE=True)
    words += tiles * (32 * INDEX_WORDS)
    extra = index
    if WIDTH > 0:
        extra = load_words(words, tile, EXTRA_WORDS)
    words += tiles * (32 * EXTRA_WORDS)
    top = ()
    if TOP > 0:
        top = load_words(words, tile, TOP_WORDS)
    high = ()
    for k in tl.static_range(INDEX_WORDS):
        high = high + (
            high_bytes(index[k], above[k], extra[k // PACKED], WIDTH * (k % PACKED), FMT),
        )
    return signs, index, high, top


@triton.jit
def decode_half(loaded, table, HALF: tl.constexpr, FMT: tl.constexpr, ASM: tl.constexpr):
    """The operands of one half of a tile's columns, b = 2 HALF and 2 HALF + 1.

    Args:
        loaded: what `load_tile` returned.
        table: pointer, int64 entries for groups of 8 and int32 for groups of 4.

    Returns:
        Two tuples of 16 uint32 [8, 4], ordered (i, b & 1, h): levels before the correction of
        signs, and masks. Without signs the levels, twice.
    """
    STORED: tl.constexpr = FMT.vector_dim == 1
    SIGNS: tl.constexpr = FMT.signs
    levels = ()
    masks = ()
    for k in tl.static_range(16):
        if STORED:
            levels = levels + (loaded[0][k // 4 * 8 + HALF * 4 + k % 4],)
        if SIGNS:
            sign = loaded[0][2 * HALF + k % 2]
            masks = masks + (byte_mask(sign, k // 4 + 4 * (k // 2 % 2), ASM),)
    if not STORED:
        entries = look_up(loaded, table, HALF, FMT, ASM)
        for k in tl.static_range(16):
            if SIGNS:
                levels = levels + (entries[k] ^ masks[k],)
            else:
                levels = levels + (opaque(entries[k], ASM),)
    if SIGNS:
        return levels, masks
    else:
        return levels, levels


@triton.jit
def look_up(loaded, table, HALF: tl.constexpr, FMT: tl.constexpr, ASM: tl.constexpr):
    """Table entries of one half of a tile, ordered as in `decode_half`."""
    GROUP8: tl.constexpr = FMT.vector_dim == 8
    PARITY: tl.constexpr = FMT.parity
    WIDE: tl.constexpr = FMT.extra_width == 8
    TOP: tl.constexpr = FMT.top_width
    PER_B: tl.constexpr = 1 if GROUP8 else 2
    signs, index, high, top = loaded
    odd = ()  # folded signs whose parity belongs to an index word
    if PARITY:
        if GROUP8:
            odd = (fold(signs[2 * HALF] ^ signs[2 * HALF + 1]),)
        else:
            odd = (fold(signs[2 * HALF]), fold(signs[2 * HALF + 1]))
    entries = ()
    for i in tl.static_range(4):
        for b in tl.static_range(2):
            for h in tl.static_range(PER_B):
                low = index[(2 * HALF + b) * PER_B + h]
                above = high[(2 * HALF + b) * PER_B + h]
                if PARITY:
                    above |= spread(odd[h], 4 * b)
                row = byte_pair(low, above, i, ASM)
                if WIDE:
                    row &= 0xFFFF
                if TOP > 0:
                    shift = 8 * i + TOP * ((2 * HALF + b) * PER_B + h)
                    row |= ((top[0] >> shift) & ((1 << TOP) - 1)) << 16
                entry = tl.load(table + row)
                entries = entries + (entry.to(tl.uint32),)
                if GROUP8:
                    entries = entries + ((entry >> 32).to(tl.uint32),)
    return entries
