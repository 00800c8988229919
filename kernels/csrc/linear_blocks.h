// Driver of pcdvq_linear for int8 activations where weights are decoded to blocks (block_decode.h).
#pragma once

#include "linear.h"

namespace pcdvq {
namespace {

struct Blocks {
  const Linear& linear;
  const PcdvqLinear& p;
  const BlockKernels& kernels;
  const BlockDecoder decoder;
  const int64_t blocks;  // of columns
  const int64_t strips;  // of weight rows
  const int64_t rows;    // of activations that share a decode
  const int few;         // which dot of the decoder takes the rows, or kMany
  const int64_t copies;  // of the prepared activations
  Buffer<int8_t> levels;        // [copies, padded rows, row_columns()]
  Buffer<float> scales;         // [copies, padded rows, blocks]
  Buffer<int32_t> corrections;  // likewise

  static constexpr int kMany = kFewKinds;
  // Blocks decoded at a time: with those of kPanelStrips strips they take half of a 32 KiB cache.
  static constexpr int64_t kChunk = 4;
  static constexpr int64_t kPanelOutputs = kPanelStrips * kBlockRows;

  // Of a thread.
  struct Scratch {
    alignas(64) uint8_t levels[kChunk * kBlockSteps * kPanelStrips * kStepBytes];
    float bias[kPanelOutputs];
    Buffer<float> acc;      // [rows, kPanelOutputs]
    Buffer<float> rotated;  // a run
  };

  Blocks(const Linear& l, int threads)
      : linear(l),
        p(l.p),
        kernels(*l.kernels.blocks),
        decoder(kernels.decoder(p.layout, p.packed)),
        blocks((p.k + kScaleColumns - 1) / kScaleColumns),
        strips((p.n + kBlockRows - 1) / kBlockRows),
        rows(std::min(p.m, kSharingRows)),
        few(int(std::lower_bound(kFewRows, kFewRows + kFewKinds, p.m) - kFewRows)),
        copies(p.m == 1 ? threads : 1),
        levels(allocate<int8_t>(copies * padded_rows() * row_columns())),
        scales(allocate<float>(copies * padded_rows() * blocks)),
        corrections(allocate<int32_t>(copies * padded_rows() * blocks)) {}

  // Whether these kernels take a weight packed, or not, as this one.
  static bool takes(const PcdvqLinear& p, const Kernels& kernels) {
    return kernels.blocks && p.layout.activations == PCDVQ_INT8 &&
           kernels.blocks->decoder(p.layout, p.packed).decode;
  }

  int64_t padded_rows() const { return few == kMany ? rows : kFewRows[few]; }

  // An odd number of blocks, or rows of activations would share sets of the first-level cache.
  int64_t row_columns() const { return kScaleColumns * (blocks | 1); }

  BlockRows activations() const {
    const bool mixed = 0 < few && few < kMany;  // the rows of a block follow each other
    return {levels.get(),
            scales.get(),
            corrections.get(),
            mixed ? kScaleColumns : row_columns(),
            mixed ? padded_rows() * kScaleColumns : kScaleColumns,
            blocks};
  }

  // Run `run` of activation row m into row `row`.
  void prepare(int64_t m, int64_t run, int64_t row, float* rotated) const {
    const int64_t columns = linear.rotate(m, run, rotated);
    const int64_t first = run * linear.rotate_run();
    kernels.quantize(rotated, columns, activations().from(row, first / kScaleColumns));
  }

  // Outputs [m0, m0 + count) x [n0, n0 + outputs).
  void write(int64_t m0, int64_t count, int64_t n0, int64_t outputs, int64_t acc_stride,
             Scratch& s) const {
    if (p.bias) {
      for (int64_t i = 0; i < outputs; ++i) s.bias[i] = load_element(p.bias, p.bias_dtype, n0 + i);
    }
    const int64_t element = p.x_dtype == PCDVQ_F32 ? 4 : 2;
    for (int64_t i = 0; i < count; ++i) {
      char* out = static_cast<char*>(p.out) + ((m0 + i) * p.n + n0) * element;
      kernels.finish(s.acc.get() + i * acc_stride, p.row_scale + n0, p.bias ? s.bias : nullptr,
                     outputs, p.x_dtype, out);
    }
  }

  // Few rows of activations, from row `row` on, times the strips of a product, the first of which is
  // `first`.
  void few_rows(const Weights& weights, int64_t row, int64_t first, Scratch& s) const {
    const int64_t n0 = first * kBlockRows, most = decoder.strips * kBlockRows;
    const int64_t outputs = std::min(most, p.n - n0);
    std::fill(s.acc.get(), s.acc.get() + padded_rows() * most, 0.0f);
    decoder.dot[few](weights, n0, outputs, activations().from(row, 0), s.acc.get());
    write(0, p.m, n0, outputs, most, s);
  }

  // `count` rows of activations, which are rows m0 and on of x, times kPanelStrips strips.
  void panel(const Weights& weights, int64_t m0, int64_t count, int64_t first, Scratch& s) const {
    const int64_t last = std::min(first + kPanelStrips, strips);
    std::fill(s.acc.get(), s.acc.get() + count * kPanelOutputs, 0.0f);
    for (int64_t block = 0; block < blocks; block += kChunk) {
      const int64_t chunk = std::min(kChunk, blocks - block);
      for (int64_t i = first; i < last; i += decoder.strips) {
        const int64_t n0 = i * kBlockRows, most = decoder.strips * kBlockRows;
        if (!p.packed) linear.prefetch(n0 + kPanelOutputs, most, block, kChunk, blocks);
        decoder.decode(weights, n0, std::min(most, p.n - n0), block, chunk,
                       kPanelStrips * kStepBytes, s.levels + (i - first) * kStepBytes);
      }
      kernels.accumulate({activations().from(0, block), count, chunk, s.levels, s.acc.get()});
    }
    const int64_t n0 = first * kBlockRows;
    write(m0, count, n0, std::min(kPanelOutputs, p.n - n0), kPanelOutputs, s);
  }

  // What every thread does.
  void work(Scratch& s) const {
    const Weights weights = linear.weights();
    const int64_t runs = linear.rotate_units();
    if (copies > 1) {  // a row takes less time to prepare than threads to wait for each other
      const int64_t mine = thread_index();
      for (int64_t i = 0; i < runs; ++i) prepare(0, i, mine, s.rotated.get());
#pragma omp for schedule(dynamic, kPanelStrips) nowait
      for (int64_t i = 0; i < strips; i += decoder.strips) few_rows(weights, mine, i, s);
      return;
    }
    for (int64_t m0 = 0; m0 < p.m; m0 += rows) {
      const int64_t count = std::min(rows, p.m - m0);
      if (m0 > 0) {  // other threads may still read the rows prepared before
#pragma omp barrier
      }
#pragma omp for schedule(static)
      for (int64_t i = 0; i < count * runs; ++i) {
        prepare(m0 + i / runs, i % runs, i / runs, s.rotated.get());
      }
      if (few == kMany) {
#pragma omp for schedule(dynamic) nowait
        for (int64_t i = 0; i < strips; i += kPanelStrips) panel(weights, m0, count, i, s);
      } else {
#pragma omp for schedule(dynamic, kPanelStrips) nowait
        for (int64_t i = 0; i < strips; i += decoder.strips) few_rows(weights, 0, i, s);
      }
    }
  }

  PcdvqStatus run(int threads) const {
    const std::unique_ptr<Scratch[]> scratch(new (std::nothrow) Scratch[size_t(threads)]);
    if (!levels || !scales || !corrections || !scratch) return PCDVQ_NO_MEMORY;
    for (int i = 0; i < threads; ++i) {
      scratch[i].acc = allocate<float>(padded_rows() * kPanelOutputs);
      scratch[i].rotated = allocate<float>(linear.run_floats());
      if (!scratch[i].acc || !scratch[i].rotated) return PCDVQ_NO_MEMORY;
      // The last panel multiplies strips that nobody decoded.
      if (few == kMany) std::memset(scratch[i].levels, 0, sizeof(scratch[i].levels));
    }
    // Padding rows are multiplied, and nobody reads the products.
    if (rows < padded_rows()) {
      std::fill(levels.get(), levels.get() + padded_rows() * row_columns(), int8_t(0));
    }
    std::fill(scales.get() + rows * copies * blocks,
              scales.get() + padded_rows() * copies * blocks, 0.0f);
    std::fill(corrections.get() + rows * copies * blocks,
              corrections.get() + padded_rows() * copies * blocks, 0);
#pragma omp parallel num_threads(threads)
    work(scratch[thread_index()]);
    return PCDVQ_OK;
  }
};

}  // namespace
}  // namespace pcdvq
