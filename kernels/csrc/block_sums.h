// Sums of products of int8 activations with blocks, for AVX-512 with VNNI. Included once.
#pragma once

#include "block_decode.h"

namespace pcdvq {
namespace {

// In assembly because gcc 12 copies the accumulators of the intrinsic.
PCDVQ_INLINE void add_dots(Wide& sum, Wide levels, Wide x) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(levels), "v"(x));
}

// The same where x is the four columns at `x`, which every row has to be multiplied with.
PCDVQ_INLINE void add_dots(Wide& sum, Wide levels, const int8_t* x) {
  using Four = int32_t __attribute__((may_alias));
  const Four& four = *reinterpret_cast<const Four*>(x);
  __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(levels), "m"(four));
}

// total + scale * sum, of one block.
PCDVQ_INLINE __m512 add_scaled(Wide sum, float scale, __m512 total) {
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(scale), total);
}

PCDVQ_INLINE Wide four_columns(const int8_t* x) { return _mm512_set1_epi32(load_as<int32_t>(x)); }

// Sums of a block and ROWS rows of activations; a sink, which multiplies steps as they are decoded.
template <int ROWS>
class BlockSums {
 public:
  PCDVQ_INLINE BlockSums(const BlockRows& x, int64_t block) : x_(x), block_(block) {
    for (int i = 0; i < ROWS; ++i) {
      sums_[i][0] = _mm512_set1_epi32(x.corrections[i * x.scale_stride + block]);
      for (int t = 1; t < kTurns; ++t) sums_[i][t] = _mm512_setzero_si512();
    }
  }

  PCDVQ_INLINE void operator()(int s, int turn, Wide levels) {
    const int8_t* x = x_.levels + block_ * ROWS * kScaleColumns + 4 * s;
    for (int i = 0; i < ROWS; ++i) {
      add_dots(sums_[i][turn % kTurns], levels, x + i * kScaleColumns);
    }
  }

  // acc: [ROWS, stride], of each the first kBlockRows
  PCDVQ_INLINE void add_to(float* acc, int64_t stride) const {
    for (int i = 0; i < ROWS; ++i) {
      Wide sum = sums_[i][0];
      for (int t = 1; t < kTurns; ++t) sum = _mm512_add_epi32(sum, sums_[i][t]);
      const float scale = x_.scales[i * x_.scale_stride + block_];
      float* to = acc + i * stride;
      _mm512_storeu_ps(to, add_scaled(sum, scale, _mm512_loadu_ps(to)));
    }
  }

 private:
  static constexpr int kTurns = ROWS == 1 ? 2 : 1;  // so that a product need not wait for the last
  const BlockRows x_;  // a copy: stores of sums might change another
  const int64_t block_;
  Wide sums_[ROWS][kTurns];
};

}  // namespace
}  // namespace pcdvq
