// Driver of pcdvq_linear: threads, blocking, scratch. The arithmetic is in the ISA kernels.
#include "linear_blocks.h"

namespace pcdvq {
namespace {

// One row of int8 activations: weights are decoded in registers. Every thread rotates the row for
// itself, which takes less time than a barrier after a shared rotation.
PcdvqStatus Linear::run_dot(int threads) const {
  const int64_t levels_floats = units * kUnitColumns / 2;  // a level and its negative per column
  const int64_t thread_floats = round_up(levels_floats + units * 8 + run_floats(), 16);
  const Buffer<float> scratch = allocate<float>(threads * thread_floats);
  if (!scratch) return PCDVQ_NO_MEMORY;
#pragma omp parallel num_threads(threads)
  {
    const Weights w = weights();
    float* mine = scratch.get() + thread_index() * thread_floats;
    int8_t* levels = reinterpret_cast<int8_t*>(mine);
    float* scales = mine + levels_floats;
    float* rotated = scales + units * 8;
    for (int64_t i = 0; i < rotate_units(); ++i) {
      const int64_t first = i * rotate_run();
      const int64_t columns = rotate(0, i, rotated);
      float* scale = scales + first / kUnitColumns * 8;
      kernels.quantize_int8(rotated, columns, levels + 2 * first, scale);
    }
#pragma omp for schedule(dynamic) nowait
    for (int64_t i = 0; i < panels(); ++i) {
      const int64_t n0 = i * kPanelRows, rows = std::min(kPanelRows, p.n - n0);
      float sums[kPanelRows];
      decoder.dot(w, n0, rows, {levels, scales}, sums);
      for (int64_t r = 0; r < rows; ++r) write(sums[r], 0, n0 + r);
    }
  }
  return PCDVQ_OK;
}

// A few rows of int8 or int16 activations, up to 8 of which share a decode in registers.
struct Dots {
  const Linear& linear;
  const PcdvqLinear& p;
  static constexpr int64_t kMost = 8;
  const int64_t level_count, scale_count;  // of a row
  Buffer<int16_t> levels;                  // [m, level_count], in chunks of interleaved rows
  Buffer<float> scales;                    // [m, scale_count], likewise
  Buffer<float> rotated;                   // of each thread a run

  Dots(const Linear& l, int threads)
      : linear(l),
        p(l.p),
        level_count(l.units * kUnitColumns),
        scale_count(l.units * 8),
        levels(allocate<int16_t>(round_up(l.p.m, kMost) * level_count)),
        scales(allocate<float>(round_up(l.p.m, kMost) * scale_count)),
        rotated(allocate<float>(threads * l.run_floats())) {}

  // Rows of the chunk that starts at row m0: 1, 2, 4 or 8 of which some may be padding.
  int64_t chunk_rows(int64_t m0) const {
    int64_t rows = 1;
    while (rows < std::min(kMost, p.m - m0)) rows *= 2;
    return rows;
  }

  WordRows chunk(int64_t m0) const {
    const int64_t rows = chunk_rows(m0);
    return {levels.get() + m0 * level_count, scales.get() + m0 * scale_count, 32 * rows, 8 * rows};
  }

  void prepare(int64_t m, int64_t run, float* buffer) const {
    const int64_t columns = linear.rotate(m, run, buffer);
    const int64_t unit = run * linear.rotate_run() / kUnitColumns;
    WordRows out = chunk(m - m % kMost);
    out.levels += unit * kUnitVectors * out.vector_stride + m % kMost * 32;
    out.scales += unit * out.scale_stride + m % kMost * 8;
    linear.kernels.quantize_int16(buffer, columns, linear.limit(), out);
  }

  // Outputs [0, m) x [n0, n0 + kPanelRows).
  void panel(const Weights& weights, int64_t n0) const {
    const int64_t panel_rows = std::min(kPanelRows, p.n - n0);
    for (int64_t m0 = 0; m0 < p.m; m0 += kMost) {
      float sums[kMost * kPanelRows];
      linear.decoder.dots(weights, n0, panel_rows, chunk(m0), chunk_rows(m0), sums);
      for (int64_t i = 0; i < std::min(kMost, p.m - m0); ++i) {
        for (int64_t r = 0; r < panel_rows; ++r) {
          linear.write(sums[i * kPanelRows + r], m0 + i, n0 + r);
        }
      }
    }
  }

  PcdvqStatus run(int threads) const {
    if (!levels || !scales || !rotated) return PCDVQ_NO_MEMORY;
    std::fill(levels.get(), levels.get() + round_up(p.m, kMost) * level_count, int16_t(0));
    std::fill(scales.get(), scales.get() + round_up(p.m, kMost) * scale_count, 0.0f);
    const int64_t runs = linear.rotate_units();
#pragma omp parallel num_threads(threads)
    {
      const Weights weights = linear.weights();
      float* buffer = rotated.get() + thread_index() * linear.run_floats();
#pragma omp for schedule(static)
      for (int64_t i = 0; i < p.m * runs; ++i) prepare(i / runs, i % runs, buffer);
#pragma omp for schedule(dynamic) nowait
      for (int64_t i = 0; i < linear.panels(); ++i) panel(weights, i * kPanelRows);
    }
    return PCDVQ_OK;
  }
};

// Any number of activation rows: weights are decoded to panels that all of a block share.
// T: float, or int16_t for activations of int8 and int16.
template <class T>
struct Panels {
  const Linear& linear;
  const PcdvqLinear& p;
  const Kernels& kernels;
  static constexpr bool kFloats = std::is_same_v<T, float>;
  const int64_t lanes, block_rows;
  // 1 KB modulo 4 KB where tiles read, or four rows would share the same L1 sets.
  const int64_t x_stride;
  const int64_t scale_stride;
  Buffer<T> x;  // [block_rows, x_stride]
  Buffer<float> scales;

  // Of a thread.
  struct Scratch {
    alignas(64) int8_t levels[kPanelRows * kPanelColumns];
    alignas(64) T panel[kPanelRows * kPanelColumns];
    Buffer<float> acc;      // [block_rows, kPanelRows, lanes]
    Buffer<float> rotated;  // a run
  };

  explicit Panels(const Linear& l)
      : linear(l),
        p(l.p),
        kernels(l.kernels),
        lanes(kFloats ? l.kernels.lanes : 8),
        block_rows(std::min(l.p.m, kSharingRows)),
        x_stride((round_up(l.p.k * sizeof(T), 4096) + 1024) / sizeof(T)),
        scale_stride(l.units * 8),
        x(allocate<T>(block_rows * x_stride)),
        scales(allocate<float>(kFloats ? 0 : block_rows * scale_stride)) {}

  // Run `run` of activation row m into row `row` of the block.
  void prepare(int64_t m, int64_t run, int64_t row, float* rotated) const {
    const int64_t first = run * linear.rotate_run();
    const int64_t columns = linear.rotate(m, run, rotated);
    T* out = x.get() + row * x_stride + first;
    if constexpr (kFloats) {
      kernels.order_floats(rotated, columns, out);
    } else {
      float* scale = scales.get() + row * scale_stride + first / kUnitColumns * 8;
      kernels.quantize_int16(rotated, columns, linear.limit(), {out, scale, 32, 8});
    }
  }

  // Outputs [m0, m0 + rows) x [n0, n0 + kPanelRows).
  void panel(const Weights& weights, int64_t m0, int64_t rows, int64_t n0, Scratch& s) const {
    const int64_t panel_rows = std::min(kPanelRows, p.n - n0);
    std::fill(s.acc.get(), s.acc.get() + rows * kPanelRows * lanes, 0.0f);
    constexpr int64_t kUnits = kPanelColumns / kUnitColumns;
    for (int64_t u = 0; u < linear.units; u += kUnits) {
      const int64_t count = std::min(kUnits, linear.units - u);
      linear.prefetch(n0, panel_rows, u + kUnits, kUnits, linear.units);
      linear.decoder.decode(weights, n0, panel_rows, u, count, s.levels);
      if constexpr (kFloats) {
        kernels.to_floats(s.levels, panel_rows * kPanelColumns, s.panel);
      } else {
        kernels.to_int16(s.levels, panel_rows * kPanelColumns, s.panel);
      }
      const Tiles tiles = {x.get() + u * kUnitColumns, x_stride, scales.get() + u * 8,
                           scale_stride, rows, s.panel, panel_rows, count, s.acc.get()};
      (kFloats ? kernels.accumulate : kernels.accumulate_int)(tiles);
    }
    const auto reduce = kFloats ? kernels.reduce : kernels.reduce_int;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t r = 0; r < panel_rows; ++r) {
        linear.write(reduce(s.acc.get() + (i * kPanelRows + r) * lanes), m0 + i, n0 + r);
      }
    }
  }

  // What every thread does.
  void work(Scratch& s) const {
    const int64_t runs = linear.rotate_units();
    const Weights weights = linear.weights();
    for (int64_t m0 = 0; m0 < p.m; m0 += block_rows) {
      const int64_t rows = std::min(block_rows, p.m - m0);
      if (m0 > 0) {  // other threads may still read the rows rotated before
#pragma omp barrier
      }
#pragma omp for schedule(static)
      for (int64_t i = 0; i < rows * runs; ++i) {
        prepare(m0 + i / runs, i % runs, i / runs, s.rotated.get());
      }
#pragma omp for schedule(dynamic) nowait
      for (int64_t i = 0; i < linear.panels(); ++i) panel(weights, m0, rows, i * kPanelRows, s);
    }
  }

  PcdvqStatus run(int threads) const {
    // Zeros, because a tile at the end of N reads panel rows that nobody decoded.
    const std::unique_ptr<Scratch[]> scratch(new (std::nothrow) Scratch[size_t(threads)]());
    if (!x || !scales || !scratch) return PCDVQ_NO_MEMORY;
    for (int i = 0; i < threads; ++i) {
      scratch[i].acc = allocate<float>(block_rows * kPanelRows * lanes);
      scratch[i].rotated = allocate<float>(linear.run_floats());
      if (!scratch[i].acc || !scratch[i].rotated) return PCDVQ_NO_MEMORY;
    }
#pragma omp parallel num_threads(threads)
    work(scratch[thread_index()]);
    return PCDVQ_OK;
  }
};

PcdvqStatus Linear::run() const {
  const int threads = int(std::max<int64_t>(1, std::min<int64_t>(p.threads, panels())));
  if (Blocks::takes(p, kernels)) return Blocks(*this, threads).run(threads);
  if (p.packed) return PCDVQ_NO_ISA;
  if (floats) return Panels<float>(*this).run(threads);
  if (p.m > kDotRows || !decoder.dots) return Panels<int16_t>(*this).run(threads);
  const bool bytes = p.m == 1 && p.layout.activations == PCDVQ_INT8 && decoder.dot;
  return bytes ? run_dot(threads) : Dots(*this, threads).run(threads);
}

}  // namespace
}  // namespace pcdvq

int32_t pcdvq_linear(const PcdvqLinear* problem) {
  const pcdvq::Kernels* kernels = pcdvq::kernels_for(problem->isa);
  if (!kernels) return PCDVQ_NO_ISA;
  if (problem->m == 0 || problem->n == 0) return PCDVQ_OK;
  return pcdvq::Linear(*problem, *kernels).run();
}
