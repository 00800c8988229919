// Driver of pcdvq_chains: what the searches aim at, and the codes of what they find.
#include "chains.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <mutex>

namespace pcdvq {
namespace {

// Costs are weights up to kMostWeight times squared distances to targets up to kMostTarget, so that
// those of a step are less than 2^31 - kMostChainCost.
constexpr int kMostWeight = 1 << 12;
constexpr float kMostTarget = 255;

constexpr ChainEffort kExhaustive = {16, 16, kChainWeights, 0};
constexpr ChainEffort kQuick = {13, 12, 16, 8};

int32_t pair_of(int low, int high) {
  return int32_t(uint32_t(uint16_t(low)) | uint32_t(high) << 16);
}

Windows make_windows(bool singles, int kept_bits) {
  constexpr int64_t kCount = 1 << kWindowBits;
  Windows made = {allocate<int32_t>(kCount), allocate<int32_t>(singles ? 1 : kCount)};
  if (!made.levels || !made.norms) return {};
  const int64_t kept = int64_t(1) << kept_bits, choices = kCount / kept;
  for (int64_t window = 0; window < kCount; ++window) {
    const int64_t path = window % kept, choice = window / kept;
    const int64_t group = path / kWindowGroup * choices + choice;
    const int64_t at = group * kWindowGroup + path % kWindowGroup;
    const uint32_t pair = window_pair(uint32_t(window));
    const int a = int(pair & 255) - 128, b = int(pair >> 8) - 128;
    const int single = int(window_single(uint32_t(window))) - 128;
    constexpr int kUnit = 1 << kLevelBits;
    if (singles) {
      made.levels[at] = pair_of(single * kUnit, single * single - kNormOffset);
    } else {
      made.levels[at] = pair_of(a * kUnit, b * kUnit);
      made.norms[at] = pair_of(a * a + b * b - kNormOffset, 0);
    }
  }
  return made;
}

// Row and column of the weight of a step, of two weights the first one's.
struct Place {
  int64_t row, column;
};
Place place_of(const ChainUnit& unit, int64_t chain, int64_t step) {
  const PcdvqChains& p = unit.problem;
  const int64_t pair = p.singles ? step / 2 : step;
  return {unit.row[chain] + pair % p.chain_rows,
          unit.column[chain] + pair / p.chain_rows * 2 + (p.singles ? step % 2 : 0)};
}

int round_to(double value, int multiple) { return int(std::lrint(value / multiple)) * multiple; }

ChainTarget make_target(const ChainUnit& unit, const Place& place, float most_weight) {
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

void make_targets(ChainUnit& unit) {
  for (int64_t chain = 0; chain < unit.count; ++chain) {
    const float* weights = unit.problem.row_weight + unit.row[chain];
    const float most = *std::max_element(weights, weights + unit.problem.chain_rows);
    for (int64_t step = 0; step < unit.steps; ++step) {
      unit.targets[chain][step] = make_target(unit, place_of(unit, chain, step), most);
    }
  }
}

void store_codes(const ChainUnit& unit) {
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
  const int64_t segments = p.rows / p.chain_rows;
  const ChainEffort& effort = p.effort == PCDVQ_QUICK ? kQuick : kExhaustive;
  ChainUnit unit = {p, kernels, count};
  for (int64_t i = 0; i < count; ++i) {
    unit.row[i] = (first + i) % segments * p.chain_rows;
    unit.column[i] = strips.column + (first + i) / segments * strips.width;
  }
  unit.steps = p.chain_rows * strips.width / (p.singles ? 1 : 2);
  unit.bits[0] = p.singles ? (p.code_bits + 1) / 2 : p.code_bits;
  unit.bits[1] = p.singles ? p.code_bits / 2 : p.code_bits;
  unit.tag_bits =
      std::max(unit.bits[0], kWindowBits - std::min(effort.state_bits, effort.seam_state_bits));
  make_targets(unit);
  if (!search_chains(unit, effort)) return false;
  store_codes(unit);
  return true;
}

}  // namespace

const Windows& find_windows(bool singles, int kept_bits) {
  static std::mutex mutex;
  static Windows made[2][kWindowBits + 1];
  const std::lock_guard<std::mutex> lock(mutex);
  Windows& windows = made[singles][kept_bits];
  if (!windows.levels) windows = make_windows(singles, kept_bits);
  return windows;
}

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
