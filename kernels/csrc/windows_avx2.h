// Decodes codec `compact` for AVX2, as lookup.h does the others.
#pragma once

#include "lookup.h"
#include "windows.h"

namespace pcdvq {
namespace {

// The 32 codes of a unit are bytes of a register. A coordinate's 128 levels are eight tables of 16: a
// permutation gives 0 for negative bytes, so that of an index less 16 i is of the i-th table or of one
// after it, or nothing. Tables hold their exclusive or with the one before.
template <int EXTRA>
struct Windows {
  static constexpr int kPieces = 1;
  static constexpr int kVectors = kUnitVectors;
  static constexpr bool kSignedLevels = true;
  static constexpr bool kRowsFirst = false;
  static constexpr int kOlder = older_bits(EXTRA);
  static constexpr int kHalfBytes = 16 + 8 * EXTRA;  // codes of 64 columns
  static constexpr int kUnitBytes = 2 * kHalfBytes;
  static constexpr int kTables = kWindowRows / 16;

  static PCDVQ_INLINE Bytes set(int value) { return _mm256_set1_epi8(int8_t(value)); }

  // Bits `mask` of each byte, LEFT places higher; the mask leaves none that came from another byte.
  template <int LEFT>
  static PCDVQ_INLINE Bytes move(Bytes bytes, int mask) {
    const Bytes moved =
        LEFT < 0 ? _mm256_srli_epi16(bytes, -LEFT) : _mm256_slli_epi16(bytes, LEFT);
    return _mm256_and_si256(moved, set(mask));
  }

  // Codes of a unit: the bits of the stream, the last one the highest, and the extra bits.
  struct Codes {
    Bytes stream, extra;
  };

  // Eight codes of 12 bits in words, of each half; the last bytes of a half are read from four before,
  // so as not to read after the unit.
  static PCDVQ_INLINE Bytes words_of_12(const uint8_t* unit, int i) {
    constexpr int kBefore = 4;
    alignas(32) uint8_t places[32];
    for (int b = 0; b < 32; ++b) places[b] = uint8_t(b % 16 / 2 * 3 / 2 + b % 2 + (i ? kBefore : 0));
    const uint8_t* from = unit + (i ? 12 - kBefore : 0);
    const Bytes words =
        _mm256_shuffle_epi8(load_halves(from, from + kHalfBytes), load_bytes(places));
    return _mm256_blend_epi16(_mm256_and_si256(words, _mm256_set1_epi16(0xFFF)),
                              _mm256_srli_epi16(words, 4), 0xAA);
  }

  static PCDVQ_INLINE Codes load_codes(const uint8_t* unit) {
    Codes codes = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    Bytes fresh = codes.stream;
    if (EXTRA == 0) {
      fresh = load_bytes(unit);
    } else {
      const auto words = [unit](int i) __attribute__((always_inline)) {
        return EXTRA == 1 ? words_of_12(unit, i)
                          : load_halves(unit + 16 * i, unit + kHalfBytes + 16 * i);
      };
      const Bytes a = words(0), b = words(1);
      const Bytes low = _mm256_set1_epi16((1 << 4 * EXTRA) - 1);
      codes.extra = _mm256_packus_epi16(_mm256_and_si256(a, low), _mm256_and_si256(b, low));
      fresh = _mm256_packus_epi16(_mm256_srli_epi16(a, 4 * EXTRA), _mm256_srli_epi16(b, 4 * EXTRA));
    }
    codes.stream = _mm256_or_si256(move<-1>(fresh, 0x7F), move<7>(fresh, 0x80));
    return codes;
  }

  // Of the rows below.
  struct States {
    Bytes bytes;
  };

  static PCDVQ_INLINE States no_states() { return {_mm256_setzero_si256()}; }

  // The lowest bits but two, for the last is in no state.
  static PCDVQ_INLINE States state(const Codes& codes) {
    return {move<kOlder - 7>(codes.stream, (1 << kOlder) - 1)};
  }

  static PCDVQ_INLINE States states_of(const uint8_t* unit) { return state(load_codes(unit)); }

  // Indices of coordinate J.
  template <int J>
  static PCDVQ_INLINE Bytes index(const Codes& codes, Bytes states) {
    constexpr int kWindow = kOlder + 2;
    constexpr int kFromState = kOlder > 2 * J ? kOlder - 2 * J : 0;
    constexpr int kStates = (1 << kFromState) - 1, kRest = (1 << kWindow) - 1 - kStates;
    Bytes index = move<kOlder - 2 * J>(codes.stream, kRest);
    if (kFromState) index = _mm256_or_si256(index, move<-2 * J>(states, kStates));
    if (EXTRA) {
      constexpr int kExtras = ((1 << EXTRA) - 1) << kWindow;
      index = _mm256_or_si256(index, move<kWindow - EXTRA * J>(codes.extra, kExtras));
    }
    return index;
  }

  static PCDVQ_INLINE Bytes look_up(const int8_t* tables, Bytes index) {
    Bytes levels = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int i = 0; i < kTables; ++i) {
      const __m128i* table = reinterpret_cast<const __m128i*>(tables + 16 * i);
      const Bytes both = _mm256_broadcastsi128_si256(_mm_loadu_si128(table));
      levels = _mm256_xor_si256(levels, _mm256_shuffle_epi8(both, index));
      index = _mm256_sub_epi8(index, set(16));
    }
    return levels;
  }

  struct Unit {
    Bytes vectors[kVectors];

    PCDVQ_INLINE void load(const int8_t* table, const uint8_t* unit, int, States& states) {
      const Codes codes = load_codes(unit);
      const auto of = [table](int j, Bytes index) __attribute__((always_inline)) {
        return look_up(table + kWindowRows * j, index);
      };
      const Bytes a = of(0, index<0>(codes, states.bytes)), b = of(1, index<1>(codes, states.bytes));
      const Bytes c = of(2, index<2>(codes, states.bytes)), d = of(3, index<3>(codes, states.bytes));
      const Bytes low_ab = _mm256_unpacklo_epi8(a, b), low_cd = _mm256_unpacklo_epi8(c, d);
      const Bytes high_ab = _mm256_unpackhi_epi8(a, b), high_cd = _mm256_unpackhi_epi8(c, d);
      vectors[0] = _mm256_unpacklo_epi16(low_ab, low_cd);
      vectors[1] = _mm256_unpackhi_epi16(low_ab, low_cd);
      vectors[2] = _mm256_unpacklo_epi16(high_ab, high_cd);
      vectors[3] = _mm256_unpackhi_epi16(high_ab, high_cd);
      states = state(codes);
    }

    PCDVQ_INLINE Bytes signed_levels(const int8_t*, int v) const { return vectors[v]; }
  };

  // [kWindowDim][kTables][16]
  static void expand(const int8_t* codewords, int8_t* table) {
    for (int i = 0; i < kWindowRows; ++i) {
      for (int j = 0; j < kWindowDim; ++j) {
        const int8_t* level = codewords + kWindowDim * i + j;
        const int8_t before = i < 16 ? 0 : level[-16 * kWindowDim];
        table[kWindowRows * j + i] = int8_t(*level ^ before);
      }
    }
  }
};

}  // namespace
}  // namespace pcdvq
