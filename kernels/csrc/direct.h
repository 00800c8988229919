// Decodes the offered layouts, 32 weights at a time, for AVX2: codes that need no more than a load here.
// Included once per instruction set that has it, after its target pragma.
//
// Columns are taken in units of 128, in the order that isa.h explains: the low half of a register
// belongs to the first 64 columns of a unit, the high half to the last 64.
#pragma once

#include <immintrin.h>

#include <type_traits>

#include "isa.h"
#include "numeric.h"
#include "trellis_code.h"

#define PCDVQ_INLINE inline __attribute__((always_inline))

namespace pcdvq {
namespace {

using Bytes = __m256i;

inline Bytes load_bytes(const void* p) {
  return _mm256_loadu_si256(static_cast<const Bytes*>(p));
}

// Both halves of a register from memory.
inline Bytes load_halves(const uint8_t* low, const uint8_t* high) {
  const __m128i* p = reinterpret_cast<const __m128i*>(low);
  const __m128i* q = reinterpret_cast<const __m128i*>(high);
  return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(p)), _mm_loadu_si128(q), 1);
}

// Eight levels at each pointer.
inline __m128i two_rows(const int8_t* a, const int8_t* b) {
  const __m128d low = _mm_castsi128_pd(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(a)));
  return _mm_castpd_si128(_mm_loadh_pd(low, reinterpret_cast<const double*>(b)));
}

constexpr int log2_of(int value) { return value <= 1 ? 0 : 1 + log2_of(value / 2); }

// Codes that are the levels, but for -128.
struct Int8 {
  static constexpr bool kRowsFirst = false;
  static constexpr int kUnitBytes = 128;

  struct Unit {
    const uint8_t* codes;

    PCDVQ_INLINE void load(const int8_t*, const uint8_t* unit) { codes = unit; }

    PCDVQ_INLINE Bytes levels(const int8_t*, int v) const {
      const uint8_t* run = codes + 16 * v;
      return _mm256_max_epi8(load_halves(run, run + kScaleColumns), _mm256_set1_epi8(-127));
    }
  };
};

// Codes of 8 signed levels that are rows of the table.
template <int CODE_BITS>
struct Rows8 {
  static constexpr bool kRowsFirst = false;
  static constexpr int kHalfBytes = CODE_BITS;  // 8 codes
  static constexpr int kUnitBytes = 2 * kHalfBytes;

  struct Unit {
    const uint8_t* codes;

    PCDVQ_INLINE void load(const int8_t*, const uint8_t* unit) { codes = unit; }

    // The row of code `i` of a half, from a word that ends inside of the half.
    static PCDVQ_INLINE const int8_t* row(const int8_t* table, const uint8_t* half, int i) {
      const int bit = CODE_BITS * i;
      const int byte = bit / 8 < kHalfBytes - 4 ? bit / 8 : kHalfBytes - 4;
      const uint32_t word = load_as<uint32_t>(half + byte) >> (bit - 8 * byte);
      return table + 8 * int64_t(word & ((1u << CODE_BITS) - 1));
    }

    PCDVQ_INLINE Bytes levels(const int8_t* table, int v) const {
      const uint8_t* half = codes + kHalfBytes;
      const __m128i low = two_rows(row(table, codes, 2 * v), row(table, codes, 2 * v + 1));
      const __m128i high = two_rows(row(table, half, 2 * v), row(table, half, 2 * v + 1));
      return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
    }
  };
};

}  // namespace
}  // namespace pcdvq
