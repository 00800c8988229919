// Eight floats in an AVX register. Needs avx2, fma and f16c.
#pragma once

#include <immintrin.h>

#include "numeric.h"
#include "sign_masks.h"

namespace pcdvq {
namespace {

// Eight int8 in the low half of a register.
struct Levels {
  __m128i v;

  static Levels load8(const int8_t* p) {
    return {_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))};
  }
  void store8(int8_t* p) const { _mm_storel_epi64(reinterpret_cast<__m128i*>(p), v); }
};

struct Vec8 {
  static constexpr int64_t kLanes = 8;
  __m256 v;

  static Vec8 load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec8 broadcast(float value) { return {_mm256_set1_ps(value)}; }
  static Vec8 convert(Levels levels) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(levels.v))};
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }

  // Elements [i, i + 8) of a tensor, as fp32.
  static Vec8 load_converted(const void* base, int32_t dtype, int64_t i) {
    if (dtype == PCDVQ_F32) return load(static_cast<const float*>(base) + i);
    if (dtype == PCDVQ_I8) return convert(Levels::load8(static_cast<const int8_t*>(base) + i));
    const auto* words = reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(base) + i);
    const __m128i half = _mm_loadu_si128(words);
    if (dtype == PCDVQ_F16) return {_mm256_cvtph_ps(half)};
    // Two bytes of zeros below each word; cheaper than to widen and shift.
    const __m256i places = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7,
                                            -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1,
                                            14, 15);
    return {_mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(half), places))};
  }

  Vec8 negate(uint32_t signs) const {
    const auto* mask = reinterpret_cast<const float*>(kSignMasks.lanes[signs]);
    return {_mm256_xor_ps(v, _mm256_load_ps(mask))};
  }

  // (a, b) -> (a + b, a - b) for lanes 1, 2 or 4 apart.
  Vec8 butterfly1() const {
    const __m256 low = _mm256_moveldup_ps(v), high = _mm256_movehdup_ps(v);
    return {_mm256_add_ps(low, flip(high, 0xAA))};
  }
  Vec8 butterfly2() const {
    const __m256 low = _mm256_permute_ps(v, 0x44), high = _mm256_permute_ps(v, 0xEE);
    return {_mm256_add_ps(low, flip(high, 0xCC))};
  }
  Vec8 butterfly4() const {
    const __m256 low = _mm256_permute2f128_ps(v, v, 0x00);
    const __m256 high = _mm256_permute2f128_ps(v, v, 0x11);
    return {_mm256_add_ps(low, flip(high, 0xF0))};
  }

  static float sum(const float* p) { return load(p).sum(); }
  float sum() const {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }

 private:
  static __m256 flip(__m256 value, int signs) { return Vec8{value}.negate(uint32_t(signs)).v; }
};

// Sixteen int16, or sums of their products in eight lanes.
struct Words {
  __m256i v;

  static Words load(const int16_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
  }
  Vec8 to_floats() const { return {_mm256_cvtepi32_ps(v)}; }
};

inline Words add_products(Words a, Words b, Words sum) {
  sum.v = _mm256_add_epi32(sum.v, _mm256_madd_epi16(a.v, b.v));
  // Or gcc would gather the products of several steps to add them in another order, and spill.
  __asm__("" : "+x"(sum.v));
  return sum;
}

// out: of 32 levels the even ones, then the odd ones.
inline void split_levels(const int8_t* levels, int16_t* out) {
  const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(levels));
  const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(pairs, 8), 8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), even);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16), _mm256_srai_epi16(pairs, 8));
}

inline Vec8 operator+(Vec8 a, Vec8 b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec8 operator-(Vec8 a, Vec8 b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec8 operator*(Vec8 a, Vec8 b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec8 fma(Vec8 a, Vec8 b, Vec8 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }

}  // namespace
}  // namespace pcdvq
