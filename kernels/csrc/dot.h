// Products of few rows of activations with weight rows, which are decoded in registers.
// Included once per instruction set, after lookup.h.
#pragma once

#include "lookup.h"

namespace pcdvq {
namespace {

// Units [0, units) of ROWS weight rows of a segment, the first of which is `row`. sums: a
// vector of lanes each.
//
// A lane adds 4 products of each of 4 vectors, at most 16 * 127 * 127 < 2^18 in magnitude, before
// it becomes a float: whatever K is, nothing overflows. Nor does a pair of products in the 16 bits
// of maddubs: 2 * 127 * 127 < 2^15. (The int8 activations of a row that has a NaN or an infinity
// may be -128. Pairs then still fit, and their scale makes the sum NaN or infinite.)
template <class L, int ROWS>
PCDVQ_INLINE void dot_units(const int8_t* table, const uint8_t* codes, int64_t row_bytes,
                            int64_t row, const ByteRow& x, int64_t units, __m256 (&sums)[ROWS]) {
  alignas(32) typename L::Offset offsets[ROWS][L::kCodes];
  const Bytes ones = _mm256_set1_epi16(1);
  const int8_t* levels_x = x.levels;
  for (int64_t u = 0; u < units; ++u, codes += L::kUnitBytes) {
    Bytes total[ROWS];
#pragma GCC unroll 2
    for (int piece = 0; piece < L::kPieces; ++piece) {
      Bytes bytes[ROWS], states = _mm256_setzero_si256();
      if (row % kSegmentRows) {
        states = L::states(L::codes(L::load_piece(codes - row_bytes, piece), piece));
      }
      for (int r = 0; r < ROWS; ++r) {
        if (piece == 0) __builtin_prefetch(codes + (r + ROWS) * row_bytes);
        bytes[r] = L::load_piece(codes + r * row_bytes, piece);
        const Bytes c = L::codes(bytes[r], piece);
        const Bytes at = _mm256_or_si256(L::offsets(c), states);
        _mm256_store_si256(reinterpret_cast<Bytes*>(offsets[r]), at);
        states = L::states(c);
      }
#pragma GCC unroll 4
      for (int v = 0; v < L::kVectors; ++v, levels_x += 64) {
        const Bytes positive = load_bytes(levels_x), negated = load_bytes(levels_x + 32);
        for (int r = 0; r < ROWS; ++r) {
          const int vector = piece * L::kVectors + v;
          const Bytes a = _mm256_blendv_epi8(positive, negated, L::negative(bytes[r], vector));
          const Bytes pairs = _mm256_maddubs_epi16(L::levels(table, offsets[r], v), a);
          const Bytes products = _mm256_madd_epi16(pairs, ones);
          total[r] = vector ? _mm256_add_epi32(total[r], products) : products;
        }
      }
    }
    const __m256 scale = _mm256_loadu_ps(x.scales + 8 * u);
    for (int r = 0; r < ROWS; ++r) {
      sums[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total[r]), scale, sums[r]);
    }
  }
}

template <class L, int ROWS>
void dot_rows(const Weights& w, int64_t row, const ByteRow& x, float* out) {
  const uint8_t* codes = w.qweight + row * w.row_bytes;
  const int64_t whole = w.row_bytes / L::kUnitBytes;
  __m256 sums[ROWS];
  for (int r = 0; r < ROWS; ++r) sums[r] = _mm256_setzero_ps();
  dot_units<L, ROWS>(w.table, codes, w.row_bytes, row, x, whole, sums);
  if (whole * L::kUnitBytes < w.row_bytes) {
    const CutUnit<L, ROWS> cut(codes, w.row_bytes, whole * L::kUnitBytes, ROWS,
                               row % kSegmentRows);
    const ByteRow rest = {x.levels + 2 * kUnitColumns * whole, x.scales + 8 * whole};
    dot_units<L, ROWS>(w.table, cut.bytes[1], sizeof(cut.bytes[0]), row, rest, 1, sums);
  }
  for (int r = 0; r < ROWS; ++r) out[r] = Vec8{sums[r]}.sum();
}

template <class L>
void dot(const Weights& w, int64_t row, int64_t rows, const ByteRow& x, float* out) {
  static_assert(kSegmentRows % 4 == 0 && kPanelRows % 4 == 0, "four rows share a segment");
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) dot_rows<L, 4>(w, row + r, x, out + r);
  for (; r < rows; ++r) dot_rows<L, 1>(w, row + r, x, out + r);
}

// Units [0, units) of weight rows of a segment, at most four, with X_ROWS rows of int16 activations.
// sums: [4, X_ROWS], a vector of lanes each. As for dot_units, nothing overflows: a lane adds 16
// products, at most 16 * 127 * 32767 < 2^27 in magnitude.
template <class L, int X_ROWS>
PCDVQ_INLINE void dots_units(const int8_t* table, const uint8_t* codes, int64_t row_bytes,
                             int64_t row, int64_t rows, const WordRows& x, int64_t units,
                             __m256 (&sums)[4][X_ROWS]) {
  alignas(32) typename L::Offset offsets[L::kPieces][L::kCodes];
  const int16_t* levels_x = x.levels;
  for (int64_t u = 0; u < units; ++u, codes += L::kUnitBytes, levels_x += 128 * X_ROWS) {
    Bytes states[L::kPieces];
    for (int piece = 0; piece < L::kPieces; ++piece) {
      states[piece] = _mm256_setzero_si256();
      if (row % kSegmentRows) {
        states[piece] = L::states(L::codes(L::load_piece(codes - row_bytes, piece), piece));
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      Words total[X_ROWS] = {};
      __builtin_prefetch(codes + (r + 4) * row_bytes);
#pragma GCC unroll 2
      for (int piece = 0; piece < L::kPieces; ++piece) {
        const Bytes bytes = L::load_piece(codes + r * row_bytes, piece);
        const Bytes c = L::codes(bytes, piece);
        const Bytes at = _mm256_or_si256(L::offsets(c), states[piece]);
        _mm256_store_si256(reinterpret_cast<Bytes*>(offsets[piece]), at);
        states[piece] = L::states(c);
#pragma GCC unroll 4
        for (int v = 0; v < L::kVectors; ++v) {
          const int vector = piece * L::kVectors + v;
          const Bytes sign = _mm256_or_si256(L::negative(bytes, vector), _mm256_set1_epi8(1));
          const Bytes levels = _mm256_sign_epi8(L::levels(table, offsets[piece], v), sign);
          const Words even = {_mm256_srai_epi16(_mm256_slli_epi16(levels, 8), 8)};
          const Words odd = {_mm256_srai_epi16(levels, 8)};
#pragma GCC unroll 8
          for (int m = 0; m < X_ROWS; ++m) {
            const int16_t* a = levels_x + 32 * (X_ROWS * vector + m);
            total[m] = add_products(Words::load(a), even, total[m]);
            total[m] = add_products(Words::load(a + 16), odd, total[m]);
          }
        }
      }
      for (int m = 0; m < X_ROWS; ++m) {
        const __m256 scale = _mm256_loadu_ps(x.scales + 8 * (X_ROWS * u + m));
        sums[r][m] = _mm256_fmadd_ps(total[m].to_floats().v, scale, sums[r][m]);
      }
    }
  }
}

template <class L, int X_ROWS>
void dots_rows(const Weights& w, int64_t row, int64_t rows, const WordRows& x, float* out) {
  const uint8_t* codes = w.qweight + row * w.row_bytes;
  const int64_t whole = w.row_bytes / L::kUnitBytes;
  __m256 sums[4][X_ROWS] = {};
  dots_units<L, X_ROWS>(w.table, codes, w.row_bytes, row, rows, x, whole, sums);
  if (whole * L::kUnitBytes < w.row_bytes) {
    const CutUnit<L, 4> cut(codes, w.row_bytes, whole * L::kUnitBytes, rows, row % kSegmentRows);
    const WordRows rest = {x.levels + whole * kUnitColumns * X_ROWS,
                           x.scales + whole * 8 * X_ROWS, x.vector_stride, x.scale_stride};
    dots_units<L, X_ROWS>(w.table, cut.bytes[1], sizeof(cut.bytes[0]), row, rows, rest, 1, sums);
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int m = 0; m < X_ROWS; ++m) out[m * kPanelRows + r] = Vec8{sums[r][m]}.sum();
  }
}

template <class L>
void dots(const Weights& w, int64_t row, int64_t rows, const WordRows& x, int64_t x_rows,
          float* out) {
  const auto run = x_rows == 1   ? dots_rows<L, 1>
                   : x_rows == 2 ? dots_rows<L, 2>
                   : x_rows == 4 ? dots_rows<L, 4>
                                 : dots_rows<L, 8>;
  for (int64_t r = 0; r < rows; r += 4) run(w, row + r, smaller(4, rows - r), x, out + r);
}

template <int DIM, int CODE_BITS, bool PARITY, int STATES = 0>
bool match_lookup(const PcdvqLayout& layout, Decoder* decoder) {
  using L = Lookup<DIM, CODE_BITS, PARITY, STATES>;
  const bool same =
      layout.vector_dim == DIM && layout.sign_bits == DIM && layout.state_bits == STATES &&
      layout.rotation_bits == L::kRotationBits && (layout.parity > 0) == PARITY &&
      layout.sign_bits + layout.pattern_bits + layout.magnitude_bits == CODE_BITS;
  if (same) *decoder = {decode_lookup<L>, dot<L>, dots<L>, STATES ? L::expand : nullptr};
  return same;
}

// The offered signed and trellis codecs, at 2, 2.25, 3 and 4 bits.
bool find_lookup(const PcdvqLayout& layout, Decoder* decoder) {
  return match_lookup<8, 16, true>(layout, decoder) || match_lookup<8, 18, true>(layout, decoder) ||
         match_lookup<4, 12, true>(layout, decoder) ||
         match_lookup<4, 16, false>(layout, decoder) ||
         match_lookup<8, 16, true, 3>(layout, decoder) ||
         match_lookup<8, 18, true, 3>(layout, decoder) ||
         match_lookup<4, 12, true, 3>(layout, decoder) ||
         match_lookup<4, 16, false, 2>(layout, decoder);
}

}  // namespace
}  // namespace pcdvq
