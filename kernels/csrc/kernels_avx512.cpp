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

// Sixteen int32, each of which may be a pair of int16.
struct Costs {
  static constexpr int kLaneBits = 4;
  static constexpr int64_t kLanes = 1 << kLaneBits;
  __m512i v;

  static Costs fill(int32_t value) { return {_mm512_set1_epi32(value)}; }
  static Costs load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
  void store(int32_t* p) const { _mm512_storeu_si512(p, v); }
  void store_bytes(uint8_t* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v));
  }
  static Costs count_from(int32_t first) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return {_mm512_add_epi32(_mm512_set1_epi32(first), lanes)};
  }

  // The kLanes >> RUN values at p, again and again.
  template <int RUN>
  static Costs repeat(const int32_t* p) {
    const auto* m128 = reinterpret_cast<const __m128i*>(p);
    const auto* m256 = reinterpret_cast<const __m256i*>(p);
    if (RUN == 1) return {_mm512_broadcast_i64x4(_mm256_loadu_si256(m256))};
    if (RUN == 2) return {_mm512_broadcast_i32x4(_mm_loadu_si128(m128))};
    if (RUN == 3) return {_mm512_broadcastq_epi64(_mm_loadl_epi64(m128))};
    return {_mm512_set1_epi32(*p)};
  }

  // Runs of 2^RUN values: run j starts at table + (rows[j] << shift).
  template <int RUN>
  static Costs load_runs(const int32_t* table, const int32_t* rows, int shift) {
    const auto m128 = [&](int j) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(table + (rows[j] << shift)));
    };
    const auto m256 = [&](int j) {
      return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(table + (rows[j] << shift)));
    };
    const auto pair = [&](int j) {
      return _mm_unpacklo_epi64(
          _mm_loadl_epi64(reinterpret_cast<const __m128i*>(table + (rows[j] << shift))),
          _mm_loadl_epi64(reinterpret_cast<const __m128i*>(table + (rows[j + 1] << shift))));
    };
    const auto join = [](__m128i a, __m128i b, __m128i c, __m128i d) {
      const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1);
      const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(c), d, 1);
      return Costs{_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1)};
    };
    if constexpr (RUN == 1) return join(pair(0), pair(2), pair(4), pair(6));
    if constexpr (RUN == 2) return join(m128(0), m128(1), m128(2), m128(3));
    if constexpr (RUN == 3) {
      return {_mm512_inserti64x4(_mm512_castsi256_si512(m256(0)), m256(1), 1)};
    }
    return load(table + (int64_t(rows[0]) << shift));
  }

  // From runs one after the other to the first values of all runs, the second values, and so on.
  template <int RUN>
  Costs by_run() const {
    return transpose<RUN, kLaneBits - RUN>();
  }
  template <int RUN>
  Costs by_path() const {
    return transpose<kLaneBits - RUN, RUN>();
  }

  Costs shift_left(int bits) const { return {_mm512_slli_epi32(v, unsigned(bits))}; }
  Costs shift_right(int bits) const { return {_mm512_srli_epi32(v, unsigned(bits))}; }
  int32_t lowest() const { return _mm512_reduce_min_epi32(v); }

 private:
  // Of a matrix with 2^COLUMNS columns and 2^ROWS rows.
  template <int COLUMNS, int ROWS>
  Costs transpose() const {
    if (COLUMNS == 0 || ROWS == 0) return *this;
    alignas(64) static constexpr auto from = transposed_lanes<kLanes>(COLUMNS, ROWS);
    return {_mm512_permutexvar_epi32(_mm512_load_si512(from.lane), v)};
  }
};

inline Costs operator+(Costs a, Costs b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Costs operator&(Costs a, Costs b) { return {_mm512_and_si512(a.v, b.v)}; }
inline Costs operator|(Costs a, Costs b) { return {_mm512_or_si512(a.v, b.v)}; }
inline Costs least(Costs a, Costs b) { return {_mm512_min_epi32(a.v, b.v)}; }
inline Costs add_products(Costs a, Costs b, Costs sum) {
  return {_mm512_dpwssd_epi32(sum.v, a.v, b.v)};
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
