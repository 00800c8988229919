// Decodes codes of codec `compact`: of 64 codes one coordinate at a time, by permutations of tables that
// are a few registers. Included once, by block_products.h.
//
// Vector v of a block is [16 rows][4 codes], a byte each; step DIM * v + j is coordinate j of its codes.
#pragma once

#include "block_decode.h"

namespace pcdvq {
namespace {

// Bits `mask` of each byte of `a`, the others of `b`.
PCDVQ_INLINE Wide choose(int mask, Wide a, Wide b) {
  return _mm512_ternarylogic_epi32(_mm512_set1_epi8(int8_t(mask)), a, b, 0xCA);
}

// Codes of the rows above; a block is a segment, whose first row has state 0.
PCDVQ_INLINE Wide rows_above(Wide codes) {
  return _mm512_alignr_epi32(codes, _mm512_setzero_si512(), 15);
}

// For each coordinate a table of 64 * REGISTERS levels plus 128, in the order of the codewords.
template <int DIM, int REGISTERS>
struct RegisterTables {
  static constexpr int kEntries = 64 * REGISTERS;
  static constexpr int kCodewordBytes = DIM * kEntries;
  Wide tables[DIM][REGISTERS];

  static void expand(const int8_t* codewords, int8_t* table) {
    for (int i = 0; i < kCodewordBytes; ++i) {
      table[i % DIM * kEntries + i / DIM] = int8_t(codewords[i] ^ 0x80);
    }
  }

  PCDVQ_INLINE void load(const int8_t* table) {
    for (int j = 0; j < DIM; ++j) {
      for (int i = 0; i < REGISTERS; ++i) {
        tables[j][i] = load_wide(table + j * kEntries + 64 * i);
        __asm__("" : "+v"(tables[j][i]));  // or each use would load it again
      }
    }
  }

  // Hands over the steps of vector v; bit sign_bit + j of `signs`: coordinate j is negative.
  template <class Sink>
  PCDVQ_INLINE void give(int v, Wide index, Wide signs, int sign_bit, Sink&& sink) const {
    const __mmask64 upper = REGISTERS > 2 ? _mm512_movepi8_mask(index) : 0, lower = ~upper;
#pragma GCC unroll 4
    for (int j = 0; j < DIM; ++j) {
      const Wide(&t)[REGISTERS] = tables[j];
      Wide levels;
      if constexpr (REGISTERS == 2) {
        levels = _mm512_permutex2var_epi8(t[0], index, t[1]);
      } else {
        // Lanes that a permutation leaves alone keep their index for the next one.
        levels = _mm512_mask2_permutex2var_epi8(t[0], index, lower, t[1]);
        levels = _mm512_mask2_permutex2var_epi8(t[2], levels, upper, t[3]);
      }
      const Wide bit = _mm512_set1_epi8(int8_t(1 << (sign_bit + j)));
      sink(DIM * v + j, j % 2, negate_levels(levels, _mm512_test_epi8_mask(signs, bit)));
    }
  }
};

// Codes of 8 bits, which are the bytes of rows, and 4 states: of two signs and 6 bits, or of four signs
// and 4 bits with parity. Packed, vectors follow each other.
template <int DIM, bool PACKED>
struct CompactBlocks : RegisterTables<DIM, DIM == 2 ? 4 : 2> {
  static constexpr int kBlockBytes = kScaleColumns / DIM, kReadBytes = kBlockBytes;
  static constexpr int kVectors = kBlockBytes / 4;

  // State, which is the top bits of the code above, pattern, and parity in the lowest bit.
  static PCDVQ_INLINE Wide index(Wide codes) {
    const Wide above = rows_above(codes);
    if (DIM == 2) return choose(0xC0, above, _mm512_srli_epi16(codes, 2));
    const Wide ones = _mm512_popcnt_epi8(_mm512_and_si512(codes, _mm512_set1_epi8(15)));
    const Wide pattern = choose(1, ones, _mm512_srli_epi16(codes, 3));
    return choose(0xE0, _mm512_srli_epi16(above, 1), pattern);
  }

  template <class Sink>
  static PCDVQ_INLINE void decode(const int8_t* table, const uint8_t* codes, int64_t stride,
                                  Sink&& sink) {
    CompactBlocks tables;
    tables.load(table);
    for (int v = 0; v < kVectors; v += 4) {
      Wide vectors[4];
      if (PACKED) {
        for (int i = 0; i < 4; ++i) vectors[i] = load_wide(codes + 64 * (v + i));
      } else {
        dwords_of_rows(codes + 4 * v, stride, vectors);
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) tables.give(v + i, index(vectors[i]), vectors[i], 0, sink);
    }
  }

  static void pack(const uint8_t* codes, int64_t stride, uint8_t* out) {
    for (int r = 0; r < kBlockRows; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        std::memcpy(out + 64 * v + 4 * r, codes + r * stride + 4 * v, 4);
      }
    }
  }
};

// Codes of two signs and 4 bits, 8 states. Packed only: first the patterns, two vectors in one, then
// the signs, four vectors in one.
struct CompactBlocks6 : RegisterTables<2, 2> {
  static constexpr int kBlockBytes = 24, kReadBytes = kBlockBytes;

  template <class Sink>
  static PCDVQ_INLINE void decode(const int8_t* table, const uint8_t* codes, int64_t, Sink&& sink) {
    CompactBlocks6 tables;
    tables.load(table);
#pragma GCC unroll 4
    for (int v = 0; v < 8; v += 2) {
      const Wide patterns = load_wide(codes + 32 * v), above = rows_above(patterns);
      const Wide signs = load_wide(codes + 256 + 64 * (v / 4));
      // The top three bits of the pattern above, then the pattern; bit 7 does not count.
      const Wide low = choose(0xF0, _mm512_slli_epi16(above, 3), patterns);
      tables.give(v, low, signs, 2 * (v % 4), sink);
      const Wide high = choose(0xF0, _mm512_srli_epi16(above, 1), _mm512_srli_epi16(patterns, 4));
      tables.give(v + 1, high, signs, 2 * (v % 4) + 2, sink);
    }
  }

  static void pack(const uint8_t* codes, int64_t stride, uint8_t* out) {
    std::memset(out, 0, kBlockRows * kBlockBytes);
    for (int r = 0; r < kBlockRows; ++r, codes += stride) {
      for (int c = 0; c < 32; ++c) {
        const int code = load_as<uint16_t>(codes + 6 * c / 8) >> (6 * c % 8) & 63;
        const int v = c / 4, place = 4 * r + c % 4;
        out[64 * (v / 2) + place] |= uint8_t(code >> 2 << 4 * (v % 2));
        out[256 + 64 * (v / 4) + place] |= uint8_t((code & 3) << 2 * (v % 4));
      }
    }
  }
};

}  // namespace
}  // namespace pcdvq
