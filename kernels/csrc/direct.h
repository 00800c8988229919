// Decodes the offered layouts whose codes need no more than a load, as lookup.h does the others.
#pragma once

#include "lookup.h"

namespace pcdvq {
namespace {

struct NoStates {};

// Codes that are the levels, but for -128.
struct Int8 {
  static constexpr int kPieces = 1;
  static constexpr int kVectors = kUnitVectors;
  static constexpr bool kSignedLevels = true;
  static constexpr bool kRowsFirst = false;
  static constexpr int kUnitBytes = 128;
  using States = NoStates;

  static PCDVQ_INLINE States no_states() { return {}; }
  static PCDVQ_INLINE States states_of(const uint8_t*) { return {}; }

  struct Unit {
    const uint8_t* codes;

    PCDVQ_INLINE void load(const int8_t*, const uint8_t* unit, int, States&) { codes = unit; }

    PCDVQ_INLINE Bytes signed_levels(const int8_t*, int v) const {
      const uint8_t* run = codes + 16 * v;
      return _mm256_max_epi8(load_halves(run, run + kScaleColumns), _mm256_set1_epi8(-127));
    }
  };
};

// Codes of 8 signed levels that are rows of the table.
template <int CODE_BITS>
struct Rows8 {
  static constexpr int kPieces = 1;
  static constexpr int kVectors = kUnitVectors;
  static constexpr bool kSignedLevels = true;
  static constexpr bool kRowsFirst = false;
  static constexpr int kHalfBytes = CODE_BITS;  // 8 codes
  static constexpr int kUnitBytes = 2 * kHalfBytes;
  using States = NoStates;

  static PCDVQ_INLINE States no_states() { return {}; }
  static PCDVQ_INLINE States states_of(const uint8_t*) { return {}; }

  struct Unit {
    const uint8_t* codes;

    PCDVQ_INLINE void load(const int8_t*, const uint8_t* unit, int, States&) { codes = unit; }

    // The row of code `i` of a half, from a word that ends inside of the half.
    static PCDVQ_INLINE const int8_t* row(const int8_t* table, const uint8_t* half, int i) {
      const int bit = CODE_BITS * i;
      const int byte = bit / 8 < kHalfBytes - 4 ? bit / 8 : kHalfBytes - 4;
      const uint32_t word = load_as<uint32_t>(half + byte) >> (bit - 8 * byte);
      return table + 8 * int64_t(word & ((1u << CODE_BITS) - 1));
    }

    PCDVQ_INLINE Bytes signed_levels(const int8_t* table, int v) const {
      const uint8_t* half = codes + kHalfBytes;
      const __m128i low = two_rows(row(table, codes, 2 * v), row(table, codes, 2 * v + 1));
      const __m128i high = two_rows(row(table, half, 2 * v), row(table, half, 2 * v + 1));
      return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
    }
  };
};

}  // namespace
}  // namespace pcdvq
