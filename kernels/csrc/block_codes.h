// Where blocks are read and where they go: rows of codes or packed codes, for the decoders of
// block_decode.h. Included once.
#pragma once

#include "block_decode.h"

namespace pcdvq {
namespace {

// The codes of a block, zeros where the weight has none.
template <class L>
__attribute__((noinline)) void copy_block(const Weights& w, int64_t row, int64_t rows, int64_t block,
                                          uint8_t (&out)[kBlockRows][kScaleColumns]) {
  const int64_t first = block * L::kBlockBytes;
  std::memset(out, 0, sizeof(out));
  for (int64_t r = 0; r < rows; ++r) {
    const uint8_t* codes = w.qweight + (row + r) * w.row_bytes + first;
    std::memcpy(out[r], codes, size_t(smaller(L::kBlockBytes, w.row_bytes - first)));
  }
}

// Where blocks of a strip of weight rows [row, row + rows), at most kBlockRows, are read.
template <class L, bool PACKED>
struct BlockCodes {
  const Weights& w;
  const int64_t row, rows;
  uint8_t cut[kBlockRows][kScaleColumns];

  // Calls use(codes, bytes between rows) for block b.
  template <class Use>
  PCDVQ_INLINE void visit(int64_t b, Use use) {
    if constexpr (PACKED) {
      const int64_t blocks = (w.k + kScaleColumns - 1) / kScaleColumns;
      const int64_t block = row / kBlockRows * blocks + b;
      constexpr int64_t kBytes = kBlockRows * L::kBlockBytes;
      use(w.qweight + block * kBytes, int64_t(L::kBlockBytes));
    } else {
      const uint8_t* codes = w.qweight + row * w.row_bytes + b * L::kBlockBytes;
      const bool whole = rows == kBlockRows && (b + 1) * L::kBlockBytes <= w.row_bytes;
      if (!whole) copy_block<L>(w, row, rows, b, cut);
      use(whole ? codes : cut[0], whole ? w.row_bytes : kScaleColumns);
    }
  }
};

struct Store {
  uint8_t* out;
  int64_t step;

  PCDVQ_INLINE void operator()(int s, int, Wide levels) const {
    _mm512_store_si512(out + s * step, levels);
  }
};

template <class L, bool PACKED>
void decode_blocks(const Weights& w, int64_t row, int64_t rows, int64_t first, int64_t blocks,
                   int64_t step, uint8_t* out) {
  BlockCodes<L, PACKED> strip = {w, row, rows, {}};
  for (int64_t b = first; b < first + blocks; ++b, out += kBlockSteps * step) {
    strip.visit(b, [&](const uint8_t* codes, int64_t stride) __attribute__((always_inline)) {
      L::decode(w.table, codes, stride, Store{out, step});
    });
  }
}

// Strip `strip` in the order in which blocks are decoded.
template <class L>
void pack_strip(const Weights& w, int64_t strip, uint8_t* out) {
  const int64_t row = strip * kBlockRows, rows = smaller(kBlockRows, w.n - row);
  for (int64_t b = 0; b * kScaleColumns < w.k; ++b, out += kBlockRows * L::kBlockBytes) {
    uint8_t codes[kBlockRows][kScaleColumns];
    copy_block<L>(w, row, rows, b, codes);
    L::pack(codes[0], kScaleColumns, out);
  }
}

// The same of any layout, by its other decoder.
void decode_other(const Weights& w, int64_t row, int64_t rows, int64_t first, int64_t blocks,
                  int64_t step, uint8_t* out) {
  const DecodeFn decode = find_decoder(w.layout).decode;
  alignas(64) int8_t panel[kBlockRows * kPanelColumns] = {};
  for (int64_t b = first; b < first + blocks; ++b, out += kBlockSteps * step) {
    const int64_t half = b % 2;  // of a unit
    if (half == 0 || b == first) decode(w, row, rows, b / 2, 1, panel);
    const auto at = [=](int v) { return 32 * v + 16 * half; };
    give_levels(reinterpret_cast<const uint8_t*>(panel), kPanelColumns, at, Store{out, step});
  }
}

}  // namespace
}  // namespace pcdvq
