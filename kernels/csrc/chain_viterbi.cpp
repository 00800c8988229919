// The Viterbi algorithm around rings of the computed trellis. A first pass finds the bits at the seam,
// a second one goes around with those at both ends. Where paths are told apart by less than all bits
// of their windows, each goes on with the older bits of the best path that came to it.
#include <algorithm>

#include "chains.h"

namespace pcdvq {
namespace {

// A pass over steps [first, first + length) of the ring.
struct Pass {
  int64_t first, length;
  const int32_t* seam;  // for each chain the bits before the first and after the last; null: any
  int kept_bits[kChainWeights + 1];   // that tell paths apart before a step
  int64_t tag_at[kChainWeights + 1];  // where the tags of the paths before a step are

  // By which paths won that are kept after step i.
  int choice_bits(const ChainUnit& unit, int64_t i) const {
    return i < length ? kept_bits[i] + unit.bits_of(first + i) - kept_bits[i + 1] : 0;
  }
  // Of windows before step i, that do not tell paths apart.
  int hidden_bits(const ChainUnit& unit, int64_t i) const {
    return kWindowBits - unit.bits_of(first + i) - kept_bits[i];
  }
  int32_t paths(int64_t i) const { return 1 << kept_bits[i]; }
};

// In the last exact_steps no path is dropped until they are told apart by whole windows: a path that
// must come to the seam needs many to choose from.
Pass make_pass(const ChainUnit& unit, int64_t first, int64_t length, int state_bits,
               int64_t exact_steps, const int32_t* seam) {
  Pass pass = {first, length, seam, {}, {}};
  const int least = std::max(unit.bits[0], kWindowGroupBits);
  int64_t tag_bytes = 0;
  for (int64_t i = 0; i <= length; ++i) {
    const int bits = unit.bits_of(first + i);
    int kept = std::max(state_bits - bits, least);
    if (i > std::max<int64_t>(0, length - exact_steps)) {
      kept = pass.kept_bits[i - 1] + unit.bits_of(first + i - 1);
    }
    pass.kept_bits[i] = std::min(kept, kWindowBits - bits);
    pass.tag_at[i] = tag_bytes;
    tag_bytes += pass.paths(i);
  }
  return pass;
}

// Scratch of a thread.
struct Scratch {
  Buffer<uint8_t> bytes;
  size_t size = 0;

  uint8_t* take(size_t wanted) {
    if (wanted > size) {
      bytes.reset();
      bytes = allocate<uint8_t>(int64_t(wanted));
      size = bytes ? wanted : 0;
    }
    return bytes.get();
  }
};

// Keeps what chains have at the same place out of the same set of a cache.
constexpr int64_t kSkew = 256;

// Of each chain costs and rows before and after a step, and the tags of all steps.
struct PassMemory {
  int32_t* costs[2][kUnitChains];
  int32_t* rows[2][kUnitChains];
  uint8_t* tags[kUnitChains];

  bool lay_out(const ChainUnit& unit, const Pass& pass, Scratch& scratch) {
    int64_t most = 0;
    for (int64_t i = 0; i <= pass.length; ++i) most = std::max<int64_t>(most, pass.paths(i));
    const int64_t tag_bytes =
        round_up(pass.tag_at[pass.length] + pass.paths(pass.length), 64) + kSkew;
    uint8_t* at = scratch.take(size_t(unit.count * (16 * most + tag_bytes)));
    if (!at) return false;
    for (int64_t chain = 0; chain < unit.count; ++chain) {
      for (int i = 0; i < 4; ++i, at += 4 * most) {
        (i < 2 ? costs : rows)[i % 2][chain] = reinterpret_cast<int32_t*>(at);
      }
      tags[chain] = at;
      at += tag_bytes;
    }
    return true;
  }
};

// Costs, tags and rows before the first step.
void begin(const ChainUnit& unit, const Pass& pass, const PassMemory& memory) {
  const int bits = pass.kept_bits[0], choice_bits = pass.choice_bits(unit, 0);
  for (int64_t chain = 0; chain < unit.count; ++chain) {
    const int32_t seam = pass.seam ? pass.seam[chain] : 0, older = seam >> bits;
    for (int32_t path = 0; path < 1 << bits; ++path) {
      const bool open = !pass.seam || path == (seam & ((1 << bits) - 1));
      const int32_t tag = older << choice_bits | path >> (bits - choice_bits);
      memory.costs[0][chain][path] =
          (open ? 0 : kMostChainCost) | (tag & ((1 << unit.tag_bits) - 1));
      memory.rows[0][chain][path] = older << bits | path;
    }
  }
}

// Finds the new bits of every step on the way to a path.
void trace(ChainUnit& unit, const Pass& pass, const PassMemory& memory, int64_t chain,
           int32_t path) {
  for (int64_t i = pass.length - 1; i >= 0; --i) {
    const int64_t step = pass.first + i;
    const int bits = unit.bits_of(step), choice_bits = pass.choice_bits(unit, i);
    const int32_t tag = memory.tags[chain][pass.tag_at[i + 1] + path];
    const int32_t window = (tag & ((1 << choice_bits) - 1)) << pass.kept_bits[i + 1] | path;
    unit.fresh[chain][step % unit.steps] = uint8_t(window & ((1 << bits) - 1));
    path = window >> bits;
  }
}

bool search(ChainUnit& unit, const Pass& pass, Scratch& scratch) {
  PassMemory memory;
  if (!memory.lay_out(unit, pass, scratch)) return false;
  begin(unit, pass, memory);
  ChainStep step = {};
  step.tag_bits = unit.tag_bits;
  step.count = unit.count;
  for (int64_t i = 0; i < pass.length; ++i) {
    const bool hidden = pass.hidden_bits(unit, i) > 0;
    const Windows& windows =
        find_windows(unit.problem.singles, hidden ? kWindowBits : pass.kept_bits[i + 1]);
    if (!windows.levels) return false;
    step.levels = windows.levels.get();
    step.norms = unit.problem.singles ? nullptr : windows.norms.get();
    step.before_bits = pass.kept_bits[i];
    step.new_bits = unit.bits_of(pass.first + i);
    step.after_bits = pass.kept_bits[i + 1];
    step.next_choice_bits = pass.choice_bits(unit, i + 1);
    step.next_hidden_bits = pass.hidden_bits(unit, i + 1);
    for (int64_t c = 0; c < unit.count; ++c) {
      ChainStep::Chain& chain = step.chain[c];
      const ChainTarget& target = unit.targets[c][(pass.first + i) % unit.steps];
      const int32_t base = i ? chain.lowest & ~((1 << unit.tag_bits) - 1) : 0;
      chain.target = target.target;
      chain.weight = target.weight;
      chain.offset = target.offset - base;
      chain.before = memory.costs[i % 2][c];
      chain.after = memory.costs[1 - i % 2][c];
      chain.rows = hidden ? memory.rows[i % 2][c] : nullptr;
      chain.rows_after = memory.rows[1 - i % 2][c];
      chain.tags = memory.tags[c] + pass.tag_at[i + 1];
    }
    unit.kernels.chain_step(step);
  }
  const int32_t paths = pass.paths(pass.length);
  for (int64_t c = 0; c < unit.count; ++c) {
    const int32_t* costs = memory.costs[pass.length % 2][c];
    const auto lowest = std::find(costs, costs + paths, step.chain[c].lowest) - costs;
    trace(unit, pass, memory, c, pass.seam ? pass.seam[c] & (paths - 1) : int32_t(lowest));
  }
  return true;
}

}  // namespace

bool search_chains(ChainUnit& unit, const ChainEffort& effort) {
  thread_local Scratch scratch;
  const int64_t side = std::min(unit.steps / 2, effort.seam_steps), before = unit.steps - side;
  const Pass first = make_pass(unit, before, 2 * side, effort.seam_state_bits, 0, nullptr);
  if (!search(unit, first, scratch)) return false;
  int32_t seam[kUnitChains];
  for (int64_t chain = 0; chain < unit.count; ++chain) {
    uint32_t bits = 0;
    for (int64_t step = before; step < unit.steps; ++step) {
      bits = bits << unit.bits_of(step) | unit.fresh[chain][step];
    }
    seam[chain] = int32_t(bits & ((1u << (kWindowBits - unit.bits[0])) - 1));
  }
  const Pass second = make_pass(unit, 0, unit.steps, effort.state_bits, effort.exact_steps, seam);
  return search(unit, second, scratch);
}

}  // namespace pcdvq
