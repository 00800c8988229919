// Decodes weight rows: to panels, and in registers for products with few rows of activations.
// Included once per instruction set, after its `Words`.
#pragma once

#include "direct.h"
#include "pyramid_avx2.h"

namespace pcdvq {
namespace {

// The last unit of a weight row may be cut short: copies are read that are padded to whole units.
template <class L, int ROWS>
struct CutUnit {
  uint8_t bytes[ROWS][L::kUnitBytes];

  // `first` is the first byte of the unit.
  CutUnit(const uint8_t* row, int64_t row_bytes, int64_t first, int64_t rows) {
    std::memset(bytes, 0, sizeof(bytes));
    for (int64_t r = 0; r < rows; ++r) {
      std::memcpy(bytes[r], row + r * row_bytes + first, size_t(row_bytes - first));
    }
  }
};

// Levels of one unit of weight rows. levels: [rows, kPanelColumns].
template <class L>
PCDVQ_INLINE void decode_unit(const int8_t* table, const uint8_t* codes, int64_t row_bytes,
                              int64_t rows, int8_t* levels) {
  for (int64_t r = 0; r < rows; ++r, codes += row_bytes, levels += kPanelColumns) {
    typename L::Unit unit;
    unit.load(table, codes);
    for (int v = 0; v < kUnitVectors; ++v) {
      const Bytes vector = unit.levels(table, v);
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
      decode_unit<L>(w.table, codes + byte, w.row_bytes, rows, levels);
    } else {
      const CutUnit<L, kPanelRows> cut(codes, w.row_bytes, byte, rows);
      decode_unit<L>(w.table, cut.bytes[0], L::kUnitBytes, rows, levels);
    }
  }
}

// Units [0, units) of ROWS weight rows. sums: a vector of lanes each.
//
// A lane adds 4 products of each of 4 vectors, at most 16 * 127 * 127 < 2^18 in magnitude, before
// it becomes a float: whatever K is, nothing overflows. Nor does a pair of products in the 16 bits
// of maddubs: 2 * 127 * 127 < 2^15. (The int8 activations of a row that has a NaN or an infinity
// may be -128. Pairs then still fit, and their scale makes the sum NaN or infinite.)
template <class L, int ROWS>
PCDVQ_INLINE void dot_units(const int8_t* table, const uint8_t* codes, int64_t row_bytes,
                            const ByteRow& x, int64_t units, __m256 (&sums)[ROWS]) {
  typename L::Unit unit[ROWS];
  const Bytes ones = _mm256_set1_epi16(1);
  const int8_t* levels_x = x.levels;
  for (int64_t u = 0; u < units; ++u, codes += L::kUnitBytes) {
    Bytes total[ROWS];
    for (int r = 0; r < ROWS; ++r) {
      __builtin_prefetch(codes + (r + ROWS) * row_bytes);
      unit[r].load(table, codes + r * row_bytes);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kUnitVectors; ++v, levels_x += 64) {
      const Bytes positive = load_bytes(levels_x), negated = load_bytes(levels_x + 32);
      for (int r = 0; r < ROWS; ++r) {
        const Bytes levels = _mm256_sign_epi8(unit[r].levels(table, v), positive);
        const Bytes pairs = _mm256_maddubs_epi16(_mm256_max_epi8(positive, negated), levels);
        const Bytes products = _mm256_madd_epi16(pairs, ones);
        total[r] = v ? _mm256_add_epi32(total[r], products) : products;
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
  dot_units<L, ROWS>(w.table, codes, w.row_bytes, x, whole, sums);
  if (whole * L::kUnitBytes < w.row_bytes) {
    const CutUnit<L, ROWS> cut(codes, w.row_bytes, whole * L::kUnitBytes, ROWS);
    const ByteRow rest = {x.levels + 2 * kUnitColumns * whole, x.scales + 8 * whole};
    dot_units<L, ROWS>(w.table, cut.bytes[0], L::kUnitBytes, rest, 1, sums);
  }
  for (int r = 0; r < ROWS; ++r) out[r] = Vec8{sums[r]}.sum();
}

template <class L>
void dot(const Weights& w, int64_t row, int64_t rows, const ByteRow& x, float* out) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) dot_rows<L, 4>(w, row + r, x, out + r);
  for (; r < rows; ++r) dot_rows<L, 1>(w, row + r, x, out + r);
}

// Units [0, units) of weight rows, at most four, with X_ROWS rows of int16
// activations. sums: [4, X_ROWS], a vector of lanes each. As for dot_units, nothing overflows: a
// lane adds 16 products, at most 16 * 127 * 32767 < 2^27 in magnitude.
template <class L, int X_ROWS>
PCDVQ_INLINE void dots_units(const int8_t* table, const uint8_t* codes, int64_t row_bytes,
                             int64_t rows, const WordRows& x, int64_t units,
                             __m256 (&sums)[4][X_ROWS]) {
  const int16_t* levels_x = x.levels;
  for (int64_t u = 0; u < units; ++u, codes += L::kUnitBytes, levels_x += 128 * X_ROWS) {
    typename L::Unit loaded[L::kRowsFirst ? 4 : 1];
    for (int64_t r = 0; L::kRowsFirst && r < rows; ++r) loaded[r].load(table, codes + r * row_bytes);
    for (int64_t r = 0; r < rows; ++r) {
      typename L::Unit& unit = loaded[L::kRowsFirst ? r : 0];
      Words total[X_ROWS] = {};
      for (int byte = 0; byte < L::kUnitBytes; byte += 64) {
        __builtin_prefetch(codes + (r + 4) * row_bytes + byte);
      }
      if (!L::kRowsFirst) unit.load(table, codes + r * row_bytes);
#pragma GCC unroll 4
      for (int v = 0; v < kUnitVectors; ++v) {
        const Bytes levels = unit.levels(table, v);
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
  dots_units<L, X_ROWS>(w.table, codes, w.row_bytes, rows, x, whole, sums);
  if (whole * L::kUnitBytes < w.row_bytes) {
    const CutUnit<L, 4> cut(codes, w.row_bytes, whole * L::kUnitBytes, rows);
    const WordRows rest = {x.levels + whole * kUnitColumns * X_ROWS,
                           x.scales + whole * 8 * X_ROWS, x.vector_stride, x.scale_stride};
    dots_units<L, X_ROWS>(w.table, cut.bytes[0], L::kUnitBytes, rows, rest, 1, sums);
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

template <int DIM, int CODE_BITS>
bool is_direct(const PcdvqLayout& layout) {
  return layout.vector_dim == DIM && !is_trellis(layout) &&
         layout.pattern_bits + layout.magnitude_bits == CODE_BITS;
}

template <int CODE_BITS>
bool match_pyramids(const PcdvqLayout& layout, Decoder* decoder) {
  using L = Pyramids<CODE_BITS>;
  const bool same = layout.pyramid_rows && layout.pattern_bits == CODE_BITS;
  if (same) *decoder = {decode_units<L>, nullptr, dots<L>};
  return same;
}

template <int DIM, int CODE_BITS, class L>
bool match_direct(const PcdvqLayout& layout, Decoder* decoder) {
  const bool same = is_direct<DIM, CODE_BITS>(layout);
  if (same) *decoder = {decode_units<L>, dot<L>, dots<L>};
  return same;
}

// The offered layouts.
bool find_offered(const PcdvqLayout& layout, Decoder* decoder) {
  if (layout.pyramid_rows) {
    return match_pyramids<24>(layout, decoder) || match_pyramids<26>(layout, decoder) ||
           match_pyramids<32>(layout, decoder);
  }
  return match_direct<8, 16, Rows8<16>>(layout, decoder) ||
         match_direct<8, 18, Rows8<18>>(layout, decoder) ||
         match_direct<1, 8, Int8>(layout, decoder);
}

}  // namespace
}  // namespace pcdvq
