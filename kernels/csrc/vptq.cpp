// Driver of pcdvq_vptq: tiles of rows, each by one thread. The arithmetic is in the ISA kernels.
#include <algorithm>
#include <numeric>

#include "buffer.h"
#include "isa.h"
#include "numeric.h"
#include "threads.h"

namespace pcdvq {
namespace {

constexpr int64_t kLeastTileRows = 32;
constexpr int64_t kLineBytes = 64;
constexpr int64_t kTokens = 192;  // decoded weights are used for so many

struct Vptq {
  const PcdvqVptq& p;
  const Kernels& kernels;

  // A multiple of the row blocks of all segments.
  int64_t tile_rows() const {
    int64_t rows = 1;
    for (int64_t i = 0; i < p.segment_count; ++i) rows = std::lcm(rows, p.segments[i].vector_len);
    return round_up(kLeastTileRows, rows);
  }

  // Activations of token t as the segments' factors, and their product with `shift`.
  float prepare(int64_t t, float* x) const {
    float shifted = 0;
    for (int64_t c = 0; c < p.k; ++c) {
      shifted += p.shift[c] * load_element(p.x, p.x_dtype, t * p.k + c);
      x[c] = p.scale[c] * load_element(p.x, p.x_dtype, t * p.k + p.columns[c]);
    }
    return shifted;
  }

  // Reads each table in order if at least as many codes as cache lines of it follow: to miss its lines
  // one by one takes longer. (Prefetches in their place are dropped.)
  void read_tables() const {
    const int64_t element = p.table_dtype == PCDVQ_F32 ? 4 : p.table_dtype == PCDVQ_I8 ? 1 : 2;
    for (int64_t i = 0; i < p.segment_count; ++i) {
      const PcdvqVptqSegment& s = p.segments[i];
      const int64_t residuals = s.residual_bits ? int64_t(1) << s.residual_bits : 0;
      const int64_t bytes = ((int64_t(1) << s.index_bits) + residuals) * s.vector_len * element;
      if (p.n / s.vector_len * s.columns < bytes / kLineBytes) continue;
      const char* table = static_cast<const char*>(s.table);
      int64_t sum = 0;
      for (int64_t at = 0; at < bytes; at += kLineBytes) sum += table[at];
      __asm__ volatile("" : : "r"(sum));
    }
  }

  struct Scratch {
    float* panel;  // [kPanelColumns, kStripLanes]
    float* sums;   // [kTokens, kStripLanes]
    float* tile;   // [kTokens, tile_rows]
  };

  // Adds the strip of segment rows [row, ...) to the tile that starts at `start`.
  void add_strip(const VptqStrip& strip, int64_t start, int64_t tile_rows, float* tile) const {
    const int64_t length = strip.segment.vector_len, lanes = length > 8 ? 16 : 8;
    for (int64_t t = 0; t < strip.tokens; ++t) {
      float* to = tile + t * tile_rows + strip.block * length - start;
      for (int64_t b = 0; b < strip.blocks; ++b) {
        const float* from = strip.sums + t * kStripLanes + b * lanes;
        for (int64_t j = 0; j < length; ++j) to[b * length + j] += from[j];
      }
    }
  }

  void compute_tile(int64_t start, int64_t rows, const float* x, int64_t tokens,
                    const Scratch& scratch) const {
    const int64_t end = std::min(start + rows, p.skip + p.n);
    std::fill(scratch.tile, scratch.tile + tokens * rows, 0.0f);
    for (int64_t i = 0; i < p.segment_count; x += p.segments[i++].columns) {
      const PcdvqVptqSegment& segment = p.segments[i];
      const int64_t step = strip_blocks(segment.vector_len);
      const int64_t last = (end + segment.vector_len - 1) / segment.vector_len;
      for (int64_t block = start / segment.vector_len; block < last; block += step) {
        const VptqStrip strip{segment, p.table_dtype, block, std::min(step, last - block), x, p.k,
                              tokens,  scratch.panel, scratch.sums};
        kernels.vptq(strip);
        add_strip(strip, start, rows, scratch.tile);
      }
    }
  }

  void store_tile(int64_t start, int64_t rows, int64_t token, int64_t tokens, const float* shifted,
                  const float* tile) const {
    const int64_t end = std::min(start + rows, p.skip + p.n);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t row = std::max(start, p.skip); row < end; ++row) {
        float y = tile[t * rows + row - start] + shifted[token + t];
        const int64_t n = row - p.skip;
        if (p.bias) y += load_element(p.bias, p.bias_dtype, n);
        store_element(p.out, p.x_dtype, (token + t) * p.n + n, y);
      }
    }
  }

  // Whether every entry of `columns` is a column of x.
  bool known_columns() const {
    uint32_t most = 0;  // an entry below 0 is over any
    for (int64_t c = 0; c < p.k; ++c) most = std::max(most, uint32_t(p.columns[c]));
    return most < uint64_t(p.k);
  }

  PcdvqStatus run() const {
    if (!known_columns()) return PCDVQ_BAD_ID;
    const int64_t rows = tile_rows(), tiles = (p.skip + p.n + rows - 1) / rows;
    const int threads = int(std::clamp<int64_t>(tiles, 1, p.threads));
    const int64_t token_floats = round_up(kTokens * (kStripLanes + rows), 16);
    const int64_t scratch_floats = kPanelColumns * kStripLanes + token_floats;
    const Buffer<float> x = allocate<float>(p.m * p.k), shifted = allocate<float>(p.m);
    const Buffer<float> scratch = allocate<float>(threads * scratch_floats);
    if (!x || !shifted || !scratch) return PCDVQ_NO_MEMORY;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
      for (int64_t t = 0; t < p.m; ++t) shifted[t] = prepare(t, x.get() + t * p.k);
      read_tables();
      float* own = scratch.get() + thread_index() * scratch_floats;
      float* sums = own + kPanelColumns * kStripLanes;
      const Scratch parts{own, sums, sums + kTokens * kStripLanes};
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < tiles; ++i) {
        for (int64_t token = 0; token < p.m; token += kTokens) {
          const int64_t tokens = std::min(kTokens, p.m - token);
          compute_tile(i * rows, rows, x.get() + token * p.k, tokens, parts);
          store_tile(i * rows, rows, token, tokens, shifted.get(), parts.tile);
        }
      }
    }
    return PCDVQ_OK;
  }
};

}  // namespace
}  // namespace pcdvq

int32_t pcdvq_vptq(const PcdvqVptq* problem) {
  const pcdvq::Kernels* kernels = pcdvq::kernels_for(problem->isa);
  if (!kernels) return PCDVQ_NO_ISA;
  if (problem->m == 0 || problem->n == 0) return PCDVQ_OK;
  return pcdvq::Vptq{*problem, *kernels}.run();
}
