// Decodes codec `trellis` for AVX-512 (VBMI and VBMI2), 16 rows and four columns at a time: two
// windows of a row in a dword, whose products' bytes average to its four levels. Included once.
#pragma once

#include "block_codes.h"
#include "block_sums.h"
#include "chain_tiles.h"

namespace pcdvq {
namespace {

template <int BITS, int ROWS>
struct ChainBlocks {
  using Places = ChainPlaces<BITS, ROWS>;
  using Store = pcdvq::Store;
  static constexpr int kBits = BITS, kRows = ROWS;
  static constexpr bool kSingles = BITS >= kSinglesFrom;
  static constexpr int kTogether = ROWS == 16 ? 2 : 1;  // quads of a chain
  static constexpr int kStride = kTogether * kTileGroups * Places::kGroupBytes;

  // A group's bytes, and those before it in the chain, may be too far apart for one register.
  static constexpr bool far_apart(int v) {
    return ROWS == 64 && kTileGroups * Places::kGroupBytes > 64 && v == 0;
  }

  // Of the registers that a group is decoded from, which bytes its windows are in: of lane r, the row
  // of the group, the bits of two rows of each pair are in a qword, the first pair's in the lower half.
  struct Tables {
    alignas(64) uint8_t byte[kTogether][kTileGroups][64];
    alignas(64) uint8_t bit[64];                   // of a qword, of each byte of the last windows
  };

  static constexpr Tables make_tables() {
    Tables t = {};
    for (int i = 0; i < 64; ++i) {
      const int lane = i / 8 * 2, p = i / 4 % 2;
      const int low = (kBlockRows - 2 - lane) * BITS;  // bit of the later row's code
      for (int quad = 0; quad < kTogether; ++quad) {
        for (int v = 0; v < kTileGroups; ++v) {
          const int at = low / 8 + i % 4;
          const bool own = at < Places::kPairBytes;
          const int place =
              own ? Places::pair(quad, v, p) + at : Places::before(quad, v, p) + at - Places::kPairBytes;
          // The two bytes before a group's are read, no others.
          const bool used = at < Places::kPairBytes + 2;
          int from = place - Places::first_byte(0, v);
          if (far_apart(v)) from = own ? place - Places::group(0, v) : 64 + from;
          t.byte[quad][v][i] = uint8_t(used ? from : 0);
        }
      }
      // A window of the lane's own row, then one of the row after it; of each two bytes.
      const int later = i % 8 / 4, of_pair = i % 4 / 2;
      t.bit[i] = uint8_t(32 * of_pair + low % 8 + (later ? 0 : BITS) + 8 * (i % 2));
    }
    return t;
  }

  // Bytes u and v of 32 windows.
  static PCDVQ_INLINE Wide means(Wide windows) {
    const Wide factor = _mm512_set1_epi16(int16_t(kTrellisFactor));
    const Wide low = _mm512_mullo_epi16(windows, factor);
    const Wide high = _mm512_add_epi16(_mm512_mulhi_epu16(windows, factor), low);
    return _mm512_avg_epu8(low, high);
  }

  static PCDVQ_INLINE Wide load(const uint8_t* block, int at) {
    if (at + 64 <= Places::kBlockBytes) return load_wide(block + at);
    return _mm512_maskz_loadu_epi8(~uint64_t(0) >> (at + 64 - Places::kBlockBytes), block + at);
  }

  // Group `v` of a block. FAR: far_apart(v).
  template <bool FAR, class Sink>
  static PCDVQ_INLINE void decode_group(const uint8_t* block, int v, Sink&& sink) {
    static constexpr Tables kTables = make_tables();
    const Wide last = load_wide(kTables.bit);
    const Wide first = _mm512_add_epi8(last, _mm512_set1_epi8(BITS / 2));
    Wide bytes[kTogether];
    for (int i = 0; i < kTogether; ++i) bytes[i] = load_wide(kTables.byte[i][v]);
    const int at = Places::first_byte(0, v), own = Places::group(0, v);
#pragma GCC unroll 16
    for (int quad = 0; quad < kQuads; ++quad) {
      const int base = quad / kTogether * kStride;
      const bool whole = base + kStride + 64 <= Places::kBlockBytes;
      const Wide early = whole ? load_wide(block + base + at) : load(block, base + at);
      const Wide& from = bytes[quad % kTogether];
      const Wide rows = FAR ? _mm512_permutex2var_epi8(load(block, base + own), from, early)
                            : _mm512_permutexvar_epi8(from, early);
      Wide levels = means(_mm512_multishift_epi64_epi8(last, rows));
      if (kSingles) {
        const Wide before = means(_mm512_multishift_epi64_epi8(first, rows));
        // (u, v) of both windows: the lower bytes average to the first one's level.
        const Wide u_v = _mm512_mask_blend_epi8(0xAAAAAAAAAAAAAAAA, before, levels);
        const Wide v_u = _mm512_shldi_epi16(levels, before, 8);
        levels = _mm512_avg_epu8(u_v, v_u);
      }
      sink(quad, quad % 2, levels);
    }
  }

  template <class Sink>
  static PCDVQ_INLINE void decode(const uint8_t* block, int v, Sink&& sink) {
    if constexpr (far_apart(0)) {
      if (v == 0) return decode_group<true>(block, v, sink);
    }
    decode_group<false>(block, v, sink);
  }

  // acc [X_ROWS, kTileRows] += x times group `v` of block `b`.
  template <int X_ROWS>
  static PCDVQ_INLINE void dot(const uint8_t* block, int v, const BlockRows& x, int64_t b,
                               float* acc) {
    // Or gcc would keep the sums in `acc` a second time, on the stack.
    __asm__ volatile("" : : : "memory");
    BlockSums<X_ROWS> sums(x, b);
    decode(block, v, sums);
    sums.add_to(acc, kTileRows);
  }
};

}  // namespace
}  // namespace pcdvq
