// Scalar conversions between fp32 and the 16-bit types, round to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

#include "pcdvq.h"

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the codes are read as little-endian words"
#endif

namespace pcdvq {
// Unnamed, so that each translation unit keeps its own copy: a copy compiled for AVX-512 must not
// be the one the linker picks for the scalar path.
namespace {

template <class T>
inline T load_as(const void* p) {
  T value;
  std::memcpy(&value, p, sizeof(T));
  return value;
}

// Not std::min, of which the linker would keep a single copy.
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Lanes of a vector that is the transpose of one with 2^row_bits rows of 2^column_bits lanes.
template <int64_t LANES>
struct LaneOrder {
  int32_t lane[LANES];
};
template <int64_t LANES>
constexpr LaneOrder<LANES> transposed_lanes(int column_bits, int row_bits) {
  LaneOrder<LANES> order = {};
  for (int32_t i = 0; i < LANES; ++i) {
    order.lane[i] = (i & ((1 << row_bits) - 1)) << column_bits | i >> row_bits;
  }
  return order;
}

inline float bits_to_float(uint32_t bits) { return load_as<float>(&bits); }
inline uint32_t float_to_bits(float value) { return load_as<uint32_t>(&value); }

inline float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16;
  const uint32_t rest = half & 0x7FFF;
  if (rest >= 0x7C00) return bits_to_float(sign | 0x7F800000 | (rest & 0x3FF) << 13);
  if (rest >= 0x0400) return bits_to_float(sign | ((rest << 13) + (112u << 23)));
  const float magnitude = float(rest) * 0x1p-24f;
  return bits_to_float(sign | float_to_bits(magnitude));
}

inline uint16_t float_to_half(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  const uint32_t rest = bits & 0x7FFFFFFF;
  if (rest > 0x7F800000) return sign | 0x7E00;
  if (rest >= 0x477FF000) return sign | 0x7C00;  // 65520 and up round to infinity
  if (rest < 0x38800000) {                       // subnormal: the FPU rounds when 0.5 is added
    return sign | uint16_t(float_to_bits(bits_to_float(rest) + 0.5f) - 0x3F000000);
  }
  return sign | uint16_t((rest + 0xFFF + (rest >> 13 & 1) - (112u << 23)) >> 13);
}

inline uint16_t float_to_bfloat(float value) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline float load_element(const void* base, int32_t dtype, int64_t i) {
  if (dtype == PCDVQ_F32) return static_cast<const float*>(base)[i];
  if (dtype == PCDVQ_I8) return static_cast<const int8_t*>(base)[i];
  const uint16_t word = static_cast<const uint16_t*>(base)[i];
  return dtype == PCDVQ_BF16 ? bits_to_float(uint32_t(word) << 16) : half_to_float(word);
}

inline void store_element(void* base, int32_t dtype, int64_t i, float value) {
  if (dtype == PCDVQ_F32) {
    static_cast<float*>(base)[i] = value;
  } else {
    static_cast<uint16_t*>(base)[i] =
        dtype == PCDVQ_BF16 ? float_to_bfloat(value) : float_to_half(value);
  }
}

}  // namespace
}  // namespace pcdvq
