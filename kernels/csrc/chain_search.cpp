// Search for codes of the computed trellis (FORMAT.md): the Viterbi algorithm around rings, exact in
// int32. A first pass over the steps around the seam finds the bits there, a second one goes around
// with those bits at both ends.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <memory>

#include "buffer.h"
#include "isa.h"
#include "numeric.h"

namespace pcdvq {
namespace {

constexpr int kUnitChains = sizeof(ChainStep::chain) / sizeof(ChainStep::Chain);
constexpr int64_t kChainWeights = 128;
constexpr uint32_t kFactor = 0x96459645;

// A cost is a weight up to kMostWeight times a squared distance. It is weight * (norm - kNormOffset)
// plus target * level, and constants, in which a level counts kLevelUnit times.
constexpr int kMostWeight = 1 << 12;
constexpr int kLevelBits = 6;
constexpr int kNormOffset = 1 << 14;
constexpr float kMostTarget = 255;

struct Effort {
  int state_bits, seam_state_bits;
  int seam_bits;  // of the ring, on either side of the seam
};

Effort effort_of(const PcdvqChains& p) {
  Effort effort = p.effort == PCDVQ_QUICK ? Effort{14, 14, 48} : Effort{16, 16, 64};
  if (const char* e = getenv("CHAINS")) sscanf(e, "%d,%d,%d", &effort.state_bits, &effort.seam_state_bits, &effort.seam_bits);
  const int least = p.singles ? p.code_bits : 2 * p.code_bits;
  effort.state_bits = std::max(effort.state_bits, least);
  effort.seam_state_bits = std::max(effort.seam_state_bits, least);
  return effort;
}

struct Windows {
  alignas(64) int32_t pairs[1 << kWindowBits];  // (level, level), times 2^kLevelBits
  alignas(64) int32_t norms[1 << kWindowBits];  // (sum of squares - kNormOffset, 0)
  alignas(64) int32_t singles[1 << kWindowBits];  // (level times 2^kLevelBits, square - kNormOffset)
};

int32_t pair_of(int low, int high) { return int32_t(uint32_t(uint16_t(low)) | uint32_t(high) << 16); }

const Windows* windows() {
  static const std::unique_ptr<const Windows> tables = [] {
    auto made = std::make_unique<Windows>();
    for (uint32_t window = 0; window < 1u << kWindowBits; ++window) {
      const uint32_t p = window * kFactor;
      const int u = int((p & 255) + (p >> 16 & 255) + 1) >> 1;
      const int v = int((p >> 8 & 255) + (p >> 24) + 1) >> 1;
      const int a = u - 128, b = v - 128, single = ((u + v + 1) >> 1) - 128;
      made->pairs[window] = pair_of(a * (1 << kLevelBits), b * (1 << kLevelBits));
      made->norms[window] = pair_of(a * a + b * b - kNormOffset, 0);
      made->singles[window] = pair_of(single * (1 << kLevelBits), single * single - kNormOffset);
    }
    return made;
  }();
  return tables.get();
}

// One step of one chain, as ChainStep has it.
struct Target {
  int32_t target, weight, offset;
};

// A unit of chains, and the shape that all of them have: chains of one strip, or of strips as wide.
struct Unit {
  const PcdvqChains& problem;
  const Kernels& kernels;
  int64_t count;
  int64_t row[kUnitChains], column[kUnitChains];  // where the chains begin
  int64_t steps;                                  // of a chain: one for each window
  int bits[2];                                    // new in even and odd steps
  int tag_bits;
  Effort effort;
  Target targets[kUnitChains][kChainWeights];
  uint8_t fresh[kUnitChains][kChainWeights];  // found: the new bits of each step

  int bits_of(int64_t step) const { return bits[step & 1]; }
};

// Rows and columns of the weights of a step: of pairs the first of two.
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
  const int unit_cost = 1 << unit.tag_bits;
  const int coarse = 1 << std::max(0, unit.tag_bits - kLevelBits);
  const float relative = most_weight > 0 ? p.row_weight[place.row] / most_weight : 0;
  int weight = relative > 0 ? std::max(unit_cost, round_to(relative * kMostWeight, unit_cost)) : 0;
  weight = std::min(weight, kMostWeight);
  int factors[2] = {0, 0};
  double square = 0;
  for (int j = 0; j < 2 - p.singles; ++j) {
    const float given = p.x[place.row * p.columns + place.column + j];
    const float x = given > -kMostTarget ? std::min(given, kMostTarget) : -kMostTarget;
    factors[j] = round_to(-2.0 * weight * x / (1 << kLevelBits), coarse);
    square += double(x) * x;
  }
  const int offset = round_to(weight * (square + kNormOffset), unit_cost);
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

// One pass over steps [first, first + length) of the ring.
struct Pass {
  int64_t first, length;
  int state_bits;
  const int32_t* seam;  // for each chain the bits at both ends that are no new ones; null: any
};

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

// Parts of the scratch of a pass: costs and rows before and after a step, then tags of every step.
struct PassMemory {
  int32_t* costs[2][kUnitChains];
  int32_t* rows[2][kUnitChains];  // null where states are whole windows
  uint8_t* tags[kUnitChains];     // those after step i at tag_at[i]
  int64_t tag_at[kChainWeights + 1];

  bool lay_out(const Unit& unit, const Pass& pass, Scratch& scratch) {
    int64_t most = 0, tag_bytes = 0;
    for (int64_t i = 0; i <= pass.length; ++i) {
      const int64_t kept = int64_t(1) << (pass.state_bits - unit.bits_of(pass.first + i));
      most = std::max(most, kept);
      tag_at[i] = tag_bytes;
      tag_bytes += kept;
    }
    const bool hidden = pass.state_bits < kWindowBits;
    const int64_t tables = hidden ? 4 : 2;
    tag_bytes = round_up(tag_bytes, 64) + kSkew;
    uint8_t* at = scratch.take(size_t(unit.count * (tables * 4 * most + tag_bytes)));
    if (!at) return false;
    for (int64_t chain = 0; chain < unit.count; ++chain) {
      for (int i = 0; i < 4; ++i) {
        int32_t*& table = (i < 2 ? costs : rows)[i % 2][chain];
        table = i < tables ? reinterpret_cast<int32_t*>(at) : nullptr;
        if (i < tables) at += 4 * most;
      }
      tags[chain] = at;
      at += tag_bytes;
    }
    return true;
  }
};

// Costs, tags and rows before the first step.
void begin(const Unit& unit, const Pass& pass, PassMemory& memory) {
  const int now = unit.bits_of(pass.first), next = unit.bits_of(pass.first + 1);
  const int32_t kept = 1 << (pass.state_bits - now);
  for (int64_t chain = 0; chain < unit.count; ++chain) {
    int32_t* costs = memory.costs[0][chain];
    const int32_t seam = pass.seam ? pass.seam[chain] : 0;
    const int32_t older = seam >> (pass.state_bits - now);
    for (int32_t q = 0; q < kept; ++q) {
      const bool open = !pass.seam || q == (seam & (kept - 1));
      const int32_t oldest = q >> (pass.state_bits - now - next);
      const int32_t tag = (older << next | oldest) & ((1 << unit.tag_bits) - 1);
      costs[q] = (open ? 0 : kMostChainCost) | tag;
      if (memory.rows[0][chain]) memory.rows[0][chain][q] = older << (pass.state_bits - now) | q;
    }
  }
}

// The last steps of a pass to a known seam, all of whose new bits are the seam's.
struct Closing {
  int64_t steps = 0;
  int bits = 0;
};
Closing closing_of(const Unit& unit, const Pass& pass) {
  Closing closing;
  if (!pass.seam || pass.state_bits == kWindowBits) return closing;
  const int known = kWindowBits - unit.bits_of(pass.first + pass.length);
  for (;;) {
    const int bits = closing.bits + unit.bits_of(pass.first + pass.length - closing.steps - 1);
    if (bits > known) return closing;
    closing = {closing.steps + 1, bits};
  }
}

int32_t cost_of(const ChainStep& step, const Target& target, int32_t window) {
  const auto product = [](int32_t a, int32_t b) {
    return int16_t(a) * int16_t(b) + (a >> 16) * (b >> 16);
  };
  const int32_t norm = step.norms ? product(step.norms[window], target.weight) : 0;
  return product(step.levels[window], target.target) + norm;
}

// The best of the states before the closing steps, and the new bits of those. Most states are lost
// on the way to the seam, so states that stand for many windows must be told apart before.
int32_t close(Unit& unit, const Pass& pass, const ChainStep& step, const Closing& closing,
              int64_t chain, const int32_t* costs, const int32_t* rows) {
  const int64_t begin = pass.first + pass.length - closing.steps;
  const int32_t seam = pass.seam[chain], closed = seam & ((1 << closing.bits) - 1);
  const int older_bits = kWindowBits - unit.bits_of(begin + closing.steps) - closing.bits;
  int32_t best = 0;
  int64_t least = INT64_MAX;
  for (int32_t q = 0; q < 1 << (pass.state_bits - unit.bits_of(begin)); ++q) {
    if ((q & ((1 << older_bits) - 1)) != seam >> closing.bits) continue;
    int64_t cost = costs[q];
    int left = closing.bits;
    for (int64_t i = begin; i < begin + closing.steps; ++i) {
      left -= unit.bits_of(i);
      const int32_t window = (rows[q] << closing.bits | closed) >> left & ((1 << kWindowBits) - 1);
      cost += cost_of(step, unit.targets[chain][i % unit.steps], window);
    }
    if (cost < least) best = q, least = cost;
  }
  int left = closing.bits;
  for (int64_t i = begin; i < begin + closing.steps; ++i) {
    left -= unit.bits_of(i);
    unit.fresh[chain][i % unit.steps] = uint8_t(closed >> left & ((1 << unit.bits_of(i)) - 1));
  }
  return best;
}

// The new bits of the first `steps` steps, on the best path into a state.
void trace(Unit& unit, const Pass& pass, int64_t steps, const PassMemory& memory, int64_t chain,
           int32_t kept) {
  for (int64_t i = steps; i > 0; --i) {
    const int64_t step = pass.first + i - 1;
    const int next = unit.bits_of(step + 1), now = unit.bits_of(step);
    const int32_t oldest = memory.tags[chain][memory.tag_at[i] + kept] & ((1 << next) - 1);
    const int32_t state = oldest << (pass.state_bits - next) | kept;
    unit.fresh[chain][step % unit.steps] = uint8_t(state & ((1 << now) - 1));
    kept = state >> now;
  }
}

bool search(Unit& unit, const Pass& pass, Scratch& scratch) {
  const Windows& tables = *windows();
  PassMemory memory;
  if (!memory.lay_out(unit, pass, scratch)) return false;
  begin(unit, pass, memory);
  ChainStep step = {};
  step.levels = unit.problem.singles ? tables.singles : tables.pairs;
  step.norms = unit.problem.singles ? nullptr : tables.norms;
  step.state_bits = pass.state_bits;
  step.tag_bits = unit.tag_bits;
  step.count = unit.count;
  const Closing closing = closing_of(unit, pass);
  const int64_t steps = pass.length - closing.steps;
  for (int64_t i = 0; i < steps; ++i) {
    step.in_bits = unit.bits_of(pass.first + i);
    step.out_bits = unit.bits_of(pass.first + i + 1);
    for (int64_t c = 0; c < unit.count; ++c) {
      ChainStep::Chain& chain = step.chain[c];
      const Target& target = unit.targets[c][(pass.first + i) % unit.steps];
      const int32_t base = i ? chain.lowest & ~((1 << unit.tag_bits) - 1) : 0;
      chain.target = target.target;
      chain.weight = target.weight;
      chain.offset = target.offset - base;
      chain.before = memory.costs[i % 2][c];
      chain.after = memory.costs[1 - i % 2][c];
      chain.rows = memory.rows[i % 2][c];
      chain.rows_after = memory.rows[1 - i % 2][c];
      chain.tags = memory.tags[c] + memory.tag_at[i + 1];
    }
    unit.kernels.chain_step(step);
  }
  const int32_t kept = 1 << (pass.state_bits - unit.bits_of(pass.first + pass.length));
  for (int64_t c = 0; c < unit.count; ++c) {
    const int32_t* costs = memory.costs[steps % 2][c];
    int32_t last;
    if (closing.steps) {
      last = close(unit, pass, step, closing, c, costs, memory.rows[steps % 2][c]);
    } else if (pass.seam) {
      last = pass.seam[c] & (kept - 1);
    } else {
      last = int32_t(std::find(costs, costs + kept, step.chain[c].lowest) - costs);
    }
    trace(unit, pass, steps, memory, c, last);
  }
  return true;
}

// For each chain the bits before the seam.
bool find_seam(Unit& unit, Scratch& scratch, int32_t* seam) {
  const Effort& effort = unit.effort;
  const int64_t side = std::min(unit.steps / 2, int64_t(effort.seam_bits) / unit.bits[1]) / 2 * 2;
  const Pass pass = {unit.steps - side, 2 * side, effort.seam_state_bits, nullptr};
  if (!search(unit, pass, scratch)) return false;
  for (int64_t chain = 0; chain < unit.count; ++chain) {
    int32_t bits = 0;
    for (int64_t step = pass.first; step < unit.steps; ++step) {
      bits = bits << unit.bits_of(step) | unit.fresh[chain][step];
    }
    seam[chain] = bits & ((1 << (kWindowBits - unit.bits[0])) - 1);
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

// Codes of chains [first, first + count) of strips that are `width` columns wide. Chain i is of
// segment i % segments.
bool search_unit(const PcdvqChains& p, const Kernels& kernels, int64_t column, int64_t width,
                 int64_t first, int64_t count) {
  thread_local Scratch scratch;
  const int64_t segments = p.rows / p.chain_rows;
  Unit unit = {p, kernels, count};
  for (int64_t i = 0; i < count; ++i) {
    unit.row[i] = (first + i) % segments * p.chain_rows;
    unit.column[i] = column + (first + i) / segments * width;
  }
  unit.steps = p.chain_rows * (p.singles ? width : width / 2);
  unit.bits[0] = p.singles ? (p.code_bits + 1) / 2 : p.code_bits;
  unit.bits[1] = p.singles ? p.code_bits / 2 : p.code_bits;
  unit.effort = effort_of(p);
  const int hidden = kWindowBits - std::min(unit.effort.state_bits, unit.effort.seam_state_bits);
  unit.tag_bits = std::max(unit.bits[0], hidden);
  make_targets(unit);
  int32_t seam[kUnitChains];
  if (!find_seam(unit, scratch, seam)) return false;
  if (!search(unit, {0, unit.steps, unit.effort.state_bits, seam}, scratch)) return false;
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
  const int64_t whole = p.columns / width, chains = whole * segments;
  const int64_t rest = p.columns % width ? segments : 0;  // chains of a narrow strip
  // Small problems in smaller units, so that every thread has work.
  const int64_t share = (chains + rest + p.threads - 1) / p.threads;
  const int64_t unit = std::max<int64_t>(1, std::min<int64_t>(share, pcdvq::kUnitChains));
  const int64_t units = (chains + unit - 1) / unit, narrow_units = (rest + unit - 1) / unit;
  std::atomic<bool> failed{false};
#pragma omp parallel for schedule(dynamic) num_threads(p.threads)
  for (int64_t i = 0; i < units + narrow_units; ++i) {
    const bool narrow = i >= units;
    const int64_t first = (narrow ? i - units : i) * unit;
    const int64_t count = std::min(unit, (narrow ? rest : chains) - first);
    const bool done = pcdvq::search_unit(p, *kernels, narrow ? whole * width : 0,
                                         narrow ? p.columns % width : width, first, count);
    if (!done) failed = true;
  }
  return failed ? PCDVQ_NO_MEMORY : PCDVQ_OK;
}
