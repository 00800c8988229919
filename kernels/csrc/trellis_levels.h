// Codec `trellis` (FORMAT.md, "Trellis"): what a window of 16 bits means.
#pragma once

#include <cstdint>

namespace pcdvq {

constexpr int kWindowBits = 16;
constexpr int64_t kChainWeights = 128;  // but for the chains of the last columns

// The multiplier of windows. Its halves are equal, so that the upper half of a product is the lower
// one plus the high half of window * kTrellisFactor.
constexpr uint32_t kTrellisFactor = 0x9645;
constexpr uint32_t kTrellisMultiplier = kTrellisFactor << 16 | kTrellisFactor;

namespace {

inline uint32_t rounded_mean(uint32_t a, uint32_t b) { return (a + b + 1) >> 1; }

// Levels of both columns that a window stands for, plus 128: byte 0, and byte 1 above it.
inline uint32_t window_pair(uint32_t window) {
  const uint32_t p = window * kTrellisMultiplier;
  const uint32_t low = rounded_mean(p & 255, p >> 16 & 255);
  return low | rounded_mean(p >> 8 & 255, p >> 24) << 8;
}

inline uint32_t window_single(uint32_t window) {
  const uint32_t pair = window_pair(window);
  return rounded_mean(pair & 255, pair >> 8);
}

}  // namespace
}  // namespace pcdvq
