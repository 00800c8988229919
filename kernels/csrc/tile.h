// Register-tiled dot products. Every output is one accumulator that takes the columns in order,
// lanes along K, so its bits do not depend on the tile it falls in. Included once per instruction
// set, after its `Vec`.
#pragma once

#include "isa.h"

namespace pcdvq {
namespace {

// x: [ROWS, x_stride], panel: [COLS, kPanelColumns], acc: [ROWS, kPanelRows, lanes].
template <int ROWS, int COLS>
inline void tile(const float* x, int64_t x_stride, const float* panel, int64_t columns,
                 float* acc) {
  static_assert(kPanelRows % COLS == 0, "tiles must cover a panel");
  constexpr int64_t kAccStride = kPanelRows * Vec::kLanes;
  Vec sum[ROWS][COLS];
  for (int i = 0; i < ROWS; ++i) {
    for (int j = 0; j < COLS; ++j) sum[i][j] = Vec::load(acc + i * kAccStride + j * Vec::kLanes);
  }
  for (int64_t k = 0; k < columns; k += Vec::kLanes) {
    Vec a[ROWS];
    for (int i = 0; i < ROWS; ++i) a[i] = Vec::load(x + i * x_stride + k);
    for (int j = 0; j < COLS; ++j) {
      const Vec b = Vec::load(panel + j * kPanelColumns + k);
      for (int i = 0; i < ROWS; ++i) sum[i][j] = fma(a[i], b, sum[i][j]);
    }
  }
  for (int i = 0; i < ROWS; ++i) {
    for (int j = 0; j < COLS; ++j) sum[i][j].store(acc + i * kAccStride + j * Vec::kLanes);
  }
}

// 8 to 12 accumulators whatever the number of activation rows: FMA latency stays hidden.
template <int ROWS, int COLS>
void tiles(const float* x, int64_t x_stride, const float* panel, int64_t panel_rows,
           int64_t columns, float* acc) {
  for (int64_t j = 0; j < panel_rows; j += COLS) {
    tile<ROWS, COLS>(x, x_stride, panel + j * kPanelColumns, columns, acc + j * Vec::kLanes);
  }
}

void accumulate(const float* x, int64_t x_stride, int64_t rows, const float* panel,
                int64_t panel_rows, int64_t columns, float* acc) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    tiles<4, 3>(x + i * x_stride, x_stride, panel, panel_rows, columns,
                acc + i * kPanelRows * Vec::kLanes);
  }
  x += i * x_stride;
  acc += i * kPanelRows * Vec::kLanes;
  if (rows - i == 3) tiles<3, 4>(x, x_stride, panel, panel_rows, columns, acc);
  if (rows - i == 2) tiles<2, 6>(x, x_stride, panel, panel_rows, columns, acc);
  if (rows - i == 1) tiles<1, 8>(x, x_stride, panel, panel_rows, columns, acc);
}

float reduce(const float* acc) { return Vec::sum(acc); }

}  // namespace
}  // namespace pcdvq
