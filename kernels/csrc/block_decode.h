// Decodes weight rows to blocks for AVX-512 (VBMI and BITALG): what vpdpbusd multiplies. Included
// once. Layouts that have no decoder here take that of dot.h or codec.h.
//
// A block is 16 weight rows x 64 columns, the columns of one scale of the activations: 16 steps of
// [16 rows][4 columns], a register each. Its bytes are 128 + level. Decoders hand each step to a sink,
// which stores or multiplies it: sink(s, turn, levels), where `turn` alternates between 0 and 1.
#pragma once

#include "codec.h"
#include "dot.h"

namespace pcdvq {
namespace {

using Wide = __m512i;

inline Wide load_wide(const void* p) { return _mm512_loadu_si512(p); }

inline Wide in_every_lane(const void* p) {
  return _mm512_broadcast_i32x4(_mm_load_si128(static_cast<const __m128i*>(p)));
}

inline Wide join(__m256i low, __m256i high) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// Where `negative` is set.
PCDVQ_INLINE Wide negate_levels(Wide levels, uint64_t negative) {
  return _mm512_mask_sub_epi8(levels, negative, _mm512_setzero_si512(), levels);
}

// 16 bytes at p, p + stride, p + 2 stride and p + 3 stride.
PCDVQ_INLINE Wide load_rows(const uint8_t* p, int64_t stride) {
  if (__builtin_constant_p(stride) && stride == 16) return load_wide(p);
  return join(load_halves(p, p + stride), load_halves(p + 2 * stride, p + 3 * stride));
}

// [4][16 rows], from four dwords of each of 16 rows, `stride` bytes apart.
PCDVQ_INLINE void dwords_of_rows(const uint8_t* rows, int64_t stride, Wide (&out)[4]) {
  Wide z[4];  // rows i, i + 4, i + 8 and i + 12
  for (int i = 0; i < 4; ++i) z[i] = load_rows(rows + i * stride, 4 * stride);
  const Wide low01 = _mm512_unpacklo_epi32(z[0], z[1]), low23 = _mm512_unpacklo_epi32(z[2], z[3]);
  const Wide high01 = _mm512_unpackhi_epi32(z[0], z[1]);
  const Wide high23 = _mm512_unpackhi_epi32(z[2], z[3]);
  out[0] = _mm512_unpacklo_epi64(low01, low23);
  out[1] = _mm512_unpackhi_epi64(low01, low23);
  out[2] = _mm512_unpacklo_epi64(high01, high23);
  out[3] = _mm512_unpackhi_epi64(high01, high23);
}

// Sixteen dwords or eight qwords, where `at(r)` points for lane r.
template <class At>
PCDVQ_INLINE Wide load_dwords(At at) {
  const auto four = [&](int r) __attribute__((always_inline)) {
    __m128i v = _mm_cvtsi32_si128(load_as<int32_t>(at(r)));
    v = _mm_insert_epi32(v, load_as<int32_t>(at(r + 1)), 1);
    v = _mm_insert_epi32(v, load_as<int32_t>(at(r + 2)), 2);
    return _mm_insert_epi32(v, load_as<int32_t>(at(r + 3)), 3);
  };
  return join(_mm256_set_m128i(four(4), four(0)), _mm256_set_m128i(four(12), four(8)));
}

template <class At>
PCDVQ_INLINE Wide load_qwords(At at) {
  const auto pair = [&](int r) __attribute__((always_inline)) { return two_rows(at(r), at(r + 1)); };
  return join(_mm256_set_m128i(pair(2), pair(0)), _mm256_set_m128i(pair(6), pair(4)));
}

// Steps s and s + 1, from eight columns of rows 0 to 7, and of rows 8 to 15.
template <class Sink>
PCDVQ_INLINE void give_octets(Wide a, Wide b, int s, Sink&& sink) {
  const Wide even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const Wide odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  sink(s, 0, _mm512_permutex2var_epi32(a, even, b));
  sink(s + 1, 1, _mm512_permutex2var_epi32(a, odd, b));
}

// Of levels as they are stored; -128 is -127.
PCDVQ_INLINE Wide plus_128(Wide levels) {
  const Wide lowest = _mm512_set1_epi8(-127);
  return _mm512_xor_si512(_mm512_max_epi8(levels, lowest), _mm512_set1_epi8(int8_t(0x80)));
}

struct WordLanes {
  uint16_t lane[32];
};

// Where two registers of four rows have the words of their first two codes.
constexpr WordLanes make_transposition() {
  WordLanes from = {};
  for (int i = 0; i < 32; ++i) from.lane[i] = uint16_t(i % 8 * 8 + i / 16);
  return from;
}

// The lane of the row above.
constexpr WordLanes make_above() {
  WordLanes from = {};
  for (int i = 1; i < 32; ++i) from.lane[i] = uint16_t(i - 1);
  return from;
}

// Words of eight codes in each of 16 rows, four rows in a register.
struct PieceWords {
  Wide rows[4];

  // [8 codes][16 rows], two codes in a register.
  PCDVQ_INLINE void transpose(Wide (&codes)[4]) const {
    alignas(64) static constexpr WordLanes kFrom = make_transposition();
    for (int i = 0; i < 4; ++i) {
      // Lanes that a permutation leaves alone keep their index for the next one.
      Wide v = _mm512_add_epi16(load_wide(kFrom.lane), _mm512_set1_epi16(int16_t(2 * i)));
      v = _mm512_mask2_permutex2var_epi16(rows[0], v, 0x00FF00FF, rows[1]);
      codes[i] = _mm512_mask2_permutex2var_epi16(rows[2], v, 0xFF00FF00, rows[3]);
    }
  }
};

// Pieces of eight codes as words that have a code's sign bits, and the others, in their low bits.
template <int CODE_BITS, int SIGN_BITS>
struct Piece {
  static constexpr int kBytes = CODE_BITS;
  static constexpr bool kTwoWords = CODE_BITS > 16;
  static constexpr int kReadBytes = kTwoWords ? 18 : 16;

  // Of words that start at bit `first` of each code.
  struct Fields {
    alignas(16) uint8_t byte[16];
    alignas(16) uint16_t shift[8];
  };
  static constexpr Fields make_fields(int first) {
    Fields fields = {};
    for (int i = 0; i < 8; ++i) {
      const int bit = CODE_BITS * i + first - (kTwoWords && i >= 4 ? 16 : 0);
      for (int b = 0; b < 2; ++b) fields.byte[2 * i + b] = uint8_t(bit / 8 + b);
      fields.shift[i] = uint16_t(bit % 8);
    }
    return fields;
  }

  template <int FIRST>
  static PCDVQ_INLINE Wide words(const uint8_t* p, int64_t stride) {
    Wide bytes = load_rows(p, stride);
    if (CODE_BITS == 16) return bytes;
    static constexpr Fields kFields = make_fields(FIRST);
    const Wide places = in_every_lane(kFields.byte);
    Wide lanes = _mm512_shuffle_epi8(bytes, places);
    if (kTwoWords) {  // codes 4 to 7 end past the 16th byte
      lanes = _mm512_mask_shuffle_epi8(lanes, 0xFF00FF00FF00FF00, load_rows(p + 2, stride), places);
    }
    return _mm512_srlv_epi16(lanes, in_every_lane(kFields.shift));
  }

  // Of 16 rows, as PieceWords::transpose leaves them: signs in the low bits of `signs`, the rest
  // in the low bits of `rest`, other bits above them.
  static PCDVQ_INLINE void load(const uint8_t* p, int64_t stride, Wide (&signs)[4],
                                Wide (&rest)[4]) {
    PieceWords piece;
    for (int i = 0; i < 4; ++i) piece.rows[i] = words<0>(p + 4 * i * stride, stride);
    piece.transpose(signs);
    if (kTwoWords) {
      for (int i = 0; i < 4; ++i) piece.rows[i] = words<SIGN_BITS>(p + 4 * i * stride, stride);
      piece.transpose(rest);
    } else {
      for (int i = 0; i < 4; ++i) rest[i] = _mm512_srli_epi16(signs[i], SIGN_BITS);
    }
  }
};

// Codes of a block as they are, row after row.
template <int BLOCK_BYTES>
void pack_rows(const uint8_t* codes, int64_t stride, uint8_t* out) {
  for (int r = 0; r < kBlockRows; ++r) {
    std::memcpy(out + r * BLOCK_BYTES, codes + r * stride, BLOCK_BYTES);
  }
}

// Signed codecs (STATES 0) and trellis codecs, as in lookup.h.
template <int DIM, int CODE_BITS, bool PARITY, int STATES>
struct LookupBlocks {
  using P = Piece<CODE_BITS, DIM>;
  static constexpr int kRest = CODE_BITS - DIM;
  static constexpr int kRotationBits = STATES ? log2_of(DIM) : 0;
  static constexpr int kBaseBits = kRest - kRotationBits;
  static constexpr int kRowBytes = STATES ? 2 * DIM : DIM;
  static constexpr int kCodewords = 1 << (kBaseBits + PARITY + STATES);
  static constexpr int kCodewordBytes = DIM * kCodewords;
  static_assert(kRowBytes * kCodewords <= kTableBytes, "the table of a thread");

  static constexpr int kPieces = 8 / DIM;
  static constexpr int kBlockBytes = kPieces * P::kBytes;
  using Tables = const int8_t*;
  static constexpr int kReadBytes = kBlockBytes - P::kBytes + P::kReadBytes;

  static constexpr auto pack = pack_rows<kBlockBytes>;

  static PCDVQ_INLINE Wide set(int value) { return _mm512_set1_epi16(int16_t(value)); }

  // Where the table has the levels of two codes of 16 rows.
  static PCDVQ_INLINE Wide offsets(Wide signs, Wide rest) {
    constexpr int kRowShift = log2_of(kRowBytes);
    Wide row = _mm512_and_si512(_mm512_slli_epi16(rest, kRowShift + PARITY),
                                set(((1 << kBaseBits) - 1) << (kRowShift + PARITY)));
    if (PARITY) {
      Wide odd = signs;
      if (DIM == 4) odd = _mm512_and_si512(odd, set(15));
      odd = _mm512_and_si512(_mm512_popcnt_epi8(odd), set(1));
      row = _mm512_or_si512(row, _mm512_slli_epi16(odd, kRowShift));
    }
    if (!STATES) return row;
    const Wide rotation = _mm512_and_si512(_mm512_srli_epi16(rest, kBaseBits), set(DIM - 1));
    alignas(64) static constexpr WordLanes kAbove = make_above();
    // A block is a segment: its first row has state 0.
    const Wide above = _mm512_maskz_permutexvar_epi16(0xFFFEFFFE, load_wide(kAbove.lane), rest);
    constexpr int kStateAt = kRowShift + PARITY + kBaseBits;
    constexpr int kLeft = kStateAt - (kRest - STATES);
    const Wide moved =
        kLeft < 0 ? _mm512_srli_epi16(above, -kLeft) : _mm512_slli_epi16(above, kLeft);
    const Wide state = _mm512_and_si512(moved, set(((1 << STATES) - 1) << kStateAt));
    return _mm512_or_si512(row, _mm512_or_si512(rotation, state));
  }

  // What is looked up, of a piece.
  struct Codes {
    alignas(64) uint16_t offsets[8][16];
    alignas(64) uint64_t signs[8][DIM / 4];  // a bit for each level of 16 rows
  };

  static PCDVQ_INLINE void store_signs(Wide signs, uint64_t* out) {
    const __m256i bytes = _mm512_cvtepi16_epi8(signs);
    if (DIM == 8) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), bytes);
    const __m256i nibbles = _mm256_and_si256(bytes, _mm256_set1_epi8(15));
    const __m256i pairs = _mm256_maddubs_epi16(nibbles, _mm256_set1_epi16(0x1001));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtepi16_epi8(pairs));
  }

  // One block, whose rows of codes are `stride` bytes apart.
  template <class Sink>
  static PCDVQ_INLINE void decode(const int8_t* table, const uint8_t* codes, int64_t stride,
                                  Sink&& sink) {
    for (int i = 0; i < kPieces; ++i) {
      Codes looked_up;
      Wide signs[4], rest[4];
      P::load(codes + P::kBytes * i, stride, signs, rest);
      for (int j = 0; j < 4; ++j) {
        _mm512_store_si512(looked_up.offsets[2 * j], offsets(signs[j], rest[j]));
        store_signs(signs[j], looked_up.signs[2 * j]);
      }
      // Or gcc would take the offsets from the registers one by one, which takes longer than loads.
      __asm__("" : "+m"(looked_up));
      for (int c = 0; c < 8; c += 2) {
        for (int turn = 0; turn < 2; ++turn) {
          const int code = c + turn;
          levels(table, looked_up.offsets[code], looked_up.signs[code], 8 * i + code, turn, sink);
        }
      }
    }
  }

  // The levels of a code of 16 rows, the block's number `code`.
  template <class Sink>
  static PCDVQ_INLINE void levels(const int8_t* table, const uint16_t* offsets,
                                  const uint64_t* signs, int code, int turn, Sink&& sink) {
    // A load of four offsets and shifts take less time than four loads.
    uint64_t fours[4];
    std::memcpy(fours, offsets, sizeof(fours));
    const auto at = [&](int r) __attribute__((always_inline)) {
      return table + uint16_t(fours[r / 4] >> (16 * (r % 4)));
    };
    if (DIM == 4) {
      sink(code, turn, negate_levels(load_dwords(at), signs[0]));
      return;
    }
    const auto upper = [&](int r) __attribute__((always_inline)) { return at(r + 8); };
    const Wide a = negate_levels(load_qwords(at), signs[0]);
    const Wide b = negate_levels(load_qwords(upper), signs[1]);
    give_octets(a, b, 2 * code, sink);
  }

  // Its levels, plus 128; of trellis codecs each row twice.
  static void expand(const int8_t* codewords, int8_t* table) {
    for (int64_t row = 0; row < kCodewords; ++row) {
      for (int64_t i = 0; i < kRowBytes; ++i) {
        table[row * kRowBytes + i] = int8_t(codewords[row * DIM + i % DIM] ^ 0x80);
      }
    }
  }
};

// Codes of 16 bits that are rows of a table of 8 levels.
struct RowBlocks {
  using P = Piece<16, 0>;
  static constexpr int kBlockBytes = P::kBytes;
  using Tables = const int8_t*;
  static constexpr int kReadBytes = P::kReadBytes;
  static constexpr int kCodewordBytes = 0;
  static constexpr auto pack = pack_rows<kBlockBytes>;

  template <class Sink>
  static PCDVQ_INLINE void decode(const int8_t* table, const uint8_t* codes, int64_t stride,
                                  Sink&& sink) {
    PieceWords piece;
    for (int i = 0; i < 4; ++i) piece.rows[i] = P::template words<0>(codes + 4 * i * stride, stride);
    Wide transposed[4];
    piece.transpose(transposed);
    alignas(64) uint16_t rows[8][16];
    for (int i = 0; i < 4; ++i) _mm512_store_si512(rows[2 * i], transposed[i]);
    __asm__("" : "+m"(rows));
    for (int c = 0; c < 8; ++c) {
      const auto lower = [&](int r) __attribute__((always_inline)) {
        return table + 8 * int64_t(rows[c][r]);
      };
      const auto upper = [&](int r) __attribute__((always_inline)) { return lower(r + 8); };
      give_octets(plus_128(load_qwords(lower)), plus_128(load_qwords(upper)), 2 * c, sink);
    }
  }
};

// From levels of 16 rows, `stride` bytes apart, of which `at(v)` says where columns 16 v to 16 v + 15
// are.
template <class At, class Sink>
PCDVQ_INLINE void give_levels(const uint8_t* rows, int64_t stride, At at, Sink&& sink) {
  for (int v = 0; v < 4; ++v) {
    Wide dwords[4];
    dwords_of_rows(rows + at(v), stride, dwords);
    for (int i = 0; i < 4; ++i) sink(4 * v + i, i % 2, plus_128(dwords[i]));
  }
}

// Codes that are the levels, but for -128.
struct Int8Blocks {
  using Tables = const int8_t*;
  static constexpr int kBlockBytes = kScaleColumns, kReadBytes = kScaleColumns;
  static constexpr int kCodewordBytes = 0;
  static constexpr auto pack = pack_rows<kBlockBytes>;

  template <class Sink>
  static PCDVQ_INLINE void decode(const int8_t*, const uint8_t* codes, int64_t stride,
                                  Sink&& sink) {
    give_levels(codes, stride, [](int v) { return 16 * v; }, sink);
  }
};

}  // namespace
}  // namespace pcdvq
