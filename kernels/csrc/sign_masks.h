// kSignMasks.lanes[s][j] is the fp32 sign bit where bit j of s is set: XOR negates those lanes.
#pragma once

#include <cstdint>

namespace pcdvq {

struct SignMasks {
  alignas(64) uint32_t lanes[256][8];
  uint32_t parity[256];  // number of set bits of s, modulo 2
};
extern const SignMasks kSignMasks;

}  // namespace pcdvq
