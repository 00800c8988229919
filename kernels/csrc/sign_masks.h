// What a byte of sign bits stands for; bit j of s set: element j is negated.
#pragma once

#include <cstdint>

namespace pcdvq {

struct SignMasks {
  alignas(64) int8_t factors[257][8];  // 1 or -1; a row more, because 16 bytes are read
  alignas(64) uint32_t lanes[256][8];  // the fp32 sign bit where an element is negated
  uint8_t parity[256];                 // number of set bits of s, modulo 2
};
extern const SignMasks kSignMasks;

}  // namespace pcdvq
