// Decodes codec `compact`: of 64 codes one coordinate at a time, by a permutation of a table of two
// registers. Included once, by block_products.h.
//
// Vector v of a block is [16 rows][4 codes], a byte each: the 8 bits of the stream, the last one the
// highest. Step 4 v + j is coordinate j of its codes. A byte of a code's extra bits has them at places
// where windows leave room. Packed, the vectors of streams come first, then those of extra bits; with
// one bit two vectors share the last ones, the second a place above the first.
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

template <int EXTRA, bool PACKED>
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

  struct Vector {
    Wide stream, extra;
  };

  // Indices of coordinate `j`; `moved` is the stream by a place, `above` that of the rows above.
  static PCDVQ_INLINE Wide index(int j, const Vector& x, Wide moved, Wide above) {
    Wide windows = shifted(j) ? moved : x.stream;
    if (2 * j < kOlder) windows = choose((4 << 2 * j) - 1, x.stream, above);
    if (!EXTRA) return windows;
    const Wide extra = shifted(j) && j < 3 ? _mm512_srli_epi16(x.extra, 1) : x.extra;
    return choose(((1 << EXTRA) - 1) << extra_place(j), extra, windows);
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
  static PCDVQ_INLINE void decode(const Tables& tables, const uint8_t* codes, int64_t stride,
                                  Sink&& sink) {
    Vector vectors[kVectors];
    if (!PACKED) unpacked_vectors(codes, stride, vectors);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const Vector x = PACKED ? packed_vector(codes, v) : vectors[v];
      const Wide above = rows_above(x.stream), moved = _mm512_srli_epi16(x.stream, 1);
#pragma GCC unroll 4
      for (int j = 0; j < kWindowDim; ++j) {
        const Wide at = index(j, x, moved, above);
        const Wide levels = _mm512_permutex2var_epi8(tables.of[j][0], at, tables.of[j][1]);
        sink(kWindowDim * v + j, j % 2, levels);
      }
    }
  }

  static PCDVQ_INLINE Vector packed_vector(const uint8_t* codes, int v) {
    const Wide stream = load_wide(codes + 64 * v);
    if (!EXTRA) return {stream, stream};
    const Wide extra = load_wide(codes + 64 * (kVectors + v * EXTRA / 2));
    return {stream, EXTRA == 1 && v % 2 ? _mm512_srli_epi16(extra, 1) : extra};
  }

  // The same from rows of codes.
  static PCDVQ_INLINE void unpacked_vectors(const uint8_t* rows, int64_t stride,
                                            Vector (&out)[kVectors]) {
    Wide dwords[2 * kVectors];  // of each row, up to eight
    dwords_of_rows(rows, stride, reinterpret_cast<Wide(&)[4]>(dwords));
    if (EXTRA) {
      dwords_of_rows(rows + kBlockBytes - 16, stride, reinterpret_cast<Wide(&)[4]>(dwords[4]));
    }
    for (int v = 0; v < kVectors; ++v) {
      const auto bytes = [&](int first) __attribute__((always_inline)) {
        return bytes_of_codes(dwords, v, first);
      };
      Wide fresh = dwords[v], extra = fresh;
      if (EXTRA == 1) {  // every other code starts in the middle of a byte
        const Wide low = bytes(0), high = bytes(1);
        const Wide odd = _mm512_set1_epi16(int16_t(0xFF00));
        const Wide even = choose(15, _mm512_srli_epi16(low, 4), _mm512_slli_epi16(high, 4));
        fresh = _mm512_ternarylogic_epi32(odd, high, even, 0xCA);
        extra = _mm512_ternarylogic_epi32(odd, _mm512_srli_epi16(low, 4), low, 0xCA);
        // Bits 0 to 3 at places 2, 4, 6 and 0.
        alignas(16) static constexpr uint8_t kPlaces[16] = {0,  4,  16, 20, 64, 68, 80, 84,
                                                            1,  5,  17, 21, 65, 69, 81, 85};
        const Wide nibbles = _mm512_and_si512(extra, _mm512_set1_epi8(15));
        extra = _mm512_shuffle_epi8(in_every_lane(kPlaces), nibbles);
      }
      if (EXTRA == 2) {
        fresh = bytes(1);
        extra = bytes(0);
        extra = choose(3, _mm512_srli_epi16(extra, 6), _mm512_slli_epi16(extra, 2));
      }
      out[v] = {choose(127, _mm512_srli_epi16(fresh, 1), _mm512_slli_epi16(fresh, 7)), extra};
    }
  }

  // Byte `first` of each code of vector v, or of 12 bits the one that has its first bit and the next.
  static PCDVQ_INLINE Wide bytes_of_codes(const Wide (&dwords)[2 * kVectors], int v, int first) {
    constexpr int kGap = EXTRA == 1 ? 2 : 0;  // dwords that were loaded twice
    const int byte = v * kBlockBytes / kVectors, dword = byte / 4;
    const auto of = [](int d) { return d < 4 ? d : d + kGap; };
    alignas(64) uint8_t from[64];
    for (int i = 0; i < 64; ++i) {
      const int at = byte % 4 + i % 4 * (8 + 4 * EXTRA) / 8 + first;
      from[i] = uint8_t(64 * (at / 4) + i / 4 * 4 + at % 4);
    }
    return _mm512_permutex2var_epi8(dwords[of(dword)], load_wide(from), dwords[of(dword + 1)]);
  }

  static void pack(const uint8_t* codes, int64_t stride, uint8_t* out) {
    std::memset(out, 0, kBlockRows * kBlockBytes);
    for (int r = 0; r < kBlockRows; ++r, codes += stride) {
      for (int v = 0; v < kVectors; ++v) {
        const uint64_t four = load_as<uint64_t>(codes + v * kBlockBytes / kVectors);
        const uint32_t fresh = uint32_t(_pext_u64(four, kFreshBits));
        const uint32_t stream = (fresh >> 1 & 0x7F7F7F7F) | (fresh << 7 & 0x80808080);
        std::memcpy(out + 64 * v + 4 * r, &stream, 4);
        if (EXTRA == 0) continue;
        uint8_t* place = out + 64 * (kVectors + v * EXTRA / 2) + 4 * r;
        const uint32_t extra = place_extra(uint32_t(_pext_u64(four, ~kFreshBits)), v);
        const uint32_t both = load_as<uint32_t>(place) | extra;
        std::memcpy(place, &both, 4);
      }
    }
  }

 private:
  // Of four codes the bits of the stream.
  static constexpr uint64_t kFreshBits =
      EXTRA == 0 ? 0xFFFFFFFF : EXTRA == 1 ? 0xFF0FF0FF0FF0 : 0xFF00FF00FF00FF00;

  // Extra bits of four codes at their places in the bytes of vector v: what belongs to the last
  // coordinate comes lowest.
  static PCDVQ_INLINE uint32_t place_extra(uint32_t bits, int v) {
    if (EXTRA == 2) return (bits << 2 & 0xFCFCFCFC) | (bits >> 6 & 0x03030303);
    const uint32_t turned = (bits << 1 & 0xEEEE) | (bits >> 3 & 0x1111);
    return _pdep_u32(turned, 0x55555555) << v % 2;
  }
};

}  // namespace
}  // namespace pcdvq
