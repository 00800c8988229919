// Search for codes of the computed trellis (FORMAT.md): the Viterbi algorithm around rings, in exact
// integers. A first pass finds the bits at the seam, a second one goes around with those at both ends.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <memory>
#include <mutex>

#include "buffer.h"
#include "isa.h"

namespace pcdvq {
namespace {

constexpr int64_t kUnitChains = sizeof(ChainStep::chain) / sizeof(ChainStep::Chain);
constexpr int64_t kChainWeights = 128;
constexpr uint32_t kFactor = 0x96459645;

// A cost is a weight up to kMostWeight times a squared distance: weight * norm, target * level and a
// constant, where a norm is a squared level less kNormOffset, and a level counts 2^kLevelBits times.
constexpr int kMostWeight = 1 << 12;
constexpr int kLevelBits = 6;
constexpr int kNormOffset = 1 << 14;
constexpr float kMostTarget = 255;

struct Effort {
  int state_bits;             // that tell paths apart, in the second pass
  int seam_state_bits;        // likewise, in the first pass
  int64_t seam_steps;         // of the first pass, on either side of the seam
  int64_t exact_steps;        // at the end of the second pass, with whole windows
};

Effort effort_of(const PcdvqChains& p) {
  Effort effort = p.effort == PCDVQ_QUICK ? Effort{13, 12, 16, 8} : Effort{16, 16, 64, 0};
  if (const char* e = getenv("CHAINS")) sscanf(e, "%d,%d,%ld,%ld", &effort.state_bits, &effort.seam_state_bits, &effort.seam_steps, &effort.exact_steps);
  return effort;
}

// Levels and norms of all windows, as ChainStep has them, for steps that keep 2^kept_bits states;
// with kept_bits = kWindowBits by window.
struct Windows {
  Buffer<int32_t> levels, norms;
};

int32_t pair_of(int low, int high) { return int32_t(uint32_t(uint16_t(low)) | uint32_t(high) << 16); }

Windows make_windows(bool singles, int kept_bits) {
  constexpr int64_t kCount = 1 << kWindowBits;
  Windows made = {allocate<int32_t>(kCount), allocate<int32_t>(singles ? 1 : kCount)};
  if (!made.levels || !made.norms) return {};
  const int64_t kept = int64_t(1) << kept_bits, choices = kCount / kept;
  for (int64_t window = 0; window < kCount; ++window) {
    const int64_t state = window % kept, choice = window / kept;
    const int64_t at = (state / kWindowGroup * choices + choice) * kWindowGroup + state % kWindowGroup;
    const uint32_t p = uint32_t(window) * kFactor;
    const int u = int((p & 255) + (p >> 16 & 255) + 1) >> 1;
    const int v = int((p >> 8 & 255) + (p >> 24) + 1) >> 1;
    const int a = u - 128, b = v - 128, level = ((u + v + 1) >> 1) - 128;
    constexpr int kUnit = 1 << kLevelBits;
    if (singles) {
      made.levels[at] = pair_of(level * kUnit, level * level - kNormOffset);
    } else {
      made.levels[at] = pair_of(a * kUnit, b * kUnit);
      made.norms[at] = pair_of(a * a + b * b - kNormOffset, 0);
    }
  }
  return made;
}

// Made at the first call; null levels if there is no memory.
const Windows& find_windows(bool singles, int kept_bits) {
  static std::mutex mutex;
  static Windows made[2][kWindowBits + 1];
  const std::lock_guard<std::mutex> lock(mutex);
  Windows& windows = made[singles][kept_bits];
  if (!windows.levels) windows = make_windows(singles, kept_bits);
  return windows;
}

// What one step of one chain aims at, as ChainStep has it.
struct Target {
  int32_t target, weight, offset;
};

// Chains that are searched together, of strips of one width.
struct Unit {
  const PcdvqChains& problem;
  const Kernels& kernels;
  int64_t count;
  int64_t row[kUnitChains], column[kUnitChains];  // where the chains begin
  int64_t steps;                                  // of a chain: one for each window
  int bits[2];                                    // new ones of even and odd steps
  int tag_bits;
  Target targets[kUnitChains][kChainWeights];
  uint8_t fresh[kUnitChains][kChainWeights];  // what is found: the new bits of each step

  int bits_of(int64_t step) const { return bits[step & 1]; }
};

// Row and column of the weights of a step: of pairs the first one's.
struct Place {
  int64_t row, column;
};
Place place_of(const Unit& unit, int64_t chain, int64_t step) {
  const PcdvqChains& p = unit.problem;
  const int64_t pair = p.singles ? step / 2 : step;
  return {unit.row[chain] + pair % p.chain_rows,
          unit.column[chain] + pair / p.chain_rows * 2 + (p.singles ? step % 2 : 0)};
}

int round_to(double value, int multiple) { return int(std::lrint(value / multiple)) * multiple; }

Target make_target(const Unit& unit, const Place& place, float most_weight) {
  const PcdvqChains& p = unit.problem;
  const int least = 1 << unit.tag_bits;
  const float relative = most_weight > 0 ? p.row_weight[place.row] / most_weight : 0;
  const int weight = relative > 0 ? std::max(least, round_to(relative * kMostWeight, least)) : 0;
  const int rounding = 1 << std::max(0, unit.tag_bits - kLevelBits);
  int factors[2] = {0, 0};
  double square = kNormOffset;
  for (int j = 0; j < 2 - p.singles; ++j) {
    const float given = p.x[place.row * p.columns + place.column + j];
    const float x = given > -kMostTarget ? std::min(given, kMostTarget) : -kMostTarget;
    factors[j] = round_to(-2.0 * weight * x / (1 << kLevelBits), rounding);
    square += double(x) * x;
  }
  const int offset = round_to(weight * square, least);
  if (p.singles) return {pair_of(factors[0], weight), 0, offset};
  return {pair_of(factors[0], factors[1]), pair_of(weight, 0), offset};
}

void make_targets(Unit& unit) {
  for (int64_t chain = 0; chain < unit.count; ++chain) {
    const float* weights = unit.problem.row_weight + unit.row[chain];
    const float most = *std::max_element(weights, weights + unit.problem.chain_rows);
    for (int64_t step = 0; step < unit.steps; ++step) {
      unit.targets[chain][step] = make_target(unit, place_of(unit, chain, step), most);
    }
  }
}

// A pass over steps [first, first + length) of the ring.
struct Pass {
  int64_t first, length;
  const int32_t* seam;  // for each chain the bits before the first and after the last; null: any
  int kept_bits[kChainWeights + 1];  // that tell paths apart before a step
  int64_t tag_at[kChainWeights + 1];  // where the tags of a step's `after` are

  int choice_bits(const Unit& unit, int64_t i) const {
    return i < length ? kept_bits[i] + unit.bits_of(first + i) - kept_bits[i + 1] : 0;
  }
  int hidden_bits(const Unit& unit, int64_t i) const {
    return kWindowBits - unit.bits_of(first + i) - kept_bits[i];
  }
};

// The last exact_steps have whole windows, as far as the paths before can be told apart.
Pass make_pass(const Unit& unit, int64_t first, int64_t length, int state_bits, int64_t exact_steps,
               const int32_t* seam) {
  Pass pass = {first, length, seam, {}, {}};
  int64_t tag_bytes = 0;
  for (int64_t i = 0; i <= length; ++i) {
    const int bits = unit.bits_of(first + i), all = kWindowBits - bits;
    int& kept = pass.kept_bits[i];
    kept = std::max(state_bits - bits, std::max(unit.bits[0], 4));
    if (i && i > length - exact_steps) kept = pass.kept_bits[i - 1] + unit.bits_of(first + i - 1);
    kept = std::min(kept, all);
    pass.tag_at[i] = tag_bytes;
    tag_bytes += int64_t(1) << kept;
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

  bool lay_out(const Unit& unit, const Pass& pass, Scratch& scratch) {
    const int64_t last = int64_t(1) << pass.kept_bits[pass.length];
    const int64_t most = int64_t(1) << *std::max_element(pass.kept_bits, pass.kept_bits + pass.length + 1);
    const int64_t tag_bytes = round_up(pass.tag_at[pass.length] + last, 64) + kSkew;
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
void begin(const Unit& unit, const Pass& pass, const PassMemory& memory) {
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

// Finds the new bits of every step on the best path that ends as path `kept`.
void trace(Unit& unit, const Pass& pass, const PassMemory& memory, int64_t chain, int32_t kept) {
  for (int64_t i = pass.length - 1; i >= 0; --i) {
    const int64_t step = pass.first + i;
    const int bits = unit.bits_of(step), choice_bits = pass.choice_bits(unit, i);
    const int32_t tag = memory.tags[chain][pass.tag_at[i + 1] + kept];
    const int32_t state = (tag & ((1 << choice_bits) - 1)) << pass.kept_bits[i + 1] | kept;
    unit.fresh[chain][step % unit.steps] = uint8_t(state & ((1 << bits) - 1));
    kept = state >> bits;
  }
}

bool search(Unit& unit, const Pass& pass, Scratch& scratch) {
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
      const Target& target = unit.targets[c][(pass.first + i) % unit.steps];
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
  const int32_t kept = 1 << pass.kept_bits[pass.length];
  for (int64_t c = 0; c < unit.count; ++c) {
    const int32_t* costs = memory.costs[pass.length % 2][c];
    const auto lowest = std::find(costs, costs + kept, step.chain[c].lowest) - costs;
    trace(unit, pass, memory, c, pass.seam ? pass.seam[c] & (kept - 1) : int32_t(lowest));
  }
  return true;
}

// For each chain the bits before the seam.
bool find_seam(Unit& unit, const Effort& effort, Scratch& scratch, int32_t* seam) {
  const int64_t side = std::min(unit.steps / 2, effort.seam_steps);
  const Pass pass = make_pass(unit, unit.steps - side, 2 * side, effort.seam_state_bits, 0, nullptr);
  if (!search(unit, pass, scratch)) return false;
  for (int64_t chain = 0; chain < unit.count; ++chain) {
    uint32_t bits = 0;
    for (int64_t step = pass.first; step < unit.steps; ++step) {
      bits = bits << unit.bits_of(step) | unit.fresh[chain][step];
    }
    seam[chain] = int32_t(bits & ((1u << (kWindowBits - unit.bits[0])) - 1));
  }
  return true;
}

void store_codes(const Unit& unit) {
  const PcdvqChains& p = unit.problem;
  for (int64_t chain = 0; chain < unit.count; ++chain) {
    for (int64_t step = 0; step < unit.steps; step += 1 + p.singles) {
      const Place place = place_of(unit, chain, step);
      const uint8_t* fresh = unit.fresh[chain] + step;
      const int code = p.singles ? fresh[0] << unit.bits[1] | fresh[1] : fresh[0];
      p.out[place.row * (p.columns / 2) + place.column / 2] = uint8_t(code);
    }
  }
}

// Strips of one width from a column on. Chain i is of segment i % segments.
struct Strips {
  int64_t column, width, chains;
};

// Codes of `count` chains from `first` on.
bool search_unit(const PcdvqChains& p, const Kernels& kernels, const Strips& strips, int64_t first,
                 int64_t count) {
  thread_local Scratch scratch;
  const int64_t segments = p.rows / p.chain_rows;
  Unit unit = {p, kernels, count};
  for (int64_t i = 0; i < count; ++i) {
    unit.row[i] = (first + i) % segments * p.chain_rows;
    unit.column[i] = strips.column + (first + i) / segments * strips.width;
  }
  unit.steps = p.chain_rows * strips.width / (p.singles ? 1 : 2);
  unit.bits[0] = p.singles ? (p.code_bits + 1) / 2 : p.code_bits;
  unit.bits[1] = p.singles ? p.code_bits / 2 : p.code_bits;
  const Effort effort = effort_of(p);
  const int state_bits = std::min(effort.state_bits, effort.seam_state_bits);
  unit.tag_bits = std::max(unit.bits[0], kWindowBits - state_bits);
  make_targets(unit);
  int32_t seam[kUnitChains];
  if (!find_seam(unit, effort, scratch, seam)) return false;
  const Pass pass =
      make_pass(unit, 0, unit.steps, effort.state_bits, effort.exact_steps, seam);
  if (!search(unit, pass, scratch)) return false;
  store_codes(unit);
  return true;
}

}  // namespace
}  // namespace pcdvq

int32_t pcdvq_chains(const PcdvqChains* problem) {
  const PcdvqChains& p = *problem;
  const pcdvq::Kernels* kernels = pcdvq::kernels_for(p.isa);
  if (!kernels) return PCDVQ_NO_ISA;
  const int64_t segments = p.rows / p.chain_rows, width = pcdvq::kChainWeights / p.chain_rows;
  const int64_t rest = p.columns % width;
  const pcdvq::Strips strips = {0, width, p.columns / width * segments};
  const pcdvq::Strips narrow = {p.columns - rest, rest, rest ? segments : 0};
  // Small problems in smaller units, so that every thread has work.
  const int64_t share = (strips.chains + narrow.chains + p.threads - 1) / p.threads;
  const int64_t unit = std::max<int64_t>(1, std::min(share, pcdvq::kUnitChains));
  const int64_t units = (strips.chains + unit - 1) / unit;
  const int64_t narrow_units = (narrow.chains + unit - 1) / unit;
  std::atomic<bool> failed{false};
#pragma omp parallel for schedule(dynamic) num_threads(p.threads)
  for (int64_t i = 0; i < units + narrow_units; ++i) {
    const pcdvq::Strips& part = i < units ? strips : narrow;
    const int64_t first = (i < units ? i : i - units) * unit;
    const int64_t count = std::min(unit, part.chains - first);
    if (!pcdvq::search_unit(p, *kernels, part, first, count)) failed = true;
  }
  return failed ? PCDVQ_NO_MEMORY : PCDVQ_OK;
}
