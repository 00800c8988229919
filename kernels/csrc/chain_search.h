// One step of the search for the codes of chains (chain_search.cpp). Included once per instruction
// set, after its `Costs`: a vector of int32, one for each of neighbouring states.
#pragma once

#include "isa.h"

namespace pcdvq {
namespace {

// Entries of a table of windows for the states [s, s + kLanes). What lies under in_bits of a state
// are new bits; 2^RUN states of a vector share the ones above, so that a vector has one or more runs.
template <int RUN>
inline Costs load_windows(const int32_t* table, const int32_t* rows, int64_t s, int in_bits) {
  if (!rows) return Costs::load(table + s);
  const int64_t inside = s & ((int64_t(1) << in_bits) - 1);
  return Costs::load_runs<RUN>(table + inside, rows + (s >> in_bits), in_bits);
}

// Costs are not stored by state: those that a step begins with are equal for states that differ in
// the new bits alone, and it ends with the least of the states that differ in the oldest bits alone.
template <int RUN, bool SINGLES, int COUNT>
void step_chains(const ChainStep& step, ChainStep::Chain* chain) {
  const int64_t kept = int64_t(1) << (step.state_bits - step.out_bits);
  const int64_t choices = int64_t(1) << step.out_bits;
  const int hidden = kWindowBits - step.state_bits;
  const Costs tags = Costs::fill((1 << step.tag_bits) - 1), no_tags = Costs::fill(~((1 << step.tag_bits) - 1));
  const Costs unseen = Costs::fill((1 << hidden) - 1), most = Costs::fill(kMostChainCost);
  Costs target[COUNT], weight[COUNT], lowest[COUNT];
  for (int c = 0; c < COUNT; ++c) {
    target[c] = Costs::fill(chain[c].target);
    weight[c] = Costs::fill(chain[c].weight);
    lowest[c] = Costs::fill(INT32_MAX);
  }
  for (int64_t state = 0; state < kept; state += Costs::kLanes) {
    Costs best[COUNT];
    for (int c = 0; c < COUNT; ++c) best[c] = Costs::fill(INT32_MAX);
    for (int64_t choice = 0; choice < choices; ++choice) {
      const int64_t s = choice * kept + state;
      Costs levels, norms;
      for (int c = 0; c < COUNT; ++c) {
        if (c == 0 || chain[c].rows) {
          levels = load_windows<RUN>(step.levels, chain[c].rows, s, step.in_bits).template by_run<RUN>();
          if (!SINGLES) {
            norms = load_windows<RUN>(step.norms, chain[c].rows, s, step.in_bits).template by_run<RUN>();
          }
        }
        Costs cost = Costs::repeat<RUN>(chain[c].before + (s >> step.in_bits));
        cost = add_products(levels, target[c], cost);
        if (!SINGLES) cost = add_products(norms, weight[c], cost);
        best[c] = least(best[c], cost);
      }
    }
    const Costs place = Costs::count_from(int32_t(state));
    for (int c = 0; c < COUNT; ++c) {
      const Costs found = best[c].template by_state<RUN>();
      found.store_bytes(chain[c].tags + state);
      Costs tag = place.shift_right(step.state_bits - step.out_bits - step.in_bits);
      if (chain[c].rows) {
        const Costs older = found & unseen;
        tag = (tag | older.shift_left(step.in_bits)) & tags;
        (place | older.shift_left(step.state_bits - step.out_bits)).store(chain[c].rows_after + state);
      }
      const Costs cost = least((found & no_tags) + Costs::fill(chain[c].offset), most) | tag;
      lowest[c] = least(lowest[c], cost);
      cost.store(chain[c].after + state);
    }
  }
  for (int c = 0; c < COUNT; ++c) chain[c].lowest = lowest[c].lowest();
}

template <int RUN, bool SINGLES>
void step_chains(ChainStep& step) {
  int64_t done = 0;
  for (; step.count - done >= 4; done += 4) step_chains<RUN, SINGLES, 4>(step, step.chain + done);
  for (; step.count - done >= 2; done += 2) step_chains<RUN, SINGLES, 2>(step, step.chain + done);
  for (; done < step.count; ++done) step_chains<RUN, SINGLES, 1>(step, step.chain + done);
}

template <bool SINGLES>
void step_chains(ChainStep& step) {
  const int run = step.in_bits < Costs::kLaneBits ? step.in_bits : Costs::kLaneBits;
  if (run == 1) step_chains<1, SINGLES>(step);
  if (run == 2) step_chains<2, SINGLES>(step);
  if (run == 3) step_chains<3, SINGLES>(step);
  if (run == 4) step_chains<Costs::kLaneBits, SINGLES>(step);
}

void chain_step(ChainStep& step) {
  if (step.norms) step_chains<false>(step);
  if (!step.norms) step_chains<true>(step);
}

}  // namespace
}  // namespace pcdvq
