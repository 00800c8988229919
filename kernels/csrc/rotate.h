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

// The butterflies between R vectors `half` floats apart: log2(R) levels in one pass over memory.
template <int R>
inline void butterfly_vectors(float* x, int64_t columns, int64_t half) {
  for (int64_t base = 0; base < columns; base += R * half) {
    for (int64_t i = base; i < base + half; i += 8) {
      Vec8 v[R];
#pragma GCC unroll 8
      for (int j = 0; j < R; ++j) v[j] = Vec8::load(x + i + j * half);
#pragma GCC unroll 3
      for (int d = 1; d < R; d *= 2) {
#pragma GCC unroll 8
        for (int j = 0; j < R; ++j) {
          if (j & d) continue;
          const Vec8 low = v[j], high = v[j + d];
          v[j] = low + high;
          v[j + d] = low - high;
        }
      }
#pragma GCC unroll 8
      for (int j = 0; j < R; ++j) v[j].store(x + i + j * half);
    }
  }
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
  int64_t half = 8;
  for (; 8 * half <= block; half *= 8) butterfly_vectors<8>(out, columns, half);
  if (4 * half == block) butterfly_vectors<4>(out, columns, half);
  if (2 * half == block) butterfly_vectors<2>(out, columns, half);
}

}  // namespace
}  // namespace pcdvq
