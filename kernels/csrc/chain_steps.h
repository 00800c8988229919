// A step of the search for codes of the computed trellis (ChainStep). Included once per instruction
// set, after its `Costs`: a vector of int32, one for each of neighbouring paths.
#pragma once

#include "isa.h"

namespace pcdvq {
namespace {

// The least costs of paths [path, path + kLanes) to come, by any choice. RUN: lanes fall into runs of
// 2^RUN paths that differ in new bits alone; HIDDEN: rows tell the windows.
template <int RUN, bool SINGLES, bool HIDDEN, int COUNT>
inline void best_choices(const ChainStep& step, const ChainStep::Chain* chain, int64_t path,
                         Costs (&best)[COUNT]) {
  const int new_bits = step.new_bits;
  const int64_t choices = int64_t(1) << (step.before_bits + new_bits - step.after_bits);
  const int64_t stride = int64_t(1) << (step.after_bits - new_bits);
  const Costs zero = Costs::fill(0), centre = Costs::fill(-kNormOffset);
  const int32_t *before[COUNT], *rows[COUNT];
  Costs target[COUNT], weight[COUNT];
  for (int c = 0; c < COUNT; ++c) {
    before[c] = chain[c].before + (path >> new_bits);
    rows[c] = HIDDEN ? chain[c].rows + (path >> new_bits) : nullptr;
    target[c] = Costs::fill(chain[c].target);
    weight[c] = Costs::fill(chain[c].weight);
    best[c] = Costs::fill(INT32_MAX);
  }
  const int64_t group = path / kWindowGroup * choices;
  const int64_t first = HIDDEN ? path & ((int64_t(1) << new_bits) - 1)
                               : group * kWindowGroup + path % kWindowGroup;
  const int32_t *levels = step.levels + first, *norms = SINGLES ? nullptr : step.norms + first;
  for (int64_t choice = 0; choice < choices; ++choice) {
    Costs level, norm;
    if (!HIDDEN) {
      level = Costs::load(levels + choice * kWindowGroup).template by_run<RUN>();
      if (!SINGLES) norm = Costs::load(norms + choice * kWindowGroup).template by_run<RUN>();
    }
    for (int c = 0; c < COUNT; ++c) {
      if (HIDDEN) {
        const int32_t* row = rows[c] + choice * stride;
        level = Costs::load_runs<RUN>(levels, row, new_bits).template by_run<RUN>();
        // From the levels: rows are anywhere, and their loads are what takes time.
        if (!SINGLES) norm = add_products(level, level, zero).shift_right(2 * kLevelBits) + centre;
      }
      Costs cost = Costs::repeat<RUN>(before[c] + choice * stride);
      cost = add_products(level, target[c], cost);
      if (!SINGLES) cost = add_products(norm, weight[c], cost);
      best[c] = least(best[c], cost);
    }
  }
}

template <int RUN, bool SINGLES, bool HIDDEN, int COUNT>
void step_chains(const ChainStep& step, ChainStep::Chain* chain) {
  const int64_t kept = int64_t(1) << step.after_bits;
  const Costs tags = Costs::fill((1 << step.tag_bits) - 1);
  const Costs costs = Costs::fill(~((1 << step.tag_bits) - 1));
  const Costs hidden = Costs::fill((1 << step.next_hidden_bits) - 1);
  const Costs most = Costs::fill(kMostChainCost);
  Costs lowest[COUNT], offset[COUNT];
  for (int c = 0; c < COUNT; ++c) {
    offset[c] = Costs::fill(chain[c].offset);
    lowest[c] = Costs::fill(INT32_MAX);
  }
  for (int64_t path = 0; path < kept; path += Costs::kLanes) {
    Costs best[COUNT];
    best_choices<RUN, SINGLES, HIDDEN>(step, chain, path, best);
    const Costs place = Costs::count_from(int32_t(path));
    const Costs choice = place.shift_right(step.after_bits - step.next_choice_bits);
    for (int c = 0; c < COUNT; ++c) {
      const Costs found = best[c].template by_path<RUN>();
      found.store_bytes(chain[c].tags + path);
      Costs tag = choice;
      if (HIDDEN) {
        const Costs older = found & hidden;
        tag = (older.shift_left(step.next_choice_bits) | choice) & tags;
        (older.shift_left(step.after_bits) | place).store(chain[c].rows_after + path);
      }
      const Costs cost = least((found & costs) + offset[c], most) | tag;
      lowest[c] = least(lowest[c], cost);
      cost.store(chain[c].after + path);
    }
  }
  for (int c = 0; c < COUNT; ++c) chain[c].lowest = lowest[c].lowest();
}

template <int RUN, bool SINGLES>
void step_chains(ChainStep& step) {
  int64_t done = 0;
  if (step.chain[0].rows) {
    for (; done < step.count; ++done) step_chains<RUN, SINGLES, true, 1>(step, step.chain + done);
    return;
  }
  for (; step.count - done >= 4; done += 4) {
    step_chains<RUN, SINGLES, false, 4>(step, step.chain + done);
  }
  for (; step.count - done >= 2; done += 2) {
    step_chains<RUN, SINGLES, false, 2>(step, step.chain + done);
  }
  for (; done < step.count; ++done) step_chains<RUN, SINGLES, false, 1>(step, step.chain + done);
}

template <bool SINGLES>
void step_chains(ChainStep& step) {
  const int run = step.new_bits < Costs::kLaneBits ? step.new_bits : Costs::kLaneBits;
  if (run == 1) step_chains<1, SINGLES>(step);
  if (run == 2) step_chains<2, SINGLES>(step);
  if (run == 3) step_chains<3, SINGLES>(step);
  if (run == 4) step_chains<Costs::kLaneBits, SINGLES>(step);
}

void chain_step(ChainStep& step) { (step.norms ? step_chains<false> : step_chains<true>)(step); }

}  // namespace
}  // namespace pcdvq
