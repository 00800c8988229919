// Products with VPTQ weights, eight rows at a time. Included once per instruction set, after `Vec8`.
//
// Whatever the number of tokens, a sum is added up in the order of columns.
#pragma once

#include "isa.h"
#include "numeric.h"

namespace pcdvq {
namespace {

constexpr int64_t kRunColumns = 64;  // between prefetches of codes
constexpr int64_t kTableAhead = 8;   // columns between the prefetch of a table's row and its use

// The vectors of a strip, from the codes. BITS of a code: 16, 24 or 32 with 65536 centroids, or 0 for
// any other layout.
template <int DTYPE, bool LONG, int BITS>
struct Coded {
  const PcdvqVptqSegment& s;
  const uint8_t* rows[kStripVectors];  // of codes
  int64_t bits, length, residuals;
  uint64_t index_mask, residual_mask;

  explicit Coded(const VptqStrip& strip) : s(strip.segment) {
    for (int64_t b = 0; b < kStripVectors; ++b) {
      rows[b] = s.codes + (strip.block + smaller(b, strip.blocks - 1)) * s.row_bytes;
    }
    bits = BITS ? BITS : s.index_bits + s.residual_bits;
    length = s.vector_len;
    residuals = length << s.index_bits;
    index_mask = (uint64_t(1) << s.index_bits) - 1;
    residual_mask = (uint64_t(1) << s.residual_bits) - 1;
  }

  bool has_residual() const { return BITS ? BITS > 16 : residual_mask != 0; }

  // Numbers of a column's centroid and residual.
  void find(const uint8_t* row, int64_t column, uint64_t* centroid, uint64_t* residual) const {
    if (BITS) {
      row += column * (BITS / 8);
      *centroid = load_as<uint16_t>(row);
      if (BITS == 24) *residual = row[2];
      if (BITS == 32) *residual = load_as<uint16_t>(row + 2);
    } else {
      const int64_t bit = column * bits;
      const uint64_t code = load_as<uint64_t>(row + bit / 32 * 4) >> bit % 32;
      *centroid = code & index_mask;
      *residual = code >> s.index_bits & residual_mask;
    }
  }

  // Fetches the codes kAhead bytes after those of columns [first, first + kRunColumns): among the
  // random accesses to the table, the CPU does not notice that they are read in order.
  void prefetch(int64_t first, int64_t row_bytes) const {
    constexpr int64_t kAhead = 512;
    const int64_t next_strip = (LONG ? 1 : 3) * row_bytes;
    const int64_t start = first * bits / 8 + kAhead, end = start + kRunColumns * bits / 8;
    for (int64_t at = start; at < end; at += 64) {
      const int64_t skipped = at < row_bytes ? 0 : next_strip;
      for (int64_t b = 0; b < (LONG ? 2 : 4); ++b) __builtin_prefetch(rows[b] + at + skipped);
    }
  }

  // Fetches the table's rows for a later column: with two of them in flight for each code, too few
  // codes are. 256 residuals stay in the cache.
  void prefetch_table(const uint8_t* row, int64_t column) const {
    uint64_t centroid, residual = 0;
    find(row, smaller(column + kTableAhead, s.columns - 1), &centroid, &residual);
    constexpr int64_t kBytes = DTYPE == PCDVQ_F32 ? 4 : DTYPE == PCDVQ_I8 ? 1 : 2;
    const auto* table = static_cast<const char*>(s.table);
    __builtin_prefetch(table + int64_t(centroid) * length * kBytes);
    if (BITS != 24) {
      __builtin_prefetch(table + (residuals + int64_t(residual) * length) * kBytes);
    }
  }

  // Vector v of a column.
  Vec8 operator()(int64_t column, int v) const {
    const uint8_t* row = rows[LONG ? v / 2 : v];
    uint64_t centroid, residual = 0;
    if (has_residual() && !(LONG && v % 2)) prefetch_table(row, column);
    find(row, column, &centroid, &residual);
    const int64_t half = LONG ? v % 2 * 8 : 0;
    const Vec8 w = Vec8::load_converted(s.table, DTYPE, int64_t(centroid) * length + half);
    if (!has_residual()) return w;
    const int64_t place = residuals + int64_t(residual) * length + half;
    return w + Vec8::load_converted(s.table, DTYPE, place);
  }
};

// Vectors that were decoded before.
struct Panel {
  const float* floats;  // [columns, kStripLanes]
  Vec8 operator()(int64_t column, int v) const {
    return Vec8::load(floats + column * kStripLanes + 8 * v);
  }
};

// sums += x . vectors of `columns` columns.
template <int TOKENS, class Vectors>
inline void add_columns(const float* x, int64_t stride, int64_t columns, const Vectors& vectors,
                        float* sums) {
  Vec8 sum[TOKENS][kStripVectors];
  for (int t = 0; t < TOKENS; ++t) {
    for (int v = 0; v < kStripVectors; ++v) sum[t][v] = Vec8::load(sums + t * kStripLanes + 8 * v);
  }
  for (int64_t c = 0; c < columns; ++c) {
    Vec8 factor[TOKENS];
    for (int t = 0; t < TOKENS; ++t) factor[t] = Vec8::broadcast(x[t * stride + c]);
    for (int v = 0; v < kStripVectors; ++v) {
      const Vec8 w = vectors(c, v);
      for (int t = 0; t < TOKENS; ++t) sum[t][v] = fma(factor[t], w, sum[t][v]);
    }
  }
  for (int t = 0; t < TOKENS; ++t) {
    for (int v = 0; v < kStripVectors; ++v) sum[t][v].store(sums + t * kStripLanes + 8 * v);
  }
}

void add_panel(const float* x, int64_t stride, int64_t tokens, int64_t columns, const Panel& panel,
               float* sums) {
  int64_t t = 0;
  for (; t + 3 <= tokens; t += 3) {  // 12 sums, 3 factors and a vector in 16 registers
    add_columns<3>(x + t * stride, stride, columns, panel, sums + t * kStripLanes);
  }
  x += t * stride;
  sums += t * kStripLanes;
  if (tokens - t == 2) add_columns<2>(x, stride, columns, panel, sums);
  if (tokens - t == 1) add_columns<1>(x, stride, columns, panel, sums);
}

template <int DTYPE, bool LONG, int BITS>
void strip_products(const VptqStrip& s) {
  const Coded<DTYPE, LONG, BITS> coded(s);
  const int64_t all = s.segment.columns;
  std::memset(s.sums, 0, size_t(s.tokens * kStripLanes) * sizeof(float));
  if (s.tokens == 1) {
    for (int64_t first = 0; first < all; first += kRunColumns) {
      const int64_t columns = smaller(kRunColumns, all - first);
      coded.prefetch(first, s.segment.row_bytes);
      const auto vectors = [&](int64_t c, int v) { return coded(first + c, v); };
      add_columns<1>(s.x + first, s.x_stride, columns, vectors, s.sums);
    }
    return;
  }
  for (int64_t first = 0; first < all; first += kPanelColumns) {
    const int64_t columns = smaller(kPanelColumns, all - first);
    for (int64_t c = 0; c < columns; ++c) {
      float* to = s.panel + c * kStripLanes;
      for (int v = 0; v < kStripVectors; ++v) coded(first + c, v).store(to + 8 * v);
    }
    add_panel(s.x + first, s.x_stride, s.tokens, columns, Panel{s.panel}, s.sums);
  }
}

template <int DTYPE, bool LONG>
void strip_products_of(const VptqStrip& s) {
  const int64_t residual_bits = s.segment.index_bits == 16 ? s.segment.residual_bits : -1;
  if (residual_bits == 0) return strip_products<DTYPE, LONG, 16>(s);
  if (residual_bits == 8) return strip_products<DTYPE, LONG, 24>(s);
  if (residual_bits == 16) return strip_products<DTYPE, LONG, 32>(s);
  strip_products<DTYPE, LONG, 0>(s);
}

template <int DTYPE>
void strip_products_in(const VptqStrip& s) {
  s.segment.vector_len > 8 ? strip_products_of<DTYPE, true>(s) : strip_products_of<DTYPE, false>(s);
}

void vptq(const VptqStrip& s) {
  if (s.table_dtype == PCDVQ_F32) return strip_products_in<PCDVQ_F32>(s);
  if (s.table_dtype == PCDVQ_BF16) return strip_products_in<PCDVQ_BF16>(s);
  if (s.table_dtype == PCDVQ_I8) return strip_products_in<PCDVQ_I8>(s);
  strip_products_in<PCDVQ_F16>(s);
}

}  // namespace
}  // namespace pcdvq
