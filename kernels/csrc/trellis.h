// Viterbi search of the trellis codec (FORMAT.md), vectorised across chains: a chain is one column
// group in the rows of one segment. Included once per instruction set, after its `Vec`.
#pragma once

#include "isa.h"

namespace pcdvq {
namespace {

// Chains of one unit of work: a few vectors of them share each read of the codewords.
constexpr int64_t kUnitChains = 4 * Vec::kLanes;

// State of the search. Scores are to be maximised: of a path, the sum over its rows of
// weight * (y . c - |c|^2 / 2), where y is the group folded into the orthant of the codewords.
struct Chains {
  alignas(64) float y[kSegmentRows][2][8][kUnitChains];  // times weight; by parity of the signs
  alignas(64) float weight[kSegmentRows][kUnitChains];
  alignas(64) float score[2][kMaxStates][kUnitChains];  // of the best path into a state
  alignas(64) int32_t best[kSegmentRows][kMaxStates][kUnitChains];  // its last codeword
  uint8_t signs[kSegmentRows][2][kUnitChains];
};

// Folds one group. A group whose signs have the other parity pays by storing its smallest
// coordinate with the wrong sign.
template <int DIM, bool PARITY>
inline void fold(const float* x, float weight, int64_t t, int64_t lane, Chains& chains) {
  uint32_t signs = 0, smallest = 0;
  float y[DIM];
  for (int j = 0; j < DIM; ++j) {
    y[j] = x[j] < 0 ? -x[j] : x[j];
    signs |= uint32_t(x[j] < 0) << j;
    if (y[j] < y[smallest]) smallest = uint32_t(j);
  }
  const uint32_t odd = PARITY ? kSignMasks.parity[signs] : 0;
  for (int j = 0; j < DIM; ++j) chains.y[t][odd][j][lane] = y[j] * weight;
  chains.signs[t][odd][lane] = uint8_t(signs);
  if (!PARITY) return;
  y[smallest] = -y[smallest];
  for (int j = 0; j < DIM; ++j) chains.y[t][1 - odd][j][lane] = y[j] * weight;
  chains.signs[t][1 - odd][lane] = uint8_t(signs ^ 1u << smallest);
}

// Extends the best paths of one vector of chains by `count` codewords from index `first` on, all
// of one parity, `stride` apart, that leave a state of score `before`.
template <int DIM>
inline void extend(const PcdvqTrellis& p, int64_t first, int64_t count, int64_t stride,
                   const float* y, Vec weight, Vec before, Vec& score, Index& best) {
  Vec coordinate[DIM];
  for (int j = 0; j < DIM; ++j) coordinate[j] = Vec::load(y + j * kUnitChains);
  const auto score_of = [&](int64_t c) __attribute__((always_inline)) {
    Vec s = fma(weight, Vec::broadcast(-p.bias[c]), before);
    for (int j = 0; j < DIM; ++j) {
      s = fma(coordinate[j], Vec::broadcast(p.codewords[c * DIM + j]), s);
    }
    return s;
  };
  int64_t c = first;
  const int64_t last = first + count * stride;
  for (; c + 3 * stride < last; c += 4 * stride) {  // four independent chains of FMAs
    const Vec s0 = score_of(c), s1 = score_of(c + stride), s2 = score_of(c + 2 * stride),
              s3 = score_of(c + 3 * stride);
    take_greater(s0, int32_t(c), score, best);
    take_greater(s1, int32_t(c + stride), score, best);
    take_greater(s2, int32_t(c + 2 * stride), score, best);
    take_greater(s3, int32_t(c + 3 * stride), score, best);
  }
  for (; c < last; c += stride) take_greater(score_of(c), int32_t(c), score, best);
}

// One row: the best paths into every state, from those into the states of the row above.
template <int DIM, bool PARITY>
void step(const PcdvqTrellis& p, int64_t t, int64_t chains_used, Chains& chains) {
  const int64_t states = int64_t(1) << p.state_bits;
  const int64_t from_states = t ? states : 1;
  const int64_t count = int64_t(1) << (p.field_bits - p.state_bits);
  const auto& before = chains.score[t & 1];
  auto& after = chains.score[1 - (t & 1)];
  for (int64_t to = 0; to < states; ++to) {
    for (int64_t i = 0; i < chains_used; ++i) after[to][i] = -__builtin_inff();
    for (int64_t from = 0; from < from_states; ++from) {
      const int64_t first = (from * states + to) * count << PARITY;
      for (int64_t i = 0; i < chains_used; i += Vec::kLanes) {
        const Vec weight = Vec::load(&chains.weight[t][i]), start = Vec::load(&before[from][i]);
        Vec score = Vec::load(&after[to][i]);
        Index best = Index::load(&chains.best[t][to][i]);
        for (int parity = 0; parity < 1 + PARITY; ++parity) {
          extend<DIM>(p, first + parity, count, 1 + PARITY, &chains.y[t][parity][0][i], weight,
                      start, score, best);
        }
        score.store(&after[to][i]);
        best.store(&chains.best[t][to][i]);
      }
    }
  }
}

// Codes [rows, groups] of chains [first, first + count), at most kUnitChains of them.
template <int DIM, bool PARITY>
void search(const PcdvqTrellis& p, int64_t first, int64_t count) {
  Chains chains;
  std::memset(&chains, 0, sizeof(chains));  // rows past the end weigh nothing
  const auto length = [&](int64_t chain) {
    const int64_t left = p.rows - chain / p.groups * kSegmentRows;
    return left < kSegmentRows ? left : kSegmentRows;
  };
  const auto place = [&](int64_t chain, int64_t t) {
    return (chain / p.groups * kSegmentRows + t) * p.groups + chain % p.groups;
  };
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t t = 0; t < length(first + i); ++t) {
      const int64_t at = place(first + i, t);
      const float weight = p.row_weight[at / p.groups];
      chains.weight[t][i] = weight;
      fold<DIM, PARITY>(p.x + at * DIM, weight, t, i, chains);
    }
  }
  const int64_t used = (count + Vec::kLanes - 1) / Vec::kLanes * Vec::kLanes;
  const int64_t steps = length(first);  // a later chain is not longer
  for (int64_t t = 0; t < steps; ++t) step<DIM, PARITY>(p, t, used, chains);
  for (int64_t i = 0; i < count; ++i) {
    int64_t state = 0;
    for (int64_t s = 1; s < int64_t(1) << p.state_bits; ++s) {
      const auto& score = chains.score[steps & 1];
      if (score[s][i] > score[state][i]) state = s;
    }
    for (int64_t t = steps - 1; t >= 0; --t) {
      const int64_t codeword = chains.best[t][state][i];
      const int64_t field = (codeword >> PARITY) & ((int64_t(1) << p.field_bits) - 1);
      const uint8_t signs = chains.signs[t][PARITY ? codeword & 1 : 0][i];
      if (t < length(first + i)) {
        p.out[place(first + i, t)] = int32_t(signs | field << DIM);
      }
      state = codeword >> (p.field_bits + PARITY);
    }
  }
}

template <int DIM>
void search_dim(const PcdvqTrellis& p, int64_t first, int64_t count) {
  (p.parity ? search<DIM, true> : search<DIM, false>)(p, first, count);
}

void trellis(const PcdvqTrellis& p, int64_t first, int64_t count) {
  if (p.dim == 8) search_dim<8>(p, first, count);
  if (p.dim == 4) search_dim<4>(p, first, count);
  if (p.dim == 2) search_dim<2>(p, first, count);
}

}  // namespace
}  // namespace pcdvq
