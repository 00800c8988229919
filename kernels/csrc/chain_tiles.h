// Packed weights of codec `trellis`, for AVX2 and AVX-512. Included once per instruction set.
//
// A tile is 64 weight rows, a block 64 columns of it, a quad four columns of a block: two pairs. Of a
// quad 16 rows are a group: for each of its two pairs the bits of the 16 codes, the last row's lowest.
// So a window ends where its code's bits start, and goes on upwards in the group of the rows before.
#pragma once

#include <immintrin.h>

#include "trellis_code.h"

namespace pcdvq {
namespace {

constexpr int64_t kTileRows = kPanelStrips * kBlockRows;
constexpr int kTileGroups = int(kPanelStrips);
constexpr int kQuads = int(kBlockSteps);

// BITS of a code, ROWS of a chain.
template <int BITS, int ROWS>
struct ChainPlaces {
  static constexpr int kPairBytes = 2 * BITS;  // of a group
  static constexpr int kGroupBytes = 2 * kPairBytes;
  static constexpr int kBlockBytes = kQuads * kTileGroups * kGroupBytes;

  // Where group `v` of a quad is in a block. The groups that a chain runs through are neighbours, the
  // earlier one above the later.
  static constexpr int group(int quad, int v) {
    return ROWS == 16 ? (quad / 2 * kTileGroups + v) * 2 * kGroupBytes + quad % 2 * kGroupBytes
                      : (quad * kTileGroups + kTileGroups - 1 - v) * kGroupBytes;
  }

  static constexpr int pair(int quad, int v, int p) { return group(quad, v) + p * kPairBytes; }

  // Where the group is whose codes come before those of pair `p` in the chain.
  static constexpr int before(int quad, int v, int p) {
    if (ROWS == 64) return pair(quad, (v + kTileGroups - 1) % kTileGroups, p);
    if (ROWS == 32) return v % 2 ? pair(quad, v - 1, p) : pair(quad, v + 1, 1 - p);
    const int last = (quad % 2 * 2 + p + 3) % 4;  // of the four pairs of a strip
    return pair(quad / 2 * 2 + last / 2, v, last % 2);
  }

  // The first byte that group `v` of a quad is decoded from.
  static constexpr int first_byte(int quad, int v) {
    int first = group(quad, v);
    for (int p = 0; p < 2; ++p) first = before(quad, v, p) < first ? before(quad, v, p) : first;
    return first;
  }
};

// Codes of 16 rows and a block: [pairs of columns][16 rows], a byte each, the last row first.
struct GroupCodes {
  alignas(32) uint8_t pairs[kScaleColumns / kPairColumns][kBlockRows];
};

template <int BITS>
inline void unpack_row(const uint8_t* row, int64_t bytes, uint8_t* codes) {
  constexpr int kBytes = 4 * BITS;  // of a block
  constexpr uint64_t kCode = ((uint64_t(1) << BITS) - 1) * 0x0101010101010101;
  uint8_t copy[kBytes + 8];
  if (bytes < kBytes + 8) {
    std::memset(copy, 0, sizeof(copy));
    std::memcpy(copy, row, size_t(smaller(bytes, kBytes)));
    row = copy;
  }
  for (int i = 0; i < 4; ++i) {
    const uint64_t eight = _pdep_u64(load_as<uint64_t>(row + i * BITS), kCode);
    std::memcpy(codes + 8 * i, &eight, 8);
  }
}

// Rows [row, row + 16) of block `block`; rows past `rows` have codes 0.
template <int BITS>
void load_group(const Weights& w, int64_t row, int64_t rows, int64_t block, GroupCodes& out) {
  alignas(32) uint8_t codes[kBlockRows][32];
  const int64_t first = block * 4 * BITS, bytes = w.row_bytes - first;
  for (int64_t r = 0; r < kBlockRows; ++r) {
    uint8_t* to = codes[kBlockRows - 1 - r];
    if (row + r < rows) {
      unpack_row<BITS>(w.qweight + (row + r) * w.row_bytes + first, bytes, to);
    } else {
      std::memset(to, 0, 32);
    }
  }
  __m256i v[2][kBlockRows];
  for (int i = 0; i < kBlockRows; ++i) {
    v[0][i] = _mm256_load_si256(reinterpret_cast<const __m256i*>(codes[i]));
  }
  for (int round = 0; round < 4; ++round) {  // each moves the index of a byte round by a bit
    const auto& from = v[round % 2];
    auto& to = v[1 - round % 2];
    for (int i = 0; i < 8; ++i) {
      to[2 * i] = _mm256_unpacklo_epi8(from[i], from[i + 8]);
      to[2 * i + 1] = _mm256_unpackhi_epi8(from[i], from[i + 8]);
    }
  }
  for (int i = 0; i < kBlockRows; ++i) {
    _mm_store_si128(reinterpret_cast<__m128i*>(out.pairs[i]), _mm256_castsi256_si128(v[0][i]));
    _mm_store_si128(reinterpret_cast<__m128i*>(out.pairs[16 + i]),
                    _mm256_extracti128_si256(v[0][i], 1));
  }
}

// A block of the tile whose first row is `row`: kBlockBytes.
template <int BITS, int ROWS>
void pack_block(const Weights& w, int64_t row, int64_t block, uint8_t* out) {
  using Places = ChainPlaces<BITS, ROWS>;
  constexpr uint64_t kCode = ((uint64_t(1) << BITS) - 1) * 0x0101010101010101;
  const int64_t rows = (w.n + ROWS - 1) / ROWS * ROWS;
  for (int v = 0; v < kTileGroups; ++v) {
    GroupCodes group;
    load_group<BITS>(w, row + v * kBlockRows, rows, block, group);
    for (int quad = 0; quad < kQuads; ++quad) {
      for (int p = 0; p < 2; ++p) {
        uint8_t* place = out + Places::pair(quad, v, p);
        const uint8_t* codes = group.pairs[2 * quad + p];
        for (int half = 0; half < 2; ++half) {
          const uint64_t bits = _pext_u64(load_as<uint64_t>(codes + 8 * half), kCode);
          std::memcpy(place + BITS * half, &bits, BITS);
        }
      }
    }
  }
}

template <int BITS, int ROWS>
void pack_tile(const Weights& w, int64_t strip, uint8_t* out) {
  constexpr int kBytes = ChainPlaces<BITS, ROWS>::kBlockBytes;
  for (int64_t b = 0; b * kScaleColumns < w.k; ++b) {
    pack_block<BITS, ROWS>(w, strip * kBlockRows, b, out + b * kBytes);
  }
}

// Where the blocks of a tile are read: packed codes, or rows of codes, which are packed first.
template <int BITS, int ROWS>
class TileCodes {
 public:
  TileCodes(const Weights& w, int64_t row) : w_(w), row_(row) {}

  PCDVQ_INLINE const uint8_t* block(int64_t b) {
    if (w_.packed) {
      const int64_t blocks = (w_.k + kScaleColumns - 1) / kScaleColumns;
      return w_.qweight + (row_ / kTileRows * blocks + b) * kBytes;
    }
    pack_block<BITS, ROWS>(w_, row_, b, copy_);
    return copy_;
  }

 private:
  static constexpr int kBytes = ChainPlaces<BITS, ROWS>::kBlockBytes;
  const Weights& w_;
  const int64_t row_;  // of the tile
  alignas(64) uint8_t copy_[kBytes];
};

// A BlocksFn; D decodes groups (block_trellis.h, block_trellis_avx2.h).
template <class D>
void decode_tiles(const Weights& w, int64_t row, int64_t rows, int64_t first, int64_t blocks,
                  int64_t step, uint8_t* out) {
  const int from = int(row % kTileRows / kBlockRows);
  const int to = from + int((rows + kBlockRows - 1) / kBlockRows);
  TileCodes<D::kBits, D::kRows> tile(w, row / kTileRows * kTileRows);
  for (int64_t b = first; b < first + blocks; ++b, out += kBlockSteps * step) {
    const uint8_t* codes = tile.block(b);
    for (int v = from; v < to; ++v) {
      D::decode(codes, v, typename D::Store{out + (v - from) * kStepBytes, step});
    }
  }
}

// How far ahead packed codes are fetched.
constexpr int64_t kAheadBytes = 2048;

// A BlockDotFn for a tile.
template <class D, int X_ROWS>
void dot_tiles(const Weights& w, int64_t row, int64_t rows, const BlockRows& x, float* acc) {
  TileCodes<D::kBits, D::kRows> tile(w, row);
  const int groups = int((rows + kBlockRows - 1) / kBlockRows);
  for (int64_t b = 0; b * kScaleColumns < w.k; ++b) {
    const uint8_t* codes = tile.block(b);
    // Past the weights that is harmless.
    for (int i = 0; i < ChainPlaces<D::kBits, D::kRows>::kBlockBytes; i += 64) {
      __builtin_prefetch(codes + kAheadBytes + i);
    }
    for (int v = 0; v < groups; ++v) {
      D::template dot<X_ROWS>(codes, v, x, b, acc + v * kBlockRows);
    }
  }
}

template <class D>
BlockDecoder chain_decoder() {
  return {decode_tiles<D>,
          {dot_tiles<D, 1>, dot_tiles<D, 2>, dot_tiles<D, 4>, dot_tiles<D, 6>, dot_tiles<D, 8>},
          kPanelStrips,
          pack_tile<D::kBits, D::kRows>,
          ChainPlaces<D::kBits, D::kRows>::kBlockBytes / kPanelStrips};
}

template <template <int, int> class D, int BITS>
BlockDecoder chain_decoder_of(int64_t chain_rows) {
  if (chain_rows == 64) return chain_decoder<D<BITS, 64>>();
  return chain_rows == 32 ? chain_decoder<D<BITS, 32>>() : chain_decoder<D<BITS, 16>>();
}

template <template <int, int> class D>
BlockDecoder find_chain_decoder(const PcdvqLayout& layout) {
  const int64_t rows = layout.chain_rows;
  switch (layout.pattern_bits) {
    case 3: return chain_decoder_of<D, 3>(rows);
    case 4: return chain_decoder_of<D, 4>(rows);
    case 5: return chain_decoder_of<D, 5>(rows);
    case 6: return chain_decoder_of<D, 6>(rows);
    case 7: return chain_decoder_of<D, 7>(rows);
    default: return chain_decoder_of<D, 8>(rows);
  }
}

}  // namespace
}  // namespace pcdvq
