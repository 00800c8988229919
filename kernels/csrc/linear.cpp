// Driver of pcdvq_linear: threads, blocking, scratch. The arithmetic is in the ISA kernels.
#include <algorithm>
#include <cstdlib>
#include <memory>

#include "isa.h"
#include "numeric.h"
#include "threads.h"

namespace pcdvq {
namespace {

// Activation rows that share a decode: at 256 rows decoding costs a few percent of the FMAs, and
// a thread's accumulators (256 x 24 x lanes floats) stay in L2.
constexpr int64_t kBlockRows = 256;
// Columns of one unit of the rotation, at least a Hadamard block.
constexpr int64_t kRotateColumns = 1024;

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float[], Free>;

Buffer allocate(int64_t floats) {
  return Buffer(static_cast<float*>(std::aligned_alloc(64, size_t((floats + 15) / 16 * 64))));
}

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

struct Linear {
  const PcdvqLinear& p;
  const Kernels& kernels;
  const Decoder decoder;
  const int64_t x_stride;  // of the rotated activations
  const int64_t acc_floats, thread_floats;

  Linear(const PcdvqLinear& problem, const Kernels& k)
      : p(problem),
        kernels(k),
        decoder(k.decoder(problem.layout)),
        // 256 modulo 1024 floats where tiles read, or four rows would share the same L1 sets.
        x_stride(problem.m <= kFusedRows ? round_up(problem.k, 16)
                                         : round_up(problem.k, 1024) + 256),
        acc_floats(std::min(problem.m, kBlockRows) * kPanelRows * k.lanes),
        thread_floats(acc_floats + kPanelRows * kPanelColumns) {}

  int64_t panels() const { return (p.n + kPanelRows - 1) / kPanelRows; }

  int64_t rotate_run() const {
    const int64_t block = p.layout.hadamard_block;
    return std::max(block, kRotateColumns / block * block);
  }

  int64_t rotate_units() const { return (p.k + rotate_run() - 1) / rotate_run(); }

  // Unit `unit` of activation row m into its row of the rotated block.
  void rotate(int64_t m, int64_t unit, float* row) const {
    const int64_t first = unit * rotate_run();
    const int64_t columns = std::min(rotate_run(), p.k - first);
    const int64_t element = p.x_dtype == PCDVQ_F32 ? 4 : 2;
    const char* x = static_cast<const char*>(p.x) + (m * p.k + first) * element;
    kernels.rotate(x, p.x_dtype, p.signs_in + first / 8, columns, p.layout.hadamard_block,
                   row + first);
    if (first + columns == p.k) std::fill(row + p.k, row + round_up(p.k, kernels.lanes), 0.0f);
  }

  // Every thread makes its own table, in its own L1: less work than fetching another thread's.
  Weights make_weights(int8_t* table) const {
    if (!decoder.expand) return {p.qweight, p.codewords, p.row_bytes, p.layout};
    decoder.expand(p.codewords, table);
    return {p.qweight, table, p.row_bytes, p.layout};
  }

  void write(float sum, int64_t m, int64_t n) const {
    float y = sum * p.row_scale[n];
    if (p.bias) y += load_element(p.bias, p.bias_dtype, n);
    store_element(p.out, p.x_dtype, m * p.n + n, y);
  }

  // Outputs [0, m) x [n0, n0 + kPanelRows), m <= kFusedRows.
  void fused(const Weights& weights, const float* x, int64_t n0) const {
    const int64_t panel_rows = std::min(kPanelRows, p.n - n0);
    float sums[kFusedRows * kPanelRows];
    decoder.fused(weights, n0, panel_rows, x, x_stride, p.m, p.k / 8, sums);
    for (int64_t i = 0; i < p.m; ++i) {
      for (int64_t r = 0; r < panel_rows; ++r) write(sums[i * panel_rows + r], i, n0 + r);
    }
  }

  // Outputs [m0, m0 + rows) x [n0, n0 + kPanelRows).
  void panel(const Weights& weights, const float* x, int64_t m0, int64_t rows, int64_t n0,
             float* scratch) const {
    const int64_t panel_rows = std::min(kPanelRows, p.n - n0);
    float* acc = scratch;
    float* levels = scratch + acc_floats;
    std::fill(acc, acc + rows * kPanelRows * kernels.lanes, 0.0f);
    for (int64_t k = 0; k < p.k; k += kPanelColumns) {
      const int64_t columns = std::min(kPanelColumns, p.k - k);
      const int64_t padded = round_up(columns, kernels.lanes);
      decoder.decode(weights, n0, panel_rows, k / 8, columns / 8, levels);
      for (int64_t r = 0; r < panel_rows && padded > columns; ++r) {
        float* row = levels + r * kPanelColumns;
        std::fill(row + columns, row + padded, 0.0f);
      }
      kernels.accumulate(x + k, x_stride, rows, levels, panel_rows, padded, acc);
    }
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t r = 0; r < panel_rows; ++r) {
        write(kernels.reduce(acc + (i * kPanelRows + r) * kernels.lanes), m0 + i, n0 + r);
      }
    }
  }

  // A few activation rows: every thread rotates all of them for itself, which takes less time than
  // a barrier after a shared rotation.
  PcdvqStatus run_fused(int threads) const {
    const int64_t units = rotate_units();
    const Buffer rotated = allocate(threads * p.m * x_stride);
    if (!rotated) return PCDVQ_NO_MEMORY;
#pragma omp parallel num_threads(threads)
    {
      alignas(64) int8_t table[kTableBytes];
      const Weights weights = make_weights(table);
      float* mine = rotated.get() + thread_index() * p.m * x_stride;
      for (int64_t i = 0; i < p.m * units; ++i) {
        rotate(i / units, i % units, mine + i / units * x_stride);
      }
#pragma omp for schedule(dynamic) nowait
      for (int64_t i = 0; i < panels(); ++i) fused(weights, mine, i * kPanelRows);
    }
    return PCDVQ_OK;
  }

  PcdvqStatus run_panels(int threads) const {
    const int64_t units = rotate_units();
    const Buffer rotated = allocate(std::min(p.m, kBlockRows) * x_stride);
    const Buffer scratch = allocate(threads * thread_floats);
    if (!rotated || !scratch) return PCDVQ_NO_MEMORY;
    // A tile at the end of N reads panel rows that nobody decoded.
    std::fill(scratch.get(), scratch.get() + threads * thread_floats, 0.0f);
#pragma omp parallel num_threads(threads)
    {
      alignas(64) int8_t table[kTableBytes];
      const Weights weights = make_weights(table);
      float* mine = scratch.get() + thread_index() * thread_floats;
      for (int64_t m0 = 0; m0 < p.m; m0 += kBlockRows) {
        const int64_t rows = std::min(kBlockRows, p.m - m0);
        if (m0 > 0) {  // other threads may still read the rows rotated before
#pragma omp barrier
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows * units; ++i) {
          rotate(m0 + i / units, i % units, rotated.get() + i / units * x_stride);
        }
#pragma omp for schedule(dynamic) nowait
        for (int64_t i = 0; i < panels(); ++i) {
          panel(weights, rotated.get(), m0, rows, i * kPanelRows, mine);
        }
      }
    }
    return PCDVQ_OK;
  }

  PcdvqStatus run() const {
    const int threads = int(std::max<int64_t>(1, std::min<int64_t>(p.threads, panels())));
    return p.m <= kFusedRows ? run_fused(threads) : run_panels(threads);
  }
};

}  // namespace
}  // namespace pcdvq

int32_t pcdvq_linear(const PcdvqLinear* problem) {
  const pcdvq::Kernels* kernels = pcdvq::kernels_for(problem->isa);
  if (!kernels) return PCDVQ_NO_ISA;
  if (problem->m == 0 || problem->n == 0) return PCDVQ_OK;
  return pcdvq::Linear(*problem, *kernels).run();
}
