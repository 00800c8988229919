#include "isa.h"
#include "numeric.h"

#if defined(__x86_64__) && defined(__GNUC__)
#if defined(__clang__)
#pragma clang attribute push(                                                      \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512bitalg,avx512vnni,avx2,fma,f16c,popcnt,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512bitalg,avx512vnni,avx2,fma,f16c,popcnt,bmi,bmi2")
#endif
#include "vec_avx2.h"

namespace pcdvq {
namespace {

struct Vec {
  static constexpr int64_t kLanes = 16;
  __m512 v;

  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec broadcast(float value) { return {_mm512_set1_ps(value)}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }

  static float sum(const float* p) { return (Vec8::load(p) + Vec8::load(p + 8)).sum(); }
};

inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }

struct Index {
  __m512i v;
  static Index load(const int32_t* p) { return {_mm512_load_si512(p)}; }
  void store(int32_t* p) const { _mm512_store_si512(p, v); }
};

// Where score > best: best = score, index = c.
inline void take_greater(Vec score, int32_t c, Vec& best, Index& index) {
  const __mmask16 greater = _mm512_cmp_ps_mask(score.v, best.v, _CMP_GT_OQ);
  best.v = _mm512_mask_mov_ps(best.v, greater, score.v);
  index.v = _mm512_mask_set1_epi32(index.v, greater, c);
}

}  // namespace
}  // namespace pcdvq

#include "dot.h"
#include "block_products.h"
#include "kernels.h"

namespace pcdvq {
const Kernels* avx512_kernels() { return &kKernels; }
}  // namespace pcdvq

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
namespace pcdvq {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace pcdvq
#endif
