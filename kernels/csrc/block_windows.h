// Decodes packed codes of codec `compact`: of 64 codes one coordinate at a time, by a permutation of a
// table of two registers. Included once, by block_products.h.
//
// Vector v of a block is [16 rows][4 codes], a byte each: the 8 bits of the stream, the last one the
// highest. Step 4 v + j is coordinate j of its codes. Bytes of extra bits follow, at places where
// windows leave room.
#pragma once

#include "block_decode.h"
#include "windows.h"

namespace pcdvq {
namespace {

// Bits `mask` of each byte of `a`, the others of `b`.
PCDVQ_INLINE Wide choose(int mask, Wide a, Wide b) {
  return _mm512_ternarylogic_epi32(_mm512_set1_epi8(int8_t(mask)), a, b, 0xCA);
}

// Bytes of the rows above; a block is a segment, whose first row has state 0.
PCDVQ_INLINE Wide rows_above(Wide bytes) {
  return _mm512_alignr_epi32(bytes, _mm512_setzero_si512(), 15);
}

template <int EXTRA>
struct WindowBlocks {
  static constexpr int kVectors = 4;
  static constexpr int kBlockBytes = 16 + 8 * EXTRA, kReadBytes = kBlockBytes;
  static constexpr int kCodewordBytes = kWindowDim * kWindowRows;
  static constexpr int kOlder = older_bits(EXTRA), kWindow = kOlder + 2;

  // Where an index of coordinate j has bit `t` of its window: where the byte of the row above has it
  // that gives the state, or where the row's own has it, moved by a place if `shifted`.
  static constexpr bool shifted(int j) { return j == 3 || (j == 2 && EXTRA == 2); }
  static constexpr int window_place(int j, int t) {
    const int bit = 2 * j + t;  // of the stream from the state on
    return bit < kOlder ? 8 - 1 - kOlder + bit : bit - kOlder - shifted(j);
  }

  // And where its lowest extra bit: where the window leaves room. A permutation ignores bit 7.
  static constexpr int extra_place(int j) { return j == 3 ? 0 : 2 * j + 2 - shifted(j); }

  // [kWindowDim][kWindowRows], levels plus 128.
  static void expand(const int8_t* codewords, int8_t* table) {
    for (int j = 0; j < kWindowDim; ++j) {
      for (int index = 0; index < kWindowRows; ++index) {
        int row = index >> extra_place(j) & ((1 << EXTRA) - 1);
        row <<= kWindow;
        for (int t = 0; t < kWindow; ++t) row |= (index >> window_place(j, t) & 1) << t;
        table[kWindowRows * j + index] = int8_t(codewords[kWindowDim * row + j] ^ 0x80);
      }
    }
  }

  // Indices of coordinate `j`. `extra` has its bits at their place.
  static PCDVQ_INLINE Wide index(int j, Wide stream, Wide moved, Wide above, Wide extra) {
    Wide windows = shifted(j) ? moved : stream;
    if (2 * j < kOlder) windows = choose((4 << 2 * j) - 1, stream, above);
    return EXTRA ? choose(((1 << EXTRA) - 1) << extra_place(j), extra, windows) : windows;
  }

  struct Tables {
    Wide of[kWindowDim][2];

    PCDVQ_INLINE explicit Tables(const int8_t* table) {
      for (int j = 0; j < kWindowDim; ++j) {
        for (int i = 0; i < 2; ++i) {
          of[j][i] = load_wide(table + kWindowRows * j + 64 * i);
          __asm__("" : "+v"(of[j][i]));  // or each use would load it again
        }
      }
    }
  };

  template <class Sink>
  static PCDVQ_INLINE void decode(const Tables& tables, const uint8_t* codes, int64_t,
                                  Sink&& sink) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const Wide stream = load_wide(codes + 64 * v), above = rows_above(stream);
      const Wide moved = _mm512_srli_epi16(stream, 1);
      Wide extra = stream, extra_moved = stream;
      if (EXTRA) {
        extra = load_wide(codes + 64 * (kVectors + v * EXTRA / 2));
        extra_moved = _mm512_srli_epi16(extra, 1);
      }
#pragma GCC unroll 4
      for (int j = 0; j < kWindowDim; ++j) {
        // With one bit, odd vectors have theirs a place above those of even ones.
        const bool use_moved = EXTRA == 1 ? v % 2 : shifted(j) && j < 3;
        const Wide at = index(j, stream, moved, above, use_moved ? extra_moved : extra);
        const Wide levels = _mm512_permutex2var_epi8(tables.of[j][0], at, tables.of[j][1]);
        sink(kWindowDim * v + j, j % 2, levels);
      }
    }
  }

  static void pack(const uint8_t* codes, int64_t stride, uint8_t* out) {
    std::memset(out, 0, kBlockRows * kBlockBytes);
    for (int r = 0; r < kBlockRows; ++r, codes += stride) {
      for (int c = 0; c < 4 * kVectors; ++c) {
        const int bit = c * (8 + 4 * EXTRA), v = c / 4, place = 4 * r + c % 4;
        const uint32_t code = uint32_t(load_as<uint16_t>(codes + bit / 8)) >> bit % 8;
        const uint32_t fresh = code >> 4 * EXTRA & 255;
        out[64 * v + place] = uint8_t(fresh >> 1 | fresh << 7);
        const int extra = 64 * (kVectors + v * EXTRA / 2) + place;
        if (EXTRA == 1) out[extra] |= uint8_t(spread_nibble(code) << v % 2);
        if (EXTRA == 2) out[extra] = uint8_t(code << 2 | (code & 255) >> 6);
      }
    }
  }

 private:
  // Bits 0 to 3 at places 2, 4, 6 and 0.
  static constexpr uint32_t spread_nibble(uint32_t bits) {
    return (bits & 1) << 2 | (bits & 2) << 3 | (bits & 4) << 4 | (bits & 8) >> 3;
  }
};

}  // namespace
}  // namespace pcdvq
