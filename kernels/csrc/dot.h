// Decodes weight rows: to panels, and in registers for products with few rows of activations.
// Included once per instruction set, after its `Words`.
#pragma once

#include "direct.h"
#include "pyramid_avx2.h"
#include "windows_avx2.h"

namespace pcdvq {
namespace {

// The last unit of a weight row may be cut short: of such units, and of the row above, copies are
// read that are padded to whole units.
template <class L, int ROWS>
struct CutUnit {
  uint8_t bytes[ROWS + 1][L::kUnitBytes];

  // `row` has a row above it where `above`; `first` is the first byte of the unit.
  CutUnit(const uint8_t* row, int64_t row_bytes, int64_t first, int64_t rows, bool above) {
    std::memset(bytes, 0, sizeof(bytes));
    for (int64_t r = above ? -1 : 0; r < rows; ++r) {
      std::memcpy(bytes[r + 1], row + r * row_bytes + first, size_t(row_bytes - first));
    }
  }
};

template <class L>
PCDVQ_INLINE typename L::States states_above(const uint8_t* unit, int64_t row_bytes, int64_t row) {
  return row % kSegmentRows ? L::states_of(unit - row_bytes) : L::no_states();
}

// Levels of one unit of weight rows. levels: [rows, kPanelColumns].
template <class L>
PCDVQ_INLINE void decode_unit(const int8_t* table, const uint8_t* codes, int64_t row_bytes,
                              int64_t row, int64_t rows, int8_t* levels) {
  typename L::States states = states_above<L>(codes, row_bytes, row);
  for (int64_t r = 0; r < rows; ++r, codes += row_bytes, levels += kPanelColumns) {
    if ((row + r) % kSegmentRows == 0) states = L::no_states();
    typename L::Unit unit;
    for (int i = 0; i < L::kPieces; ++i) unit.load(table, codes, i, states);
    for (int v = 0; v < kUnitVectors; ++v) {
      const Bytes vector = unit.signed_levels(table, v);
      _mm256_storeu_si256(reinterpret_cast<Bytes*>(levels + 32 * v), vector);
    }
  }
}

template <class L>
void decode_units(const Weights& w, int64_t row, int64_t rows, int64_t first, int64_t units,
                  int8_t* levels) {
  const uint8_t* codes = w.qweight + row * w.row_bytes;
  for (int64_t u = 0; u < units; ++u, levels += kUnitColumns) {
    const int64_t byte = (first + u) * L::kUnitBytes;
    if (byte + L::kUnitBytes <= w.row_bytes) {
      decode_unit<L>(w.table, codes + byte, w.row_bytes, row, rows, levels);
    } else {
      const CutUnit<L, kPanelRows> cut(codes, w.row_bytes, byte, rows, row % kSegmentRows);
      decode_unit<L>(w.table, cut.bytes[1], L::kUnitBytes, row, rows, levels);
    }
  }
}

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
  typename L::Unit unit[ROWS];
  const Bytes ones = _mm256_set1_epi16(1);
  const int8_t* levels_x = x.levels;
  for (int64_t u = 0; u < units; ++u, codes += L::kUnitBytes) {
    typename L::States states = states_above<L>(codes, row_bytes, row);
    Bytes total[ROWS];
#pragma GCC unroll 2
    for (int piece = 0; piece < L::kPieces; ++piece) {
      for (int r = 0; r < ROWS; ++r) {
        if (piece == 0) __builtin_prefetch(codes + (r + ROWS) * row_bytes);
        unit[r].load(table, codes + r * row_bytes, piece, states);
      }
#pragma GCC unroll 4
      for (int v = piece * L::kVectors; v < (piece + 1) * L::kVectors; ++v, levels_x += 64) {
        const Bytes positive = load_bytes(levels_x), negated = load_bytes(levels_x + 32);
        for (int r = 0; r < ROWS; ++r) {
          Bytes pairs;
          if constexpr (L::kSignedLevels) {
            const Bytes levels = _mm256_sign_epi8(unit[r].signed_levels(table, v), positive);
            pairs = _mm256_maddubs_epi16(_mm256_max_epi8(positive, negated), levels);
          } else {
            const Bytes negative = L::negative(unit[r].bytes[piece], v);
            const Bytes a = _mm256_blendv_epi8(positive, negated, negative);
            pairs = _mm256_maddubs_epi16(unit[r].unsigned_levels(table, v), a);
          }
          const Bytes products = _mm256_madd_epi16(pairs, ones);
          total[r] = v ? _mm256_add_epi32(total[r], products) : products;
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
    dot_units<L, ROWS>(w.table, cut.bytes[1], L::kUnitBytes, row, rest, 1, sums);
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

// Units [0, units) of weight rows of a segment, at most four, with X_ROWS rows of int16
// activations. sums: [4, X_ROWS], a vector of lanes each. As for dot_units, nothing overflows: a
// lane adds 16 products, at most 16 * 127 * 32767 < 2^27 in magnitude.
template <class L, int X_ROWS>
PCDVQ_INLINE void dots_units(const int8_t* table, const uint8_t* codes, int64_t row_bytes,
                             int64_t row, int64_t rows, const WordRows& x, int64_t units,
                             __m256 (&sums)[4][X_ROWS]) {
  const int16_t* levels_x = x.levels;
  for (int64_t u = 0; u < units; ++u, codes += L::kUnitBytes, levels_x += 128 * X_ROWS) {
    typename L::States states = states_above<L>(codes, row_bytes, row);
    typename L::Unit loaded[L::kRowsFirst ? 4 : 1];
    for (int64_t r = 0; L::kRowsFirst && r < rows; ++r) {
      loaded[r].load(table, codes + r * row_bytes, 0, states);
    }
    for (int64_t r = 0; r < rows; ++r) {
      typename L::Unit& unit = loaded[L::kRowsFirst ? r : 0];
      Words total[X_ROWS] = {};
      for (int byte = 0; byte < L::kUnitBytes; byte += 64) {
        __builtin_prefetch(codes + (r + 4) * row_bytes + byte);
      }
#pragma GCC unroll 2
      for (int i = 0; i < L::kPieces && !L::kRowsFirst; ++i) {
        unit.load(table, codes + r * row_bytes, i, states);
      }
#pragma GCC unroll 4
      for (int v = 0; v < kUnitVectors; ++v) {
        const Bytes levels = unit.signed_levels(table, v);
        const Words even = {_mm256_srai_epi16(_mm256_slli_epi16(levels, 8), 8)};
        const Words odd = {_mm256_srai_epi16(levels, 8)};
#pragma GCC unroll 8
        for (int m = 0; m < X_ROWS; ++m) {
          const int16_t* a = levels_x + 32 * (X_ROWS * v + m);
          total[m] = add_products(Words::load(a), even, total[m]);
          total[m] = add_products(Words::load(a + 16), odd, total[m]);
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
    dots_units<L, X_ROWS>(w.table, cut.bytes[1], L::kUnitBytes, row, rows, rest, 1, sums);
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

template <int DIM, int CODE_BITS, bool PARITY, int STATES>
bool is_lookup(const PcdvqLayout& layout) {
  return layout.vector_dim == DIM && layout.sign_bits == DIM && layout.state_bits == STATES &&
         layout.rotation_bits == (STATES ? log2_of(DIM) : 0) && (layout.parity > 0) == PARITY &&
         layout.sign_bits + layout.pattern_bits + layout.magnitude_bits == CODE_BITS;
}

template <int DIM, int CODE_BITS>
bool is_direct(const PcdvqLayout& layout) {
  return layout.vector_dim == DIM && !layout.sign_bits && !layout.state_bits &&
         layout.pattern_bits + layout.magnitude_bits == CODE_BITS;
}

template <int DIM, int CODE_BITS, bool PARITY, int STATES = 0>
bool match_lookup(const PcdvqLayout& layout, Decoder* decoder) {
  using L = Lookup<DIM, CODE_BITS, PARITY, STATES>;
  const bool same = is_lookup<DIM, CODE_BITS, PARITY, STATES>(layout);
  if (same) *decoder = {decode_units<L>, dot<L>, dots<L>, STATES ? L::expand : nullptr};
  return same;
}

template <int CODE_BITS>
bool match_pyramids(const PcdvqLayout& layout, Decoder* decoder) {
  using L = Pyramids<CODE_BITS>;
  const bool same = layout.pyramid_rows && layout.pattern_bits == CODE_BITS;
  if (same) *decoder = {decode_units<L>, nullptr, dots<L>, nullptr};
  return same;
}

template <int DIM, int CODE_BITS, class L>
bool match_direct(const PcdvqLayout& layout, Decoder* decoder) {
  const bool same = is_direct<DIM, CODE_BITS>(layout);
  if (same) *decoder = {decode_units<L>, dot<L>, dots<L>, nullptr};
  return same;
}

template <int EXTRA>
bool match_windows(const PcdvqLayout& layout, Decoder* decoder) {
  using L = Windows<EXTRA>;
  const bool same = is_windows(layout) && extra_bits(layout.pattern_bits) == EXTRA;
  if (same) *decoder = {decode_units<L>, dot<L>, dots<L>, L::expand};
  return same;
}

// The offered layouts.
bool find_offered(const PcdvqLayout& layout, Decoder* decoder) {
  if (layout.pyramid_rows) {
    return match_pyramids<24>(layout, decoder) || match_pyramids<26>(layout, decoder) ||
           match_pyramids<32>(layout, decoder);
  }
  return match_lookup<8, 16, true>(layout, decoder) || match_lookup<8, 18, true>(layout, decoder) ||
         match_lookup<4, 12, true>(layout, decoder) ||
         match_lookup<4, 16, false>(layout, decoder) ||
         match_lookup<8, 16, true, 3>(layout, decoder) ||
         match_lookup<8, 18, true, 3>(layout, decoder) ||
         match_lookup<4, 12, true, 3>(layout, decoder) ||
         match_lookup<4, 16, false, 2>(layout, decoder) ||
         match_windows<0>(layout, decoder) || match_windows<1>(layout, decoder) ||
         match_windows<2>(layout, decoder) ||
         match_direct<8, 16, Rows8<16>>(layout, decoder) ||
         match_direct<8, 18, Rows8<18>>(layout, decoder) ||
         match_direct<1, 8, Int8>(layout, decoder);
}

}  // namespace
}  // namespace pcdvq
