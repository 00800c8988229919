// What each instruction set provides to the drivers in linear.cpp and nearest.cpp.
#pragma once

#include "pcdvq.h"
#include "trellis_levels.h"

namespace pcdvq {

// Columns are decoded in units. Inside of one, the kernels keep them in an order in which each half
// of a 256-bit register belongs to one scale of the activations: element 32 v + 16 h + i of a unit
// is column 64 h + 16 v + i, for v < 4, h < 2, i < 16.
constexpr int64_t kUnitColumns = 128;
constexpr int64_t kScaleColumns = 64;  // that share a scale
constexpr int kUnitVectors = 4;        // of 32 levels

// Where a run of 16 columns is in its unit: run r has the columns from 16 r on.
inline int64_t run_place(int64_t run) { return 32 * (run % 4) + 16 * (run / 4); }

// Columns that share one decoded panel, and weight rows of a panel: 24 x 256 floats leave room in
// a 32 KB L1 for the activations. 24 is a multiple of every tile width in tile.h.
constexpr int64_t kPanelColumns = 256;
constexpr int64_t kPanelRows = 24;

struct Weights {
  const uint8_t* qweight;  // [n, row_bytes], or packed for BlockDecoder
  const int8_t* table;     // the codewords
  int64_t n, k, row_bytes;
  PcdvqLayout layout;
  bool packed;
};

// Weight rows of a block and its steps of four columns; what a block is block_decode.h says.
constexpr int64_t kBlockRows = 16;
constexpr int64_t kBlockSteps = kScaleColumns / 4;
constexpr int64_t kStepBytes = 4 * kBlockRows;

// Decodes blocks [first, first + blocks) of weight rows [row, row + rows), at most kBlockRows. Step
// s of block b is at levels + (kBlockSteps * b + s) * step. Columns past K and rows past the last get
// any levels.
using BlocksFn = void (*)(const Weights&, int64_t row, int64_t rows, int64_t first, int64_t blocks,
                          int64_t step, uint8_t* levels);

// Rows of int8 activations for blocks.
struct BlockRows {
  int8_t* levels;        // of a row and a block kScaleColumns, row * stride + block * block_stride on
  float* scales;         // [rows, scale_stride], one for each block
  int32_t* corrections;  // likewise: -128 times the sum of a block's levels
  int64_t stride, block_stride, scale_stride;

  BlockRows from(int64_t row, int64_t block) const {
    const int64_t at = row * scale_stride + block;
    return {levels + row * stride + block * block_stride, scales + at, corrections + at, stride,
            block_stride, scale_stride};
  }
};

// acc [x_rows, strips * kBlockRows] += x times weight rows [row, row + rows), at most those of the
// decoder's strips. The levels of the rows of x are [blocks, x_rows, kScaleColumns].
using BlockDotFn = void (*)(const Weights&, int64_t row, int64_t rows, const BlockRows& x,
                            float* acc);

// Decodes units [first, first + units) of weight rows [row, row + rows) into panel
// [rows, kPanelColumns]. What it writes for columns past K is any level.
using DecodeFn = void (*)(const Weights&, int64_t row, int64_t rows, int64_t first, int64_t units,
                          int8_t* panel);

// A row of int8 activations for DotFn. Both are in the order of units.
struct ByteRow {
  const int8_t* levels;  // [units, 4, 2, 32]: of each vector the levels, then those negated
  const float* scales;   // [units, 8]
};

// Rows of int8 or int16 activations as int16, in the order of units: of each vector of 32 the even
// elements, then the odd ones. Vectors of several rows may be interleaved.
struct WordRows {
  int16_t* levels;  // [units * 4, vector_stride]
  float* scales;    // [units, scale_stride], of each row 8
  int64_t vector_stride;
  int64_t scale_stride;
};

// out[r] = x . levels of weight row (row + r), for rows [row, row + rows).
using DotFn = void (*)(const Weights&, int64_t row, int64_t rows, const ByteRow& x, float* out);

// The same of x_rows (1, 2, 4 or 8) interleaved rows of x. out: [x_rows, kPanelRows].
using DotsFn = void (*)(const Weights&, int64_t row, int64_t rows, const WordRows& x,
                        int64_t x_rows, float* out);

struct Decoder {
  DecodeFn decode;
  DotFn dot;    // null: there is none, and `dots` or panels are used
  DotsFn dots;  // likewise
};

// Rows of activations that are multiplied with blocks while those are decoded.
constexpr int kFewRows[] = {1, 2, 4, 6, 8};
constexpr int kFewKinds = sizeof(kFewRows) / sizeof(kFewRows[0]);

// Strips of kBlockRows weight rows that share reads of activations.
constexpr int64_t kPanelStrips = 4;

struct BlockDecoder {
  BlocksFn decode;
  BlockDotFn dot[kFewKinds];  // for so many rows of x each
  int64_t strips;             // that a product takes at a time: 1 or kPanelStrips

  // Of packed codes only. A packed weight is [strips of kBlockRows rows][blocks][block_bytes], or
  // [blocks][strips][block_bytes] of each kPanelStrips strips where products take so many.
  void (*pack)(const Weights& rows, int64_t strip, uint8_t* out);  // `strips` of them
  int64_t block_bytes;
};

// Activations against the blocks of kPanelStrips strips.
struct BlockTiles {
  BlockRows x;  // from the first block on
  int64_t rows, blocks;
  const uint8_t* levels;  // [blocks, kBlockSteps, kPanelStrips, kStepBytes]
  float* acc;             // [rows, kPanelStrips, kBlockRows]
};

// Activations of a panel's columns against the panel, in the order of units.
struct Tiles {
  const void* x;        // [rows, x_stride], float or int16
  int64_t x_stride;     // elements
  const float* scales;  // [rows, scale_stride], 8 for each unit; of int16 activations only
  int64_t scale_stride;
  int64_t rows;
  const void* panel;  // [panel_rows, kPanelColumns], of the type of x
  int64_t panel_rows;
  int64_t units;
  float* acc;  // [rows, kPanelRows, lanes]
};

// Vectors of eight rows that VPTQ products keep in registers for each token.
constexpr int64_t kStripVectors = 4;
constexpr int64_t kStripLanes = 8 * kStripVectors;

// Row blocks of a strip: each takes one vector, or two if it has more than eight rows.
inline int64_t strip_blocks(int64_t vector_len) { return vector_len > 8 ? 2 : 4; }

// A strip of row blocks of a VPTQ segment, from `block` on, times all tokens.
struct VptqStrip {
  const PcdvqVptqSegment& segment;
  int32_t table_dtype;
  int64_t block, blocks;  // blocks: at most strip_blocks; the lanes of others are not defined
  const float* x;         // [tokens, x_stride], the segment's first column first
  int64_t x_stride, tokens;
  float* panel;  // [kPanelColumns, kStripLanes], scratch
  float* sums;   // [tokens, kStripLanes]
};

// More than any path of the computed trellis costs that can still be the best.
constexpr int32_t kMostChainCost = 1 << 29;

// Windows have levels that count 2^kLevelBits times, and norms: squared levels less kNormOffset.
constexpr int kLevelBits = 6;
constexpr int kNormOffset = 1 << 14;

// Windows that are loaded together lie together in the `levels` and `norms` of a ChainStep.
constexpr int kWindowGroupBits = 4;
constexpr int64_t kWindowGroup = 1 << kWindowGroupBits;

// One step of the Viterbi algorithm in chain_viterbi.cpp, for a few chains that share its windows.
// Before it, path i is the best one whose window ends with the before_bits bits of i. new_bits come
// to it; of the paths with the same last after_bits then the best is kept. By what bits above these
// it won, the tag of its cost tells; costs are multiples of 2^tag_bits. Where before_bits are not all
// that a window has besides the new ones, the path's row tells them, and above the bits that won the
// tag has those of the row to come.
struct ChainStep {
  struct Chain {
    int32_t target, weight;  // pairs of int16: factors of the windows' levels and norms
    int32_t offset;          // of all costs
    int32_t lowest;          // out: the least of `after`
    const int32_t* before;   // [2^before_bits] costs, with the tags of this step
    const int32_t* rows;     // [2^before_bits]; null where before_bits are all
    int32_t* after;          // [2^after_bits] costs, with the tags of the next step
    int32_t* rows_after;     // [2^after_bits]
    uint8_t* tags;           // [2^after_bits]: of the paths that are kept
  };
  // [2^16] pairs of int16: in groups, those that are chosen from one after the other; with rows by
  // window. Norms are of both levels of a window and the low halves; null for windows of one level.
  const int32_t* levels;
  const int32_t* norms;
  int before_bits, new_bits, after_bits;
  int next_choice_bits, next_hidden_bits;  // in the tags and rows of the next step
  int tag_bits;
  int64_t count;
  Chain chain[4];
};

struct BlockKernels {
  // Of packed codes or rows of codes; `decode` is null where the layout is not packed.
  BlockDecoder (*decoder)(const PcdvqLayout&, bool packed);

  // Quantizes `columns` rotated activations; `x` has room for whole blocks.
  void (*quantize)(float* x, int64_t columns, const BlockRows& out);

  // acc += x times the blocks.
  void (*accumulate)(const BlockTiles&);

  // out[i] = acc[i] * row_scale[i] + bias[i], `count` of them; bias may be null.
  void (*finish)(const float* acc, const float* row_scale, const float* bias, int64_t count,
                 int32_t dtype, void* out);
};

struct Kernels {
  int64_t lanes;  // floats of one accumulator of `accumulate`

  Decoder (*decoder)(const PcdvqLayout&);

  // out[0:columns] = H S x for a run of whole Hadamard blocks; signs starts at the run.
  void (*rotate)(const void* x, int32_t dtype, const uint8_t* signs, int64_t columns,
                 int64_t block, float* out);

  // Puts `columns` rotated activations into the order of units, padded with zeros; `x` has room for
  // whole units too.
  void (*order_floats)(float* x, int64_t columns, float* out);

  // Quantizes `columns` rotated activations, in the order of columns; `x` has room as above.
  void (*quantize_int8)(float* x, int64_t columns, int8_t* levels, float* scales);  // of ByteRow
  void (*quantize_int16)(float* x, int64_t columns, float limit, const WordRows& out);

  // Levels of a panel as the other factor of `accumulate` and `accumulate_int`.
  void (*to_floats)(const int8_t* levels, int64_t count, float* out);
  void (*to_int16)(const int8_t* levels, int64_t count, int16_t* out);

  // acc[i][r] += lane-wise products of x row i and panel row r.
  void (*accumulate)(const Tiles&);      // float, kernels.lanes lanes
  void (*accumulate_int)(const Tiles&);  // int16, 8 lanes

  // Sum of one accumulator's lanes, in a fixed order.
  float (*reduce)(const float* acc);
  float (*reduce_int)(const float* acc);

  // Nearest codewords of groups [first, first + groups), at most kNearestGroups of them.
  void (*nearest)(const PcdvqNearest& problem, int64_t first, int64_t groups);

  void (*chain_step)(ChainStep& step);

  void (*vptq)(const VptqStrip& strip);

  // Int8 activations by blocks; null where panels are used for them too.
  const BlockKernels* blocks;
};

constexpr int64_t kNearestGroups = 256;

const Kernels* scalar_kernels();
const Kernels* avx2_kernels();    // null where the compiler cannot target it
const Kernels* avx512_kernels();  // likewise

// Kernels for a PcdvqIsa; null if this CPU lacks it.
const Kernels* kernels_for(int32_t isa);

}  // namespace pcdvq
