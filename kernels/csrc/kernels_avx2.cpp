#include "isa.h"
#include "numeric.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,popcnt,bmi,bmi2"))), \
                             apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,popcnt,bmi,bmi2")
#endif
#include "vec_avx2.h"

namespace pcdvq {
namespace {

using Vec = Vec8;

struct Index {
  __m256i v;
  static Index load(const int32_t* p) {
    return {_mm256_load_si256(reinterpret_cast<const __m256i*>(p))};
  }
  void store(int32_t* p) const { _mm256_store_si256(reinterpret_cast<__m256i*>(p), v); }
};

// Where score > best: best = score, index = c.
inline void take_greater(Vec score, int32_t c, Vec& best, Index& index) {
  const __m256 greater = _mm256_cmp_ps(score.v, best.v, _CMP_GT_OQ);
  best.v = _mm256_blendv_ps(best.v, score.v, greater);
  index.v = _mm256_blendv_epi8(index.v, _mm256_set1_epi32(c), _mm256_castps_si256(greater));
}

}  // namespace
}  // namespace pcdvq

#include "dot.h"
#include "block_trellis_avx2.h"
#include "kernels.h"

namespace pcdvq {
const Kernels* avx2_kernels() { return &kKernels; }
}  // namespace pcdvq

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
namespace pcdvq {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace pcdvq
#endif
