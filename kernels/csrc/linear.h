// A call of pcdvq_linear: what the drivers of linear.cpp and linear_blocks.h share.
#pragma once

#include <algorithm>
#include <memory>
#include <new>
#include <type_traits>

#include "buffer.h"
#include "isa.h"
#include "numeric.h"
#include "threads.h"

namespace pcdvq {
namespace {

// Activation rows that share a decode: at 256 rows decoding costs a few percent of the products,
// and a thread's accumulators (256 x 24 x lanes floats) stay in L2.
constexpr int64_t kSharingRows = 256;
// Activation rows up to which decoding in registers beats decoding to panels.
constexpr int64_t kDotRows = 8;
// Columns of one unit of the rotation, at least a Hadamard block.
constexpr int64_t kRotateColumns = 1024;

struct Linear {
  const PcdvqLinear& p;
  const Kernels& kernels;
  const Decoder decoder;
  const int64_t units;  // of columns
  const bool floats;    // activations are fp32, else int8 or int16

  Linear(const PcdvqLinear& problem, const Kernels& k)
      : p(problem),
        kernels(k),
        decoder(k.decoder(problem.layout)),
        units((problem.k + kUnitColumns - 1) / kUnitColumns),
        floats(problem.layout.activations == PCDVQ_FLOAT) {}

  float limit() const { return p.layout.activations == PCDVQ_INT8 ? 127.0f : 32767.0f; }

  int64_t panels() const { return (p.n + kPanelRows - 1) / kPanelRows; }

  int64_t rotate_run() const {
    const int64_t block = p.layout.hadamard_block;
    return std::max(block, kRotateColumns / block * block);
  }

  int64_t rotate_units() const { return (p.k + rotate_run() - 1) / rotate_run(); }

  // Room for a run, padded to whole units.
  int64_t run_floats() const { return round_up(std::min(rotate_run(), p.k), kUnitColumns); }

  // Run `run` of activation row m, rotated, into `out`; returns its columns.
  int64_t rotate(int64_t m, int64_t run, float* out) const {
    const int64_t first = run * rotate_run();
    const int64_t columns = std::min(rotate_run(), p.k - first);
    const int64_t element = p.x_dtype == PCDVQ_F32 ? 4 : 2;
    const char* x = static_cast<const char*>(p.x) + (m * p.k + first) * element;
    kernels.rotate(x, p.x_dtype, p.signs_in + first / 8, columns, p.layout.hadamard_block, out);
    return columns;
  }

  Weights weights() const {
    return {p.qweight, p.codewords, p.n, p.k, p.row_bytes, p.layout, p.packed != 0};
  }

  // Fetches the codes of weight rows [n0, n0 + rows), `count` parts of a row's `parts` from part `part`
  // on: the hardware does not follow as many rows. Addresses past the end of the weights are harmless.
  void prefetch(int64_t n0, int64_t rows, int64_t part, int64_t count, int64_t parts) const {
    const int64_t first = part * p.row_bytes / parts;
    const int64_t last = first + count * p.row_bytes / parts;
    for (int64_t r = 0; r < rows; ++r) {
      const uint8_t* row = p.qweight + (n0 + r) * p.row_bytes;
      for (int64_t byte = first; byte < last; byte += 64) __builtin_prefetch(row + byte);
    }
  }

  void write(float sum, int64_t m, int64_t n) const {
    float y = sum * p.row_scale[n];
    if (p.bias) y += load_element(p.bias, p.bias_dtype, n);
    store_element(p.out, p.x_dtype, m * p.n + n, y);
  }

  PcdvqStatus run_dot(int threads) const;
  PcdvqStatus run() const;
};

}  // namespace
}  // namespace pcdvq
