// Decodes codes of integer pyramids, eight at a time, for AVX2, as direct.h does other codes.
#pragma once

#include "direct.h"
#include "pyramid.h"

namespace pcdvq {
namespace {

template <int CODE_BITS>
struct Pyramids {
  // A unit's load takes so many steps one after another that several must be under way at once.
  static constexpr bool kRowsFirst = true;
  static constexpr int kHalfBytes = CODE_BITS;  // 8 codes
  static constexpr int kUnitBytes = 2 * kHalfBytes;

  // Four codes of each half of a unit at a time, from the first or the last 16 bytes of the halves.
  struct Constants {
    alignas(32) uint8_t byte[2][32];
    alignas(32) uint32_t shift[2][8];
  };
  static constexpr int piece_byte(int piece) { return piece ? kHalfBytes - 16 : 0; }
  static constexpr Constants make_constants() {
    Constants c = {};
    for (int piece = 0; piece < 2; ++piece) {
      for (int i = 0; i < 8; ++i) {
        const int bit = CODE_BITS * (4 * piece + i % 4) - 8 * piece_byte(piece);
        for (int j = 0; j < 4; ++j) c.byte[piece][4 * i + j] = uint8_t(bit / 8 + j);
        c.shift[piece][i] = uint32_t(bit % 8);
      }
    }
    return c;
  }
  static constexpr Constants kConstants = make_constants();

  static PCDVQ_INLINE Bytes codes(const uint8_t* unit, int piece) {
    const uint8_t* low = unit + piece_byte(piece);
    const Bytes bytes = load_halves(low, low + kHalfBytes);
    if (CODE_BITS == 32) return bytes;
    const Bytes lanes = _mm256_shuffle_epi8(bytes, load_bytes(kConstants.byte[piece]));
    const Bytes shifted = _mm256_srlv_epi32(lanes, load_bytes(kConstants.shift[piece]));
    return _mm256_and_si256(shifted, _mm256_set1_epi32(int32_t((uint64_t(1) << CODE_BITS) - 1)));
  }

  // Four fields, from byte `at` on, of the ranges of eight codes: a vector of each.
  static PCDVQ_INLINE void transpose(const int8_t* const (&ranges)[8], int at, Bytes (&fields)[4]) {
    Bytes rows[4];
    for (int i = 0; i < 4; ++i) {
      rows[i] = load_halves(reinterpret_cast<const uint8_t*>(ranges[i] + at),
                            reinterpret_cast<const uint8_t*>(ranges[i + 4] + at));
    }
    const Bytes low01 = _mm256_unpacklo_epi32(rows[0], rows[1]);
    const Bytes low23 = _mm256_unpacklo_epi32(rows[2], rows[3]);
    const Bytes high01 = _mm256_unpackhi_epi32(rows[0], rows[1]);
    const Bytes high23 = _mm256_unpackhi_epi32(rows[2], rows[3]);
    fields[0] = _mm256_unpacklo_epi64(low01, low23);
    fields[1] = _mm256_unpackhi_epi64(low01, low23);
    fields[2] = _mm256_unpacklo_epi64(high01, high23);
    fields[3] = _mm256_unpackhi_epi64(high01, high23);
  }

  // Where the points of a piece's eight codes are in the tables, and their scales.
  struct Piece {
    alignas(32) uint32_t first[8];
    alignas(32) uint32_t second[8];
    Bytes scale;  // an int16, twice

    PCDVQ_INLINE void find(const int8_t* table, Bytes code) {
      alignas(32) uint32_t tops[8];
      store(tops, _mm256_srli_epi32(code, CODE_BITS - kRangeBits));
      __asm__("" : "+m"(tops));  // or gcc would take them from the register one by one
      const int8_t* ranges[8];
      for (int i = 0; i < 8; ++i) {
        ranges[i] = table + 8 * int64_t(load_as<uint16_t>(table + 2 * int64_t(tops[i])));
      }
      Bytes fields[4], places[4];
      transpose(ranges, 0, fields);
      transpose(ranges, 16, places);
      const Bytes rest = _mm256_min_epu32(_mm256_sub_epi32(code, fields[0]), fields[1]);
      const Bytes divisor = fields[2];
      // The reciprocal is a little too small: the quotient is right or one too small.
      const __m256 estimate =
          _mm256_mul_ps(_mm256_cvtepi32_ps(rest), _mm256_castsi256_ps(fields[3]));
      const Bytes quotient = _mm256_cvttps_epi32(estimate);
      const Bytes left = _mm256_sub_epi32(rest, _mm256_mullo_epi32(quotient, divisor));
      const Bytes right = _mm256_cmpgt_epi32(divisor, left);
      const Bytes one = _mm256_andnot_si256(right, _mm256_set1_epi32(1));
      const Bytes index = _mm256_add_epi32(quotient, one);
      const Bytes other = _mm256_sub_epi32(left, _mm256_andnot_si256(right, divisor));
      store(first, _mm256_add_epi32(places[0], _mm256_slli_epi32(index, 2)));
      store(second, _mm256_add_epi32(places[1], _mm256_slli_epi32(other, 2)));
      scale = places[2];
    }

    // Points of codes `i` and `i + 1`.
    PCDVQ_INLINE __m128i points(const int8_t* table, int i) const {
      __m128i y = _mm_cvtsi32_si128(load_as<int32_t>(table + first[i]));
      y = _mm_insert_epi32(y, load_as<int32_t>(table + second[i]), 1);
      y = _mm_insert_epi32(y, load_as<int32_t>(table + first[i + 1]), 2);
      return _mm_insert_epi32(y, load_as<int32_t>(table + second[i + 1]), 3);
    }

    static PCDVQ_INLINE void store(uint32_t* to, Bytes v) {
      _mm256_store_si256(reinterpret_cast<Bytes*>(to), v);
    }
  };

  struct Unit {
    Piece pieces[2];

    PCDVQ_INLINE void load(const int8_t* table, const uint8_t* unit) {
      for (int i = 0; i < 2; ++i) pieces[i].find(table, codes(unit, i));
    }

    PCDVQ_INLINE Bytes levels(const int8_t* table, int v) const {
      const Piece& piece = pieces[v / 2];
      const int i = v % 2 * 2;
      const __m128i low = piece.points(table, i), high = piece.points(table, 4 + i);
      const Bytes y = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
      const Bytes scale = i ? _mm256_shuffle_epi32(piece.scale, 0xAA)
                            : _mm256_shuffle_epi32(piece.scale, 0x00);
      const Bytes next = i ? _mm256_shuffle_epi32(piece.scale, 0xFF)
                           : _mm256_shuffle_epi32(piece.scale, 0x55);
      // (256 y scale + 2^14) >> 15 is the rounded level, which saturates at 127 and -128.
      const Bytes zero = _mm256_setzero_si256();
      const Bytes levels =
          _mm256_packs_epi16(_mm256_mulhrs_epi16(_mm256_unpacklo_epi8(zero, y), scale),
                             _mm256_mulhrs_epi16(_mm256_unpackhi_epi8(zero, y), next));
      return _mm256_max_epi8(levels, _mm256_set1_epi8(-127));
    }
  };
};

}  // namespace
}  // namespace pcdvq
