// What each instruction set provides to the drivers in linear.cpp and nearest.cpp.
#pragma once

#include "pcdvq.h"

namespace pcdvq {

// Columns that share one decoded panel, and weight rows of a panel: 24 x 256 floats leave room in
// a 32 KB L1 for the activations. 24 is a multiple of every tile width in tile.h.
constexpr int64_t kPanelColumns = 256;
constexpr int64_t kPanelRows = 24;

// Rows of a segment of the trellis codec, and its largest number of states (FORMAT.md).
constexpr int64_t kSegmentRows = 16;
constexpr int64_t kMaxStates = 16;

struct Weights {
  const uint8_t* qweight;  // [n, row_bytes]
  const int8_t* table;     // what Decoder::expand made, or the codewords
  int64_t row_bytes;
  PcdvqLayout layout;
};

// Decodes levels of weight rows [row, row + rows), octets (runs of 8 columns) [first, first +
// count), into panel [rows, kPanelColumns].
using DecodeFn = void (*)(const Weights&, int64_t row, int64_t rows, int64_t first, int64_t count,
                          float* panel);

// out[i][r] = x row i . levels of weight row (row + r), for rows [row, row + rows) and few
// activation rows (1 or 2). x: [x_rows, x_stride], out: [x_rows, rows].
using FusedFn = void (*)(const Weights&, int64_t row, int64_t rows, const float* x,
                         int64_t x_stride, int64_t x_rows, int64_t octets, float* out);

// Activation rows up to which a fused kernel beats decoding to a panel first.
constexpr int64_t kFusedRows = 2;

// Bytes of the largest expanded table.
constexpr int64_t kTableBytes = 16384;

struct Decoder {
  DecodeFn decode;
  FusedFn fused;
  // Makes the table of a small codebook: [<= kTableBytes]. Null: the codewords are used.
  void (*expand)(const int8_t* codewords, int8_t* table);
};

struct Kernels {
  int64_t lanes;  // floats of one accumulator

  Decoder (*decoder)(const PcdvqLayout&);

  // out[0:columns] = H S x for a run of whole Hadamard blocks; signs starts at the run.
  void (*rotate)(const void* x, int32_t dtype, const uint8_t* signs, int64_t columns,
                 int64_t block, float* out);

  // acc[i][r] += lane-wise products of x row i and panel row r over `columns` (a multiple of
  // lanes). x: [rows, x_stride], panel: [kPanelRows, kPanelColumns],
  // acc: [rows, kPanelRows, lanes].
  void (*accumulate)(const float* x, int64_t x_stride, int64_t rows, const float* panel,
                     int64_t panel_rows, int64_t columns, float* acc);

  // Sum of one accumulator's lanes, in a fixed order.
  float (*reduce)(const float* acc);

  // Nearest codewords of groups [first, first + groups), at most kNearestGroups of them.
  void (*nearest)(const PcdvqNearest& problem, int64_t first, int64_t groups);

  // Trellis codes of chains [first, first + count), at most 4 * lanes of them. Chain i is column
  // group i % groups of segment i / groups.
  void (*trellis)(const PcdvqTrellis& problem, int64_t first, int64_t count);
};

constexpr int64_t kNearestGroups = 256;

const Kernels* scalar_kernels();
const Kernels* avx2_kernels();    // null where the compiler cannot target it
const Kernels* avx512_kernels();  // likewise

// Kernels for a PcdvqIsa; null if this CPU lacks it.
const Kernels* kernels_for(int32_t isa);

}  // namespace pcdvq
