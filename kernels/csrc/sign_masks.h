// What a byte of sign bits stands for; bit j of s set: element j is negated.
#pragma once

#include <cstdint>

namespace pcdvq {

struct SignMasks {
  alignas(64) int8_t factors[256][8];  // 1 or -1
  alignas(64) uint32_t lanes[256][8];  // the fp32 sign bit where an element is negated
};
extern const SignMasks kSignMasks;

}  // namespace pcdvq
