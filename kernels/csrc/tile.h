// Register-tiled dot products. Every output is one accumulator that takes the columns in order,
// lanes along K, so its bits do not depend on the tile it falls in. Included once per instruction
// set, after its `Vec`, `Vec8` and `Words`.
#pragma once

#include "isa.h"

namespace pcdvq {
namespace {

// fp32: x [ROWS, x_stride] and panel [COLS, kPanelColumns].
struct FloatTile {
  static constexpr int64_t kLanes = Vec::kLanes;

  template <int ROWS, int COLS>
  static inline void run(const Tiles& t, int64_t row, int64_t column) {
    const float* x = static_cast<const float*>(t.x) + row * t.x_stride;
    const float* panel = static_cast<const float*>(t.panel) + column * kPanelColumns;
    float* acc = t.acc + (row * kPanelRows + column) * kLanes;
    Vec sum[ROWS][COLS];
    for (int i = 0; i < ROWS; ++i) {
      for (int j = 0; j < COLS; ++j) sum[i][j] = Vec::load(acc + (i * kPanelRows + j) * kLanes);
    }
    for (int64_t k = 0; k < t.units * kUnitColumns; k += kLanes) {
      Vec a[ROWS];
      for (int i = 0; i < ROWS; ++i) a[i] = Vec::load(x + i * t.x_stride + k);
      for (int j = 0; j < COLS; ++j) {
        const Vec b = Vec::load(panel + j * kPanelColumns + k);
        for (int i = 0; i < ROWS; ++i) sum[i][j] = fma(a[i], b, sum[i][j]);
      }
    }
    for (int i = 0; i < ROWS; ++i) {
      for (int j = 0; j < COLS; ++j) sum[i][j].store(acc + (i * kPanelRows + j) * kLanes);
    }
  }
};

// int16, scaled to fp32 once a unit. A lane then holds 16 products, at most 16 * 127 * 32767 <
// 2^27 in magnitude: nothing overflows, whatever K is.
struct IntTile {
  static constexpr int64_t kLanes = 8;

  template <int ROWS, int COLS>
  static inline void run(const Tiles& t, int64_t row, int64_t column) {
    const int16_t* x = static_cast<const int16_t*>(t.x) + row * t.x_stride;
    const int16_t* panel = static_cast<const int16_t*>(t.panel) + column * kPanelColumns;
    float* acc = t.acc + (row * kPanelRows + column) * kLanes;
    for (int64_t u = 0; u < t.units; ++u, x += kUnitColumns, panel += kUnitColumns) {
      Words sum[ROWS][COLS] = {};
      for (int64_t k = 0; k < kUnitColumns; k += 16) {
        Words b[COLS];
        for (int j = 0; j < COLS; ++j) b[j] = Words::load(panel + j * kPanelColumns + k);
        for (int i = 0; i < ROWS; ++i) {
          const Words a = Words::load(x + i * t.x_stride + k);
          for (int j = 0; j < COLS; ++j) sum[i][j] = add_products(a, b[j], sum[i][j]);
        }
      }
      for (int i = 0; i < ROWS; ++i) {
        const Vec8 scale = Vec8::load(t.scales + (row + i) * t.scale_stride + 8 * u);
        for (int j = 0; j < COLS; ++j) {
          float* out = acc + (i * kPanelRows + j) * kLanes;
          fma(sum[i][j].to_floats(), scale, Vec8::load(out)).store(out);
        }
      }
    }
  }
};

template <class Tile, int ROWS, int COLS>
void tiles(const Tiles& t, int64_t row) {
  static_assert(kPanelRows % COLS == 0, "tiles must cover a panel");
  for (int64_t j = 0; j < t.panel_rows; j += COLS) Tile::template run<ROWS, COLS>(t, row, j);
}

// 8 to 12 accumulators whatever the number of activation rows: latencies stay hidden.
void accumulate(const Tiles& t) {
  int64_t i = 0;
  for (; i + 4 <= t.rows; i += 4) tiles<FloatTile, 4, 3>(t, i);
  if (t.rows - i == 3) tiles<FloatTile, 3, 4>(t, i);
  if (t.rows - i == 2) tiles<FloatTile, 2, 6>(t, i);
  if (t.rows - i == 1) tiles<FloatTile, 1, 8>(t, i);
}

// A product takes a register of its own before it is added: with more accumulators gcc spills.
void accumulate_int(const Tiles& t) {
  int64_t i = 0;
  for (; i + 4 <= t.rows; i += 4) tiles<IntTile, 4, 2>(t, i);
  if (t.rows - i == 3) tiles<IntTile, 3, 3>(t, i);
  if (t.rows - i == 2) tiles<IntTile, 2, 4>(t, i);
  if (t.rows - i == 1) tiles<IntTile, 1, 4>(t, i);
}

float reduce(const float* acc) { return Vec::sum(acc); }
float reduce_int(const float* acc) { return Vec8::sum(acc); }

}  // namespace
}  // namespace pcdvq
