// Signs and the fast Walsh-Hadamard transform of activations. Included once per instruction set,
// after its `Vec8`.
#pragma once

#include "isa.h"
#include "numeric.h"

namespace pcdvq {
namespace {

// The butterflies inside a vector; a block below 8 ends early.
inline Vec8 butterfly_lanes(Vec8 v, int64_t block) {
  if (block > 1) v = v.butterfly1();
  if (block > 2) v = v.butterfly2();
  if (block > 4) v = v.butterfly4();
  return v;
}

void rotate(const void* x, int32_t dtype, const uint8_t* signs, int64_t columns, int64_t block,
            float* out) {
  double root = 1.0;  // block^0.5
  for (int64_t b = block; b > 1; b /= 4) root *= b == 2 ? 1.4142135623730951 : 2.0;
  const Vec8 scale = Vec8::broadcast(float(1.0 / root));
  for (int64_t i = 0; i < columns; i += 8) {
    const Vec8 v = Vec8::load_converted(x, dtype, i).negate(signs[i / 8]);
    (butterfly_lanes(v, block) * scale).store(out + i);
  }
  for (int64_t half = 8; half < block; half *= 2) {
    for (int64_t base = 0; base < columns; base += 2 * half) {
      for (int64_t i = base; i < base + half; i += 8) {
        const Vec8 low = Vec8::load(out + i), high = Vec8::load(out + i + half);
        (low + high).store(out + i);
        (low - high).store(out + i + half);
      }
    }
  }
}

}  // namespace
}  // namespace pcdvq
