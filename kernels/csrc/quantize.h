// Rotated activations as integers, a scale for each kScaleColumns of them. Included once per
// instruction set, after its `Vec8`; the same loops serve them all, and make the same integers.
#pragma once

#include "isa.h"
#include "numeric.h"

namespace pcdvq {
namespace {

// Added to a float below 2^22 in magnitude, it leaves the nearest integer in the low bits.
constexpr float kRound = 12582912.0f;

// integers[i] = x[i] / scale, at most `limit` in magnitude; returns the scale. A NaN or an infinity
// makes the scale NaN or infinite; the integers then are arbitrary.
inline float quantize_scale(const float* x, float limit, int16_t* integers) {
  uint32_t largest = 0;  // bits of non-negative floats are in the order of the floats
  for (int64_t i = 0; i < kScaleColumns; ++i) {
    const uint32_t bits = float_to_bits(x[i]) & 0x7FFFFFFF;
    largest = bits > largest ? bits : largest;
  }
  const float highest = bits_to_float(largest);
  const float inverse = highest < 1e-30f ? 0.0f : limit / highest;  // 0 / 0 is none of them
  for (int64_t i = 0; i < kScaleColumns; ++i) {
    const uint32_t bits = float_to_bits(x[i] * inverse + kRound) - float_to_bits(kRound);
    integers[i] = int16_t(bits);
  }
  return highest / limit;
}

// The integers of one unit, in the order of columns, and its scales by lane.
inline void quantize_unit(const float* x, float limit, int16_t* integers, float* scales) {
  for (int64_t h = 0; h < 2; ++h) {
    const float scale =
        quantize_scale(x + kScaleColumns * h, limit, integers + kScaleColumns * h);
    for (int64_t lane = 0; lane < 4; ++lane) scales[4 * h + lane] = scale;
  }
}

// Pads the last unit with zeros; returns the columns that makes.
inline int64_t pad_units(float* x, int64_t columns) {
  for (; columns % kUnitColumns; ++columns) x[columns] = 0.0f;
  return columns;
}

void order_floats(float* x, int64_t columns, float* out) {
  columns = pad_units(x, columns);
  for (int64_t i = 0; i < columns; i += 16) {
    const int64_t place = i / kUnitColumns * kUnitColumns + run_place(i % kUnitColumns / 16);
    std::memcpy(out + place, x + i, 16 * sizeof(float));
  }
}

void quantize_int8(float* x, int64_t columns, int8_t* out, float* scales) {
  columns = pad_units(x, columns);
  for (int64_t first = 0; first < columns; first += kUnitColumns) {
    int16_t integers[kUnitColumns];
    quantize_unit(x + first, 127.0f, integers, scales);
    for (int64_t run = 0; run < kUnitColumns / 16; ++run) {
      int8_t* place = out + 64 * (run % 4) + 16 * (run / 4);
      for (int64_t i = 0; i < 16; ++i) place[i] = int8_t(integers[16 * run + i]);
      for (int64_t i = 0; i < 16; ++i) place[i + 32] = int8_t(-integers[16 * run + i]);
    }
    out += 2 * kUnitColumns, scales += 8;
  }
}

void quantize_int16(float* x, int64_t columns, float limit, const WordRows& out) {
  columns = pad_units(x, columns);
  int16_t* vector = out.levels;
  for (int64_t u = 0; u * kUnitColumns < columns; ++u) {
    int16_t integers[kUnitColumns];
    quantize_unit(x + u * kUnitColumns, limit, integers, out.scales + u * out.scale_stride);
    for (int64_t v = 0; v < kUnitVectors; ++v, vector += out.vector_stride) {
      for (int64_t h = 0; h < 2; ++h) {
        const int16_t* run = integers + kScaleColumns * h + 16 * v;
        for (int64_t i = 0; i < 8; ++i) vector[8 * h + i] = run[2 * i];
        for (int64_t i = 0; i < 8; ++i) vector[8 * h + 16 + i] = run[2 * i + 1];
      }
    }
  }
}

// out: of each 32 levels the even ones, then the odd ones.
void to_int16(const int8_t* levels, int64_t count, int16_t* out) {
  for (int64_t i = 0; i < count; i += 32) split_levels(levels + i, out + i);
}

void to_floats(const int8_t* levels, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += 8) {
    Vec8::convert(Levels::load8(levels + i)).store(out + i);
  }
}

}  // namespace
}  // namespace pcdvq
