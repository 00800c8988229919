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

inline Wide join(__m256i low, __m256i high) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
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

// Eight qwords, where `at(r)` points for lane r.
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

// Codes of a block as they are, row after row.
template <int BLOCK_BYTES>
void pack_rows(const uint8_t* codes, int64_t stride, uint8_t* out) {
  for (int r = 0; r < kBlockRows; ++r) {
    std::memcpy(out + r * BLOCK_BYTES, codes + r * stride, BLOCK_BYTES);
  }
}

// Codes of 16 bits that are rows of a table of 8 levels.
struct RowBlocks {
  static constexpr int kBlockBytes = 16;
  static constexpr auto pack = pack_rows<kBlockBytes>;

  template <class Sink>
  static PCDVQ_INLINE void decode(const int8_t* table, const uint8_t* codes, int64_t stride,
                                  Sink&& sink) {
    PieceWords piece;
    for (int i = 0; i < 4; ++i) piece.rows[i] = load_rows(codes + 4 * i * stride, stride);
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
  static constexpr int kBlockBytes = kScaleColumns;
  static constexpr auto pack = pack_rows<kBlockBytes>;

  template <class Sink>
  static PCDVQ_INLINE void decode(const int8_t*, const uint8_t* codes, int64_t stride,
                                  Sink&& sink) {
    give_levels(codes, stride, [](int v) { return 16 * v; }, sink);
  }
};

}  // namespace
}  // namespace pcdvq
