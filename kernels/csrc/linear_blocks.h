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
  const int64_t blocks;   // of columns
  const int64_t strips;   // of weight rows
  const int64_t together; // strips that share reads of activations
  const int64_t rows;     // of activations that share a decode
  const int64_t copies;   // of the prepared activations
  // An odd number of blocks: or rows of activations would share sets of the first-level cache.
  const int64_t stride;
  Buffer<int8_t> levels;        // [copies, rows, stride]
  Buffer<float> scales;         // [copies, rows, blocks]
  Buffer<int32_t> corrections;  // likewise

  // Rows of activations up to which a strip at a time is best: its sums stay in registers.
  static constexpr int64_t kFewRows = 8;
  // Blocks decoded at a time: with those of kPanelStrips strips they take half of a 32 KiB cache.
  static constexpr int64_t kChunk = 4;

  // Of a thread.
  struct Scratch {
    alignas(64) int8_t table[kTableBytes];
    alignas(64) uint8_t levels[kChunk * kBlockSteps * kPanelStrips * kStepBytes];
    float bias[kPanelStrips * kBlockRows];
    Buffer<float> acc;      // [rows, kPanelStrips, kBlockRows]
    Buffer<float> rotated;  // a run
  };

  Blocks(const Linear& l, int threads)
      : linear(l),
        p(l.p),
        kernels(*l.kernels.blocks),
        decoder(kernels.decoder(p.layout)),
        blocks((p.k + kScaleColumns - 1) / kScaleColumns),
        strips((p.n + kBlockRows - 1) / kBlockRows),
        together(p.m > kFewRows ? kPanelStrips : 1),
        rows(std::min(p.m, kSharingRows)),
        copies(p.m == 1 ? threads : 1),
        stride(kScaleColumns * (blocks | 1)),
        levels(allocate<int8_t>(copies * rows * stride)),
        scales(allocate<float>(copies * rows * blocks)),
        corrections(allocate<int32_t>(copies * rows * blocks)) {}

  // From row `row` and block `block` on.
  BlockRows activations(int64_t row, int64_t block) const {
    const int64_t at = row * blocks + block;
    return {levels.get() + row * stride + block * kScaleColumns, scales.get() + at,
            corrections.get() + at, stride, blocks};
  }

  // Run `run` of activation row m into row `row`.
  void prepare(int64_t m, int64_t run, int64_t row, float* rotated) const {
    const int64_t columns = linear.rotate(m, run, rotated);
    const int64_t first = run * linear.rotate_run();
    kernels.quantize(rotated, columns, activations(row, first / kScaleColumns));
  }

  // Fetches the codes of a chunk of a strip: the hardware does not follow as many rows. Addresses past
  // the end of the weights are harmless.
  void prefetch(int64_t strip, int64_t block) const {
    const int64_t first = block * p.row_bytes / blocks;
    const int64_t last = first + kChunk * p.row_bytes / blocks;
    for (int64_t r = 0; r < kBlockRows; ++r) {
      const uint8_t* row = p.qweight + (strip * kBlockRows + r) * p.row_bytes;
      for (int64_t byte = first; byte < last; byte += 64) __builtin_prefetch(row + byte);
    }
  }

  // Outputs [m0, m0 + count) of strips [strip, strip + together), of activations from row `row` on.
  void panel(const Weights& weights, int64_t m0, int64_t count, int64_t row, int64_t strip,
             Scratch& s) const {
    const int64_t n0 = strip * kBlockRows, columns = together * kBlockRows;
    const int64_t outputs = std::min(columns, p.n - n0);
    std::fill(s.acc.get(), s.acc.get() + count * columns, 0.0f);
    for (int64_t block = 0; block < blocks; block += kChunk) {
      const int64_t chunk = std::min(kChunk, blocks - block);
      for (int64_t j = 0; j < together && strip + j < strips; ++j) {
        prefetch(strip + j + together, block);
        const int64_t first_row = n0 + j * kBlockRows;
        decoder.decode(weights, first_row, std::min(kBlockRows, p.n - first_row), block, chunk,
                       together * kStepBytes, s.levels + j * kStepBytes);
      }
      kernels.accumulate({activations(row, block), count, chunk, together, s.levels, s.acc.get()});
    }
    if (p.bias) {
      for (int64_t i = 0; i < outputs; ++i) s.bias[i] = load_element(p.bias, p.bias_dtype, n0 + i);
    }
    const int64_t element = p.x_dtype == PCDVQ_F32 ? 4 : 2;
    for (int64_t i = 0; i < count; ++i) {
      char* out = static_cast<char*>(p.out) + ((m0 + i) * p.n + n0) * element;
      kernels.finish(s.acc.get() + i * columns, p.row_scale + n0, p.bias ? s.bias : nullptr,
                     outputs, p.x_dtype, out);
    }
  }

  // What every thread does.
  void work(Scratch& s) const {
    if (decoder.expand) decoder.expand(p.codewords, s.table);
    const Weights weights = {p.qweight, decoder.expand ? s.table : p.codewords, p.n, p.k,
                             p.row_bytes, p.layout};
    const int64_t runs = linear.rotate_units();
    for (int64_t m0 = 0; m0 < p.m; m0 += rows) {
      const int64_t count = std::min(rows, p.m - m0);
      // One row takes less time to prepare than threads to wait for each other.
      const int64_t mine = copies > 1 ? thread_index() : 0;
      if (p.m == 1) {
        for (int64_t i = 0; i < runs; ++i) prepare(0, i, mine, s.rotated.get());
      } else {
        if (m0 > 0) {  // other threads may still read the rows prepared before
#pragma omp barrier
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count * runs; ++i) {
          prepare(m0 + i / runs, i % runs, i / runs, s.rotated.get());
        }
      }
#pragma omp for schedule(dynamic) nowait
      for (int64_t i = 0; i < strips; i += together) panel(weights, m0, count, mine, i, s);
    }
  }

  PcdvqStatus run(int threads) const {
    // Zeros, because the last panel multiplies strips that nobody decoded.
    const std::unique_ptr<Scratch[]> scratch(new (std::nothrow) Scratch[size_t(threads)]());
    if (!levels || !scales || !corrections || !scratch) return PCDVQ_NO_MEMORY;
    for (int i = 0; i < threads; ++i) {
      scratch[i].acc = allocate<float>(rows * kPanelStrips * kBlockRows);
      scratch[i].rotated = allocate<float>(linear.run_floats());
      if (!scratch[i].acc || !scratch[i].rotated) return PCDVQ_NO_MEMORY;
    }
#pragma omp parallel num_threads(threads)
    work(scratch[thread_index()]);
    return PCDVQ_OK;
  }
};

}  // namespace
}  // namespace pcdvq
