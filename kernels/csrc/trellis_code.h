// Codec `trellis` (FORMAT.md, "Trellis"): a decoder for any instruction set.
#pragma once

#include "isa.h"
#include "numeric.h"
#include "trellis_levels.h"

namespace pcdvq {
namespace {

constexpr int kPairColumns = 2;  // of a code
constexpr int kSinglesFrom = 6;  // bits of a code whose two weights have windows of their own

inline bool is_trellis(const PcdvqLayout& layout) { return layout.chain_rows > 0; }

// Codes of a weight's rows, whose strips of columns are parts of chains.
class ChainRows {
 public:
  explicit ChainRows(const Weights& w)
      : codes_(w.qweight),
        row_bytes_(w.row_bytes),
        rows_(w.layout.chain_rows),
        pairs_(w.k / kPairColumns),
        strip_(kChainWeights / kPairColumns / w.layout.chain_rows),
        bits_(int(w.layout.pattern_bits)),
        single_bits_(bits_ < kSinglesFrom ? 0 : bits_ / 2) {}

  // The code of a row and a pair of columns.
  uint32_t code(int64_t row, int64_t pair) const {
    const int64_t bit = pair * bits_, byte = bit >> 3;
    const uint8_t* codes = codes_ + row * row_bytes_ + byte;
    uint32_t word = codes[0];
    if ((bit & 7) + bits_ > 8) word |= uint32_t(codes[1]) << 8;
    return word >> (bit & 7) & ((1u << bits_) - 1);
  }

  // The bits of the ring that end before the code of a row and a pair; those of the code before are
  // the lowest, kWindowBits or more of them.
  uint32_t bits_before(int64_t row, int64_t pair) const {
    const int64_t first = row / rows_ * rows_;
    const int64_t strip = pair / strip_ * strip_;
    const int64_t length = smaller(strip_, pairs_ - strip) * rows_;
    int64_t step = (pair - strip) * rows_ + (row - first);
    uint32_t bits = 0;
    for (int have = 0; have < kWindowBits; have += bits_) {
      step = (step ? step : length) - 1;
      bits |= code(first + step % rows_, strip + step / rows_) << have;
    }
    return bits;
  }

  // Levels of both columns, as window_pair has them. `bits` end with the code.
  uint32_t levels(uint32_t bits) const {
    const uint32_t last = bits & ((1u << kWindowBits) - 1);
    if (!single_bits_) return window_pair(last);
    const uint32_t first = bits >> single_bits_ & ((1u << kWindowBits) - 1);
    return window_single(first) | window_single(last) << 8;
  }

  // Calls use(i, levels) for rows row + i, i < rows, of a pair.
  template <class Use>
  void visit(int64_t row, int64_t rows, int64_t pair, Use use) const {
    uint32_t bits = 0;
    for (int64_t i = 0; i < rows; ++i) {
      if (i == 0 || (row + i) % rows_ == 0) bits = bits_before(row + i, pair);
      bits = bits << bits_ | code(row + i, pair);
      use(i, levels(bits));
    }
  }

 private:
  const uint8_t* const codes_;
  const int64_t row_bytes_, rows_, pairs_, strip_;
  const int bits_, single_bits_;
};

// A DecodeFn.
void decode_chains(const Weights& w, int64_t row, int64_t rows, int64_t first, int64_t units,
                   int8_t* panel) {
  const ChainRows chains(w);
  const int64_t begin = first * kUnitColumns, end = smaller(begin + units * kUnitColumns, w.k);
  for (int64_t column = begin; column < end; column += kPairColumns) {
    const int64_t in_panel = column - begin, in_unit = in_panel % kUnitColumns;
    int8_t* place = panel + (in_panel - in_unit) + run_place(in_unit / 16) + in_unit % 16;
    chains.visit(row, rows, column / kPairColumns, [place](int64_t i, uint32_t levels) {
      place[i * kPanelColumns] = int8_t(levels ^ 128);
      place[i * kPanelColumns + 1] = int8_t(levels >> 8 ^ 128);
    });
  }
}

}  // namespace
}  // namespace pcdvq
