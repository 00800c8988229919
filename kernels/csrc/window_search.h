// Viterbi search of codec `compact` (FORMAT.md, "Windows"), a coordinate at a time, vectorised across
// chains: a chain is one column group in the rows of one segment. Included once per instruction set,
// after its `Vec`.
#pragma once

#include "isa.h"
#include "windows.h"

namespace pcdvq {
namespace {

constexpr int kMostWindowStates = 1 << older_bits(0);

// State of the search, of a vector of chains. Scores as in trellis.h.
struct WindowChains {
  alignas(64) float y[kSegmentRows][kWindowDim][Vec::kLanes];  // times weight
  alignas(64) float weight[kSegmentRows][Vec::kLanes];
  alignas(64) float score[2][kMostWindowStates][Vec::kLanes];  // of the best path into a state
  // Its last row of the table.
  alignas(64) int32_t best[kSegmentRows][kWindowDim][kMostWindowStates][Vec::kLanes];
};

// The table, and half of its squares: a score is least what they are apart.
struct WindowTable {
  float level[kWindowRows][kWindowDim], bias[kWindowRows][kWindowDim];
};

// The best paths into every state after coordinate j of row t.
template <int EXTRA>
void window_step(const WindowTable& table, int64_t t, int j, WindowChains& chains) {
  constexpr int kOlder = older_bits(EXTRA), kStates = 1 << kOlder;
  const auto& before = chains.score[j % 2];
  auto& after = chains.score[1 - j % 2];
  const Vec y = Vec::load(chains.y[t][j]), weight = Vec::load(chains.weight[t]);
  for (int to = 0; to < kStates; ++to) {
    Vec score = Vec::broadcast(-__builtin_inff());
    Index best = Index::load(chains.best[t][j][to]);
    for (int i = 0; i < 4; ++i) {
      // Windows that lead there. The last bit of a row is in no state.
      const int window = j < 3 ? to << 2 | i : i >> 1 << (kOlder + 1) | to << 1 | (i & 1);
      const Vec from = Vec::load(before[window & (kStates - 1)]);
      for (int extra = 0; extra < 1 << EXTRA; ++extra) {
        const int row = window | extra << (kOlder + 2);
        const Vec base = fma(weight, Vec::broadcast(-table.bias[row][j]), from);
        take_greater(fma(y, Vec::broadcast(table.level[row][j]), base), row, score, best);
      }
    }
    score.store(after[to]);
    best.store(chains.best[t][j][to]);
  }
}

// The code whose coordinates select these rows of the table.
template <int EXTRA>
int32_t window_code(const int (&rows)[kWindowDim]) {
  uint32_t stream = 0, extra = 0;
  for (int j = 0; j < kWindowDim; ++j) {
    stream |= uint32_t(rows[j] >> older_bits(EXTRA) & 3) << (2 * j);
    extra |= uint32_t(rows[j] >> (older_bits(EXTRA) + 2)) << (EXTRA * j);
  }
  return int32_t(((stream << 1 & 255) | stream >> 7) << (kWindowDim * EXTRA) | extra);
}

// Codes [rows, groups] of chains [first, first + count), at most Vec::kLanes of them.
template <int EXTRA>
void search_windows(const PcdvqWindows& p, int64_t first, int64_t count) {
  constexpr int kStates = 1 << older_bits(EXTRA);
  WindowChains chains;
  std::memset(&chains, 0, sizeof(chains));  // rows past the end weigh nothing
  WindowTable table;
  for (int i = 0; i < kWindowRows * kWindowDim; ++i) {
    table.level[i / kWindowDim][i % kWindowDim] = p.table[i];
    table.bias[i / kWindowDim][i % kWindowDim] = p.table[i] * p.table[i] / 2;
  }
  const auto length = [&](int64_t chain) {
    return smaller(kSegmentRows, p.rows - chain / p.groups * kSegmentRows);
  };
  const auto place = [&](int64_t chain, int64_t t) {
    return (chain / p.groups * kSegmentRows + t) * p.groups + chain % p.groups;
  };
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t t = 0; t < length(first + i); ++t) {
      const int64_t at = place(first + i, t);
      const float weight = p.row_weight[at / p.groups];
      chains.weight[t][i] = weight;
      for (int j = 0; j < kWindowDim; ++j) {
        chains.y[t][j][i] = p.x[at * kWindowDim + j] * weight;
      }
    }
    for (int s = 1; s < kStates; ++s) chains.score[0][s][i] = -__builtin_inff();
  }
  const int64_t steps = length(first);  // a later chain is not longer
  for (int64_t t = 0; t < steps; ++t) {
    for (int j = 0; j < kWindowDim; ++j) window_step<EXTRA>(table, t, j, chains);
  }
  for (int64_t i = 0; i < count; ++i) {
    int state = 0;
    for (int s = 1; s < kStates; ++s) {
      if (chains.score[0][s][i] > chains.score[0][state][i]) state = s;
    }
    for (int64_t t = steps - 1; t >= 0; --t) {
      int rows[kWindowDim];
      for (int j = kWindowDim - 1; j >= 0; --j) {
        rows[j] = chains.best[t][j][state][i];
        state = rows[j] & (kStates - 1);
      }
      if (t < length(first + i)) p.out[place(first + i, t)] = window_code<EXTRA>(rows);
    }
  }
}

void window_search(const PcdvqWindows& p, int64_t first, int64_t count) {
  const int extra = extra_bits(p.code_bits);
  if (extra == 0) search_windows<0>(p, first, count);
  if (extra == 1) search_windows<1>(p, first, count);
  if (extra == 2) search_windows<2>(p, first, count);
}

}  // namespace
}  // namespace pcdvq
