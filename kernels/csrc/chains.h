// What the search for codes of the computed trellis shares with its driver.
#pragma once

#include "buffer.h"
#include "isa.h"

namespace pcdvq {

constexpr int64_t kUnitChains = sizeof(ChainStep::chain) / sizeof(ChainStep::Chain);

// Levels and norms of all windows, as ChainStep has them: in groups for 2^kept_bits paths that are
// kept, by window for kept_bits = kWindowBits. Null if there is no memory.
struct Windows {
  Buffer<int32_t> levels, norms;
};
const Windows& find_windows(bool singles, int kept_bits);

// What a step of a chain aims at, as ChainStep has it. A path's cost is the sum over its steps of the
// products with levels and norms and of offsets: of weight * squared distance but for rounding.
struct ChainTarget {
  int32_t target, weight, offset;
};

// Chains that are searched together, of strips of one width.
struct ChainUnit {
  const PcdvqChains& problem;
  const Kernels& kernels;
  int64_t count;
  int64_t row[kUnitChains], column[kUnitChains];  // where the chains begin
  int64_t steps;                                  // of a chain: one for each window
  int bits[2];                                    // new ones of even and odd steps
  int tag_bits;                                   // costs are multiples of 2^tag_bits
  ChainTarget targets[kUnitChains][kChainWeights];
  uint8_t fresh[kUnitChains][kChainWeights];  // what is searched for: the new bits of each step

  int bits_of(int64_t step) const { return bits[step & 1]; }
};

// By how many of the last bits of their windows paths are told apart, at most.
struct ChainEffort {
  int state_bits;       // in the second pass
  int seam_state_bits;  // in the first pass
  int64_t seam_steps;   // of the first pass, on either side of the seam
  int64_t exact_steps;  // at the end of the second pass, with whole windows
};

// Fills in `fresh`; false if there is no memory.
bool search_chains(ChainUnit& unit, const ChainEffort& effort);

}  // namespace pcdvq
