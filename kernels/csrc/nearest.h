// Nearest codewords, vectorised across groups. Included once per instruction set, after its `Vec`.
#pragma once

#include "isa.h"

namespace pcdvq {
namespace {

// Codewords [first, last) against Vec::kLanes groups whose coordinates are columns of x
// [DIM, kNearestGroups]; best_score and best_index hold the best of the earlier codewords.
template <int DIM>
inline void nearest_lanes(const float* x, const PcdvqNearest& p, int64_t first, int64_t last,
                          float* best_score, int32_t* best_index) {
  Vec coordinate[DIM];
  for (int j = 0; j < DIM; ++j) coordinate[j] = Vec::load(x + j * kNearestGroups);
  Vec score = Vec::load(best_score);
  Index index = Index::load(best_index);
  const auto score_of = [&](int64_t c) __attribute__((always_inline)) {
    Vec s = Vec::broadcast(-p.bias[c]);
    for (int j = 0; j < DIM; ++j) {
      s = fma(coordinate[j], Vec::broadcast(p.codewords[c * DIM + j]), s);
    }
    return s;
  };
  int64_t c = first;
  for (; c + 4 <= last; c += 4) {  // four independent chains of FMAs
    const Vec s0 = score_of(c), s1 = score_of(c + 1), s2 = score_of(c + 2), s3 = score_of(c + 3);
    take_greater(s0, int32_t(c), score, index);
    take_greater(s1, int32_t(c + 1), score, index);
    take_greater(s2, int32_t(c + 2), score, index);
    take_greater(s3, int32_t(c + 3), score, index);
  }
  for (; c < last; ++c) take_greater(score_of(c), int32_t(c), score, index);
  score.store(best_score);
  index.store(best_index);
}

// A block of groups goes through the codewords in runs that stay in L1.
template <int DIM>
void nearest_block(const PcdvqNearest& p, int64_t first, int64_t groups) {
  constexpr int64_t kRun = 2048 / DIM;
  alignas(64) float x[DIM * kNearestGroups] = {};
  alignas(64) float best_score[kNearestGroups];
  alignas(64) int32_t best_index[kNearestGroups] = {};
  for (int64_t i = 0; i < kNearestGroups; ++i) best_score[i] = -__builtin_inff();
  for (int64_t i = 0; i < groups; ++i) {
    for (int j = 0; j < DIM; ++j) x[j * kNearestGroups + i] = p.x[(first + i) * DIM + j];
  }
  for (int64_t c = 0; c < p.count; c += kRun) {
    const int64_t last = c + kRun < p.count ? c + kRun : p.count;
    for (int64_t i = 0; i < groups; i += Vec::kLanes) {
      nearest_lanes<DIM>(x + i, p, c, last, best_score + i, best_index + i);
    }
  }
  for (int64_t i = 0; i < groups; ++i) p.out[first + i] = best_index[i];
}

void nearest(const PcdvqNearest& p, int64_t first, int64_t groups) {
  if (p.dim == 8) nearest_block<8>(p, first, groups);
  if (p.dim == 4) nearest_block<4>(p, first, groups);
  if (p.dim == 2) nearest_block<2>(p, first, groups);
}

}  // namespace
}  // namespace pcdvq
