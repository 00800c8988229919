// Driver of pcdvq_moe: tokens by expert, and what lies between two linear layers of an expert.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "buffer.h"
#include "numeric.h"
#include "pcdvq.h"

namespace pcdvq {
namespace {

struct Moe {
  const PcdvqMoe& p;
  const int64_t assignments, hidden, inner;
  // Assignments (token * top_k + choice) by expert, in their own order within each.
  Buffer<int64_t> starts;  // [experts + 1]
  Buffer<int64_t> order;   // [assignments]
  int64_t most = 0;        // assignments of one expert

  explicit Moe(const PcdvqMoe& problem)
      : p(problem),
        assignments(p.tokens * p.top_k),
        hidden(p.gate_up.k),
        inner(p.down.k),
        starts(allocate<int64_t>(p.experts + 1)),
        order(allocate<int64_t>(assignments)) {}

  bool here(int64_t assignment) const { return p.ids[assignment] >= 0; }

  // False, with nothing sorted, if an id is none of the experts'.
  bool sort() {
    for (int64_t a = 0; a < assignments; ++a) {
      if (p.ids[a] >= p.experts) return false;
    }
    std::fill(starts.get(), starts.get() + p.experts + 1, int64_t(0));
    for (int64_t a = 0; a < assignments; ++a) {
      if (here(a)) ++starts[p.ids[a] + 1];
    }
    for (int64_t e = 0; e < p.experts; ++e) {
      most = std::max(most, starts[e + 1]);
      starts[e + 1] += starts[e];
    }
    for (int64_t a = 0; a < assignments; ++a) {
      if (here(a)) order[starts[p.ids[a]]++] = a;
    }
    // Each start has moved to its end, which is the next one's start.
    std::copy_backward(starts.get(), starts.get() + p.experts, starts.get() + p.experts + 1);
    starts[0] = 0;
    return true;
  }

  PcdvqStatus linear(const PcdvqExperts& experts, int64_t expert, const float* x, int64_t rows,
                     float* out) const {
    const int64_t row = expert * experts.n;
    const PcdvqLinear problem = {x,
                                 experts.qweight + row * experts.row_bytes,
                                 experts.row_scale + row,
                                 experts.signs_in,
                                 p.codewords,
                                 nullptr,
                                 out,
                                 rows,
                                 experts.n,
                                 experts.k,
                                 experts.row_bytes,
                                 0,
                                 experts.layout,
                                 PCDVQ_F32,
                                 PCDVQ_F32,
                                 p.threads,
                                 p.isa};
    return PcdvqStatus(pcdvq_linear(&problem));
  }

  void gather(const int64_t* which, int64_t rows, float* x) const {
#pragma omp parallel for num_threads(p.threads) if (rows > 1)
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t first = which[i] / p.top_k * hidden;
      for (int64_t j = 0; j < hidden; ++j) {
        x[i * hidden + j] = load_element(p.x, p.dtype, first + j);
      }
    }
  }

  // silu(gate) * up of [rows, gate and up] into [rows, inner].
  void activate(const float* gate_up, int64_t rows, float* out) const {
#pragma omp parallel for num_threads(p.threads) if (rows > 1)
    for (int64_t i = 0; i < rows; ++i) {
      const float* gate = gate_up + i * 2 * inner;
      for (int64_t j = 0; j < inner; ++j) {
        out[i * inner + j] = gate[j] / (1.0f + std::exp(-gate[j])) * gate[inner + j];
      }
    }
  }

  // An expert has a token twice only if a router chose it twice: then one thread must add both.
  void add(const int64_t* which, int64_t rows, const float* y, float* sums) const {
#pragma omp parallel for num_threads(p.threads) if (rows > 1)
    for (int64_t j0 = 0; j0 < hidden; j0 += 64) {
      const int64_t end = std::min(j0 + 64, hidden);
      for (int64_t i = 0; i < rows; ++i) {
        float* sum = sums + which[i] / p.top_k * hidden;
        const float weight = p.weights[which[i]];
        for (int64_t j = j0; j < end; ++j) sum[j] += weight * y[i * hidden + j];
      }
    }
  }

  PcdvqStatus run() {
    if (!starts || !order) return PCDVQ_NO_MEMORY;
    if (!sort()) return PCDVQ_BAD_ID;
    const Buffer<float> sums = allocate<float>(p.tokens * hidden);
    const Buffer<float> outer = allocate<float>(most * hidden);  // of the experts' in- and outputs
    const Buffer<float> both = allocate<float>(most * 2 * inner);
    const Buffer<float> active = allocate<float>(most * inner);
    if (!sums || (most && (!outer || !both || !active))) return PCDVQ_NO_MEMORY;
    std::memset(sums.get(), 0, size_t(p.tokens * hidden) * sizeof(float));
    for (int64_t e = 0; e < p.experts; ++e) {
      const int64_t* which = order.get() + starts[e];
      const int64_t rows = starts[e + 1] - starts[e];
      if (rows == 0) continue;
      gather(which, rows, outer.get());
      if (const auto status = linear(p.gate_up, e, outer.get(), rows, both.get())) return status;
      activate(both.get(), rows, active.get());
      if (const auto status = linear(p.down, e, active.get(), rows, outer.get())) return status;
      add(which, rows, outer.get(), sums.get());
    }
    for (int64_t i = 0; i < p.tokens * hidden; ++i) store_element(p.out, p.dtype, i, sums[i]);
    return PCDVQ_OK;
  }
};

}  // namespace
}  // namespace pcdvq

int32_t pcdvq_moe(const PcdvqMoe* problem) {
  if (problem->tokens == 0) return PCDVQ_OK;
  return pcdvq::Moe(*problem).run();
}
