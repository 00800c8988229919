// Decodes codes of 8 bits beside their signs to blocks: of 64 codes one coordinate at a time, by
// permutations of tables that are registers. Included once, by block_products.h.
#pragma once

#include "block_decode.h"

namespace pcdvq {
namespace {

// Signed codecs (STATES 0) and trellis codecs with parity. A packed block has, for each four codes of
// a row, a vector of [16 rows][4 codes]: first all vectors of the codes' upper 8 bits, then those of
// the signs, of codes of four signs two vectors' in one, a nibble each. Step DIM * v + j of the block
// is coordinate j of the codes of vector v.
template <int DIM, int STATES>
struct PlaneBlocks {
  static constexpr int kVectors = 16 / DIM;
  static constexpr int kBlockBytes = (8 + DIM) * 8 / DIM;  // of a row
  using Tables = const int8_t*;
  static constexpr int kReadBytes = kBlockBytes;
  static constexpr int kRotationBits = STATES ? log2_of(DIM) : 0;
  static constexpr int kBaseBits = 8 - kRotationBits;
  // An entry of a coordinate's table has 7 index bits, which a permutation of two registers takes,
  // and above them bits that select the two registers.
  static constexpr int kEntries = 1 << (kBaseBits + 1 + STATES);
  static_assert(kEntries == 512, "of the bits of an entry two select");

  // The row of the codewords of an entry. Its bits, from the lowest: of signed codecs pattern,
  // magnitude, parity; of trellis codecs base, parity, state.
  static constexpr int codeword(int entry) {
    const int base = entry & ((1 << kBaseBits) - 1);
    const int parity = entry >> kBaseBits & 1;
    const int state = entry >> (kBaseBits + 1);
    return (state << kBaseBits | base) << 1 | parity;
  }

  static constexpr int kCodewordBytes = DIM * kEntries;

  // [DIM][kEntries], levels plus 128.
  static void expand(const int8_t* codewords, int8_t* table) {
    using Row = std::conditional_t<DIM == 8, uint64_t, uint32_t>;
    Row rows[kEntries];
    for (int entry = 0; entry < kEntries; ++entry) {
      rows[entry] = load_as<Row>(codewords + codeword(entry) * DIM) ^ Row(0x8080808080808080);
    }
    for (int j = 0; j < DIM; ++j) {
      for (int entry = 0; entry < kEntries; ++entry) {
        table[j * kEntries + entry] = int8_t(rows[entry] >> (8 * j));
      }
    }
  }

  static PCDVQ_INLINE Wide set(int value) { return _mm512_set1_epi8(int8_t(value)); }

  // Bits `mask` of each byte, LEFT places higher; the mask leaves none that came from another byte.
  template <int LEFT>
  static PCDVQ_INLINE Wide move(Wide bytes, int mask) {
    const Wide moved =
        LEFT < 0 ? _mm512_srli_epi16(bytes, -LEFT) : _mm512_slli_epi16(bytes, LEFT);
    return _mm512_and_si512(moved, set(mask));
  }

  // 64 codes: where their levels are.
  struct Vector {
    Wide signs;        // bit sign_bit + j: coordinate j is negative
    Wide index;                // its lowest 7 bits count
    Wide rest;
    __mmask64 low, not_low;  // where the lowest select bit is set, and where not
    __mmask64 high;          // where the other one is set

    PCDVQ_INLINE void load(Wide rest_bytes, Wide sign_bytes, int sign_mask) {
      rest = rest_bytes;
      signs = sign_bytes;
      const Wide ones = _mm512_popcnt_epi8(_mm512_and_si512(sign_bytes, set(sign_mask)));
      if constexpr (STATES == 0) {
        index = rest;
        low = _mm512_movepi8_mask(rest);
        high = where(ones, 0);
      } else {
        // Of the row above; a block is a segment, whose first row has state 0.
        const Wide above = _mm512_alignr_epi32(rest, _mm512_setzero_si512(), 15);
        index = _mm512_and_si512(rest, set((1 << kBaseBits) - 1));
        index = _mm512_or_si512(index, move<kBaseBits>(ones, 1 << kBaseBits));
        constexpr int kIndexStates = 7 - kBaseBits - 1;  // bits of the state in the index
        constexpr int kMask = ((1 << kIndexStates) - 1) << (kBaseBits + 1);
        index = _mm512_or_si512(index, move<kBaseBits + 1 - (8 - STATES)>(above, kMask));
        constexpr int kFirst = 8 - STATES + kIndexStates;
        low = where(above, kFirst);
        high = where(above, kFirst + 1);
      }
      not_low = ~low;
    }

    static PCDVQ_INLINE __mmask64 where(Wide bytes, int bit) {
      return _mm512_test_epi8_mask(bytes, set(1 << bit));
    }

    // Levels of a coordinate, whose table this is.
    PCDVQ_INLINE Wide look_up(const Wide (&table)[8]) const {
      return _mm512_mask_blend_epi8(high, half(table), half(table + 4));
    }

    PCDVQ_INLINE Wide half(const Wide* table) const {
      // Lanes that a permutation leaves alone keep their index for the next one.
      const Wide v = _mm512_mask2_permutex2var_epi8(table[0], index, not_low, table[1]);
      return _mm512_mask2_permutex2var_epi8(table[2], v, low, table[3]);
    }

    // levels[j] = levels[(j + rotation) % DIM].
    PCDVQ_INLINE void rotate(Wide (&levels)[DIM]) const {
      if (!STATES) return;
      for (int i = 0; i < kRotationBits; ++i) {
        const __mmask64 rotated_by = where(rest, kBaseBits + i);
        Wide rotated[DIM];
        for (int j = 0; j < DIM; ++j) {
          const Wide next = levels[(j + (1 << i)) % DIM];
          rotated[j] = _mm512_mask_blend_epi8(rotated_by, levels[j], next);
        }
        for (int j = 0; j < DIM; ++j) levels[j] = rotated[j];
      }
    }
  };

  template <class Sink>
  static PCDVQ_INLINE void decode(const int8_t* table, const uint8_t* codes, int64_t,
                                  Sink&& sink) {
    constexpr bool kNibbles = DIM == 4;
    for (int v = 0; v < kVectors; v += 2) {
      Vector vectors[2];  // two use each load of a table; there are masks for no more
      for (int i = 0; i < 2; ++i) {
        const int at = kVectors + (kNibbles ? v / 2 : v + i);
        vectors[i].load(load_wide(codes + 64 * (v + i)), load_wide(codes + 64 * at),
                        kNibbles ? 15 << 4 * i : 255);
      }
      const auto give = [&](int i, int j, Wide levels) __attribute__((always_inline)) {
        const int bit = j + (kNibbles ? 4 * i : 0);
        const __mmask64 negative = Vector::where(vectors[i].signs, bit);
        sink(DIM * (v + i) + j, j % 2, negate_levels(levels, negative));
      };
      Wide levels[2][DIM];
#pragma GCC unroll 8
      for (int j = 0; j < DIM; ++j) {
        Wide registers[8];
        for (int i = 0; i < 8; ++i) {
          registers[i] = load_wide(table + j * kEntries + 64 * i);
          __asm__("" : "+v"(registers[i]));  // or each use would load it again
        }
        for (int i = 0; i < 2; ++i) {
          levels[i][j] = vectors[i].look_up(registers);
          if (!STATES) give(i, j, levels[i][j]);
        }
      }
      if (!STATES) continue;
      for (int i = 0; i < 2; ++i) {
        vectors[i].rotate(levels[i]);
#pragma GCC unroll 8
        for (int j = 0; j < DIM; ++j) give(i, j, levels[i][j]);
      }
    }
  }

  // A packed block from rows of codes.
  static void pack(const uint8_t* codes, int64_t stride, uint8_t* out) {
    uint8_t* signs = out + 64 * kVectors;
    for (int r = 0; r < kBlockRows; ++r, codes += stride) {
      const auto code = [codes](int c) __attribute__((always_inline)) {
        const int bit = c * (8 + DIM);
        return uint32_t(load_as<uint16_t>(codes + bit / 8) >> (bit % 8));
      };
#pragma GCC unroll 16
      for (int c = 0; c < 4 * kVectors; ++c) {
        const int v = c / 4, place = 4 * r + c % 4;
        out[64 * v + place] = uint8_t(code(c) >> DIM);
        if (DIM == 8) signs[64 * v + place] = uint8_t(code(c));
        if (DIM == 4 && v % 2 == 0) {
          signs[64 * (v / 2) + place] = uint8_t((code(c) & 15) | code(c + 4) << 4);
        }
      }
    }
  }
};

}  // namespace
}  // namespace pcdvq
