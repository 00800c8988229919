// Decodes codec `compact` for AVX2, as lookup.h does the others.
#pragma once

#include "lookup.h"

namespace pcdvq {
namespace {

// Codes of DIM signs and a pattern, without rotation. The table's rows are the levels of a code under
// each state, signs included: it is small enough.
template <int DIM, int CODE_BITS, bool PARITY, int STATES>
struct Compact {
  static constexpr int kPieces = 1;
  static constexpr int kVectors = kUnitVectors;
  static constexpr bool kRowsFirst = false;
  static constexpr int kCodes = kUnitColumns / DIM;
  static constexpr int kUnitBytes = kCodes * CODE_BITS / 8;
  static_assert((DIM << (CODE_BITS + STATES)) <= kTableBytes, "the table is on the stack");

  // Of the rows below: states, above the bits of a code.
  struct States {
    Bytes words[kCodes / 16];
  };

  // Codes [16 i, 16 i + 16) of a unit, in the low bits of words.
  static PCDVQ_INLINE Bytes codes(const uint8_t* unit, int i) {
    static_assert(CODE_BITS == 8 || CODE_BITS == 6, "of which whole words hold four or two codes");
    if (CODE_BITS == 8) {
      return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(unit + 16 * i)));
    }
    // 12 bytes; the last ones are read from four before, so as not to read after the unit.
    const int before = i == kCodes / 16 - 1 ? 4 : 0;
    const __m128i bytes =
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(unit + 12 * i - before));
    alignas(32) uint8_t places[32];
    for (int c = 0; c < 16; ++c) {
      places[2 * c] = uint8_t(6 * c / 8 + before);
      places[2 * c + 1] = uint8_t(c % 4 == 3 ? 0x80 : places[2 * c] + 1);  // the code ends before
    }
    const Bytes words = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bytes), load_bytes(places));
    // A code to the top of its word: it starts at bit 0, 6, 4 or 2.
    const Bytes left = _mm256_set1_epi64x(1 << 10 | int64_t(1 << 4) << 16 | int64_t(1 << 6) << 32 |
                                          int64_t(1 << 8) << 48);
    return _mm256_srli_epi16(_mm256_mullo_epi16(words, left), 10);
  }

  static PCDVQ_INLINE Bytes state(Bytes code) {
    return _mm256_slli_epi16(_mm256_srli_epi16(code, CODE_BITS - STATES), CODE_BITS);
  }

  static PCDVQ_INLINE States no_states() {
    States none;
    for (Bytes& words : none.words) words = _mm256_setzero_si256();
    return none;
  }

  static PCDVQ_INLINE States states_of(const uint8_t* unit) {
    States all;
    for (int i = 0; i < kCodes / 16; ++i) all.words[i] = state(codes(unit, i));
    return all;
  }

  struct Unit {
    alignas(32) uint16_t rows[kCodes];  // of the table

    PCDVQ_INLINE void load(const int8_t*, const uint8_t* unit, int, States& all) {
#pragma GCC unroll 4
      for (int i = 0; i < kCodes / 16; ++i) {
        const Bytes code = codes(unit, i);
        _mm256_store_si256(reinterpret_cast<Bytes*>(rows + 16 * i),
                           _mm256_or_si256(code, all.words[i]));
        all.words[i] = state(code);
      }
      // Or gcc would take the rows from the registers one by one, which takes longer than loads.
      __asm__("" : "+m"(rows));
    }

    // 16 levels, from codes that follow each other.
    PCDVQ_INLINE __m128i levels(const int8_t* table, const uint16_t* at) const {
      if constexpr (DIM == 4) {
        const auto row = [=](int i) { return load_as<int32_t>(table + 4 * int64_t(at[i])); };
        const __m128i two = _mm_insert_epi32(_mm_cvtsi32_si128(row(0)), row(1), 1);
        return _mm_insert_epi32(_mm_insert_epi32(two, row(2), 2), row(3), 3);
      } else {
        const auto row = [=](int i) { return load_as<uint16_t>(table + 2 * int64_t(at[i])); };
        const auto four = [=](int i) {
          return int64_t(row(i) | uint32_t(row(i + 1)) << 16 |
                         uint64_t(row(i + 2) | uint32_t(row(i + 3)) << 16) << 32);
        };
        return _mm_set_epi64x(four(4), four(0));
      }
    }

    PCDVQ_INLINE Bytes signed_levels(const int8_t* table, int v) const {
      const uint16_t* low = rows + 16 / DIM * v;
      return _mm256_set_m128i(levels(table, low + kCodes / 2), levels(table, low));
    }
  };

  static void expand(const int8_t* codewords, int8_t* table) {
    for (int i = 0; i < 1 << (CODE_BITS + STATES); ++i) {
      const int signs = i & ((1 << DIM) - 1);
      int row = i >> DIM;  // state and pattern, which are not apart
      if (PARITY) row = 2 * row + (__builtin_popcount(unsigned(signs)) & 1);
      for (int j = 0; j < DIM; ++j) {
        const int8_t level = codewords[row * DIM + j];
        table[i * DIM + j] = int8_t(signs >> j & 1 ? -level : level);
      }
    }
  }
};

inline bool is_compact(const PcdvqLayout& layout, int dim, int pattern_bits, int state_bits) {
  return layout.vector_dim == dim && layout.sign_bits == dim && layout.parity == (dim == 4) &&
         !layout.rotation_bits && !layout.magnitude_bits && layout.pattern_bits == pattern_bits &&
         layout.state_bits == state_bits;
}

}  // namespace
}  // namespace pcdvq
