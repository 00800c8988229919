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

// Eight int32, as in kernels_avx512.cpp.
struct Costs {
  static constexpr int kLaneBits = 3;
  static constexpr int64_t kLanes = 1 << kLaneBits;
  __m256i v;

  static Costs fill(int32_t value) { return {_mm256_set1_epi32(value)}; }
  static Costs load(const int32_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
  }
  void store(int32_t* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  void store_bytes(uint8_t* p) const {
    const __m256i bytes = _mm256_and_si256(v, _mm256_set1_epi32(255));
    const __m128i words =
        _mm_packus_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
  }
  static Costs count_from(int32_t first) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return {_mm256_add_epi32(_mm256_set1_epi32(first), lanes)};
  }

  template <int RUN>
  static Costs repeat(const int32_t* p) {
    const auto* m128 = reinterpret_cast<const __m128i*>(p);
    if (RUN == 1) return {_mm256_broadcastsi128_si256(_mm_loadu_si128(m128))};
    if (RUN == 2) return {_mm256_broadcastq_epi64(_mm_loadl_epi64(m128))};
    return {_mm256_set1_epi32(*p)};
  }

  template <int RUN>
  static Costs load_runs(const int32_t* table, const int32_t* rows, int shift) {
    const auto m128 = [&](int j) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(table + (rows[j] << shift)));
    };
    const auto pair = [&](int j) {
      return _mm_unpacklo_epi64(
          _mm_loadl_epi64(reinterpret_cast<const __m128i*>(table + (rows[j] << shift))),
          _mm_loadl_epi64(reinterpret_cast<const __m128i*>(table + (rows[j + 1] << shift))));
    };
    const auto join = [](__m128i a, __m128i b) {
      return Costs{_mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1)};
    };
    if constexpr (RUN == 1) return join(pair(0), pair(2));
    if constexpr (RUN == 2) return join(m128(0), m128(1));
    return load(table + (int64_t(rows[0]) << shift));
  }

  template <int RUN>
  Costs by_run() const {
    return transpose<RUN, kLaneBits - RUN>();
  }
  template <int RUN>
  Costs by_path() const {
    return transpose<kLaneBits - RUN, RUN>();
  }

  Costs shift_left(int bits) const { return {_mm256_slli_epi32(v, bits)}; }
  Costs shift_right(int bits) const { return {_mm256_srli_epi32(v, bits)}; }
  int32_t lowest() const {
    __m128i m = _mm_min_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    m = _mm_min_epi32(m, _mm_shuffle_epi32(m, 0x4E));
    return _mm_cvtsi128_si32(_mm_min_epi32(m, _mm_shuffle_epi32(m, 0xB1)));
  }

 private:
  template <int COLUMNS, int ROWS>
  Costs transpose() const {
    if (COLUMNS == 0 || ROWS == 0) return *this;
    alignas(64) static constexpr auto from = transposed_lanes<kLanes>(COLUMNS, ROWS);
    const auto* lane = reinterpret_cast<const __m256i*>(from.lane);
    return {_mm256_permutevar8x32_epi32(v, _mm256_load_si256(lane))};
  }
};

inline Costs operator+(Costs a, Costs b) { return {_mm256_add_epi32(a.v, b.v)}; }
inline Costs operator&(Costs a, Costs b) { return {_mm256_and_si256(a.v, b.v)}; }
inline Costs operator|(Costs a, Costs b) { return {_mm256_or_si256(a.v, b.v)}; }
inline Costs least(Costs a, Costs b) { return {_mm256_min_epi32(a.v, b.v)}; }
inline Costs add_products(Costs a, Costs b, Costs sum) {
  return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(a.v, b.v))};
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
