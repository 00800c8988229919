// Decodes signed codes whose levels are few. Included once, by block_products.h.
#pragma once

#include "block_planes.h"

namespace pcdvq {
namespace {

// Signed codes of 8 signs with parity, a 7-bit pattern and a 1-bit magnitude, in the planes of
// PlaneBlocks. Where a level of the first magnitude tells that of the second, and they are 16 pairs at
// most, two coordinates of a pattern are two nibbles: half as many permutations of half the tables.
struct NibbleBlocks {
  using Planes = PlaneBlocks<8, 0>;
  static constexpr int kBlockBytes = Planes::kBlockBytes;
  using Tables = const int8_t*;
  static constexpr int kReadBytes = Planes::kReadBytes;
  static constexpr int kCodewordBytes = Planes::kCodewordBytes;
  static constexpr auto pack = Planes::pack;

  static constexpr int kEntries = 256;  // 7 bits of pattern, then parity
  static constexpr int kPairs = 4;
  static constexpr int kMostLevels = 16;

  struct Table {
    int8_t planes[Planes::kCodewordBytes];
    uint8_t nibbles[kPairs][kEntries];  // of coordinates 2 p and 2 p + 1
    uint8_t levels[64];                 // [any bit][magnitude][nibble], plus 128
    bool few;
  };
  static_assert(sizeof(Table) <= kTableBytes, "the table of a thread");

  static void expand(const int8_t* codewords, int8_t* memory) {
    Table& table = *reinterpret_cast<Table*>(memory);
    Planes::expand(codewords, table.planes);
    int count = 0;
    int8_t first[kMostLevels], second[kMostLevels];
    const auto nibble = [&](const int8_t* level) {
      const int8_t large = level[Planes::kCodewordBytes / 2];  // of the second magnitude
      int i = 0;
      while (i < count && first[i] != *level) ++i;
      if (i == count && count < kMostLevels) first[count] = *level, second[count++] = large;
      table.few &= i < kMostLevels && second[i] == large;
      return uint8_t(i & 15);
    };
    table.few = true;
    for (int entry = 0; entry < kEntries && table.few; ++entry) {
      const int8_t* levels = codewords + 8 * ((entry & 127) << 1 | entry >> 7);
      for (int p = 0; p < kPairs; ++p) {
        const uint8_t low = nibble(levels + 2 * p);
        table.nibbles[p][entry] = uint8_t(low | nibble(levels + 2 * p + 1) << 4);
      }
    }
    for (int i = 0; i < 64; ++i) {
      const int8_t* of_magnitude = i & 16 ? second : first;
      table.levels[i] = uint8_t((i & 15) < count ? of_magnitude[i & 15] + 128 : 0);
    }
  }

  // 64 codes.
  struct Vector {
    Wide rest, signs, magnitude;  // its bit 4
    __mmask64 even, odd;          // parity

    PCDVQ_INLINE void load(Wide rest_bytes, Wide sign_bytes) {
      rest = rest_bytes;
      signs = sign_bytes;
      magnitude = Planes::move<-3>(rest_bytes, 16);
      odd = _mm512_test_epi8_mask(_mm512_popcnt_epi8(sign_bytes), Planes::set(1));
      even = ~odd;
    }

    PCDVQ_INLINE Wide look_up(const Wide (&table)[4]) const {
      const Wide v = _mm512_mask2_permutex2var_epi8(table[0], rest, even, table[1]);
      return _mm512_mask2_permutex2var_epi8(table[2], v, odd, table[3]);
    }

    // Levels of coordinate j, whose nibble is the low one.
    PCDVQ_INLINE Wide levels(Wide nibbles, Wide table, int j) const {
      constexpr int kAndOr = 0xEA;  // nibbles & 15 | magnitude
      const Wide index =
          _mm512_ternarylogic_epi32(nibbles, Planes::set(15), magnitude, kAndOr);
      const __mmask64 negative = _mm512_test_epi8_mask(signs, Planes::set(1 << j));
      return negate_levels(_mm512_permutexvar_epi8(index, table), negative);
    }
  };

  template <class Sink>
  static PCDVQ_INLINE void decode(const int8_t* memory, const uint8_t* codes, int64_t stride,
                                  Sink&& sink) {
    const Table& table = *reinterpret_cast<const Table*>(memory);
    if (!table.few) return Planes::decode(table.planes, codes, stride, sink);
    const Wide levels = load_wide(table.levels);
    Vector vectors[2];
    for (int i = 0; i < 2; ++i) {
      vectors[i].load(load_wide(codes + 64 * i), load_wide(codes + 128 + 64 * i));
    }
#pragma GCC unroll 4
    for (int p = 0; p < kPairs; ++p) {
      Wide nibbles[4];
      for (int i = 0; i < 4; ++i) {
        nibbles[i] = load_wide(table.nibbles[p] + 64 * i);
        __asm__("" : "+v"(nibbles[i]));  // or each use would load it again
      }
      for (int i = 0; i < 2; ++i) {
        const Wide both = vectors[i].look_up(nibbles);
        sink(8 * i + 2 * p, 0, vectors[i].levels(both, levels, 2 * p));
        const Wide upper = _mm512_srli_epi16(both, 4);
        sink(8 * i + 2 * p + 1, 1, vectors[i].levels(upper, levels, 2 * p + 1));
      }
    }
  }
};

}  // namespace
}  // namespace pcdvq
