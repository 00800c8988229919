// Portable kernels: eight floats that the compiler maps to whatever the baseline offers.
#include "isa.h"
#include "numeric.h"
#include "sign_masks.h"

namespace pcdvq {
namespace {

struct Levels {
  int8_t v[8];

  static Levels load8(const int8_t* p) {
    Levels r;
    std::memcpy(r.v, p, 8);
    return r;
  }

  void store8(int8_t* p) const { std::memcpy(p, v, 8); }
};

struct Vec8 {
  static constexpr int64_t kLanes = 8;
  float v[8];

  template <class F>
  static inline __attribute__((always_inline)) Vec8 make(F lane) {
    Vec8 r;
    for (int i = 0; i < 8; ++i) r.v[i] = lane(i);
    return r;
  }

  static Vec8 load(const float* p) {
    return make([=](int i) { return p[i]; });
  }
  static Vec8 broadcast(float value) {
    return make([=](int) { return value; });
  }
  static Vec8 convert(Levels levels) {
    return make([&](int i) { return float(levels.v[i]); });
  }
  void store(float* p) const { std::memcpy(p, v, sizeof(v)); }

  // Elements [i, i + 8) of a tensor, as fp32.
  static Vec8 load_converted(const void* base, int32_t dtype, int64_t i) {
    return make([=](int j) { return load_element(base, dtype, i + j); });
  }

  Vec8 negate(uint32_t signs) const {
    const uint32_t* mask = kSignMasks.lanes[signs];
    return make([=](int i) { return bits_to_float(float_to_bits(v[i]) ^ mask[i]); });
  }

  // (a, b) -> (a + b, a - b) for lanes 1, 2 or 4 apart.
  Vec8 butterfly1() const { return butterfly(1); }
  Vec8 butterfly2() const { return butterfly(2); }
  Vec8 butterfly4() const { return butterfly(4); }

  static float sum(const float* p) { return load(p).sum(); }
  float sum() const {
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
  }

 private:
  Vec8 butterfly(int half) const {
    return make([=](int i) { return i & half ? v[i - half] - v[i] : v[i] + v[i + half]; });
  }
};

inline Vec8 operator+(Vec8 a, Vec8 b) {
  return Vec8::make([&](int i) { return a.v[i] + b.v[i]; });
}
inline Vec8 operator-(Vec8 a, Vec8 b) {
  return Vec8::make([&](int i) { return a.v[i] - b.v[i]; });
}
inline Vec8 operator*(Vec8 a, Vec8 b) {
  return Vec8::make([&](int i) { return a.v[i] * b.v[i]; });
}
inline Vec8 fma(Vec8 a, Vec8 b, Vec8 c) { return a * b + c; }

using Vec = Vec8;

// Sixteen int16, or sums of their products in eight lanes.
struct Words {
  int32_t v[8];
  const int16_t* p;

  static Words load(const int16_t* p) { return {{}, p}; }
  Vec8 to_floats() const {
    return Vec8::make([&](int i) { return float(v[i]); });
  }
};

// out: of 32 levels the even ones, then the odd ones.
inline void split_levels(const int8_t* levels, int16_t* out) {
  for (int i = 0; i < 32; ++i) out[i / 2 + i % 2 * 16] = levels[i];
}

inline Words add_products(const Words& a, const Words& b, Words sum) {
  for (int i = 0; i < 8; ++i) {
    sum.v[i] += a.p[2 * i] * b.p[2 * i] + a.p[2 * i + 1] * b.p[2 * i + 1];
  }
  return sum;
}

// All layouts take the generic decoder.
bool find_offered(const PcdvqLayout&, Decoder*) { return false; }

struct Index {
  int32_t v[8];
  static Index load(const int32_t* p) {
    Index r;
    std::memcpy(r.v, p, sizeof(r.v));
    return r;
  }
  void store(int32_t* p) const { std::memcpy(p, v, sizeof(v)); }
};

// Where score > best: best = score, index = c.
inline void take_greater(Vec score, int32_t c, Vec& best, Index& index) {
  for (int i = 0; i < 8; ++i) {
    const bool greater = score.v[i] > best.v[i];
    best.v[i] = greater ? score.v[i] : best.v[i];
    index.v[i] = greater ? c : index.v[i];
  }
}

// Eight int32, as in kernels_avx512.cpp.
struct Costs {
  static constexpr int kLaneBits = 3;
  static constexpr int64_t kLanes = 1 << kLaneBits;
  int32_t v[kLanes];

  template <class F>
  static inline __attribute__((always_inline)) Costs make(F lane) {
    Costs r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = int32_t(lane(i));
    return r;
  }

  static Costs fill(int32_t value) {
    return make([=](int) { return value; });
  }
  static Costs load(const int32_t* p) {
    return make([=](int i) { return p[i]; });
  }
  void store(int32_t* p) const { std::memcpy(p, v, sizeof(v)); }
  void store_bytes(uint8_t* p) const {
    for (int i = 0; i < kLanes; ++i) p[i] = uint8_t(v[i]);
  }
  static Costs count_from(int32_t first) {
    return make([=](int i) { return first + i; });
  }

  template <int RUN>
  static Costs repeat(const int32_t* p) {
    return make([=](int i) { return p[i & ((kLanes >> RUN) - 1)]; });
  }
  template <int RUN>
  static Costs load_runs(const int32_t* table, const int32_t* rows, int shift) {
    return make([=](int i) { return table[(rows[i >> RUN] << shift) + (i & ((1 << RUN) - 1))]; });
  }
  template <int RUN>
  Costs by_run() const {
    return transpose(RUN, kLaneBits - RUN);
  }
  template <int RUN>
  Costs by_path() const {
    return transpose(kLaneBits - RUN, RUN);
  }

  Costs shift_left(int bits) const {
    return make([&](int i) { return uint32_t(v[i]) << bits; });
  }
  Costs shift_right(int bits) const {
    return make([&](int i) { return uint32_t(v[i]) >> bits; });
  }
  int32_t lowest() const {
    int32_t r = v[0];
    for (int i = 1; i < kLanes; ++i) r = v[i] < r ? v[i] : r;
    return r;
  }

 private:
  Costs transpose(int columns, int rows) const {
    const auto from = transposed_lanes<kLanes>(columns, rows);
    return make([&](int i) { return v[from.lane[i]]; });
  }
};

inline Costs operator+(Costs a, Costs b) {
  return Costs::make([&](int i) { return a.v[i] + b.v[i]; });
}
inline Costs operator&(Costs a, Costs b) {
  return Costs::make([&](int i) { return a.v[i] & b.v[i]; });
}
inline Costs operator|(Costs a, Costs b) {
  return Costs::make([&](int i) { return a.v[i] | b.v[i]; });
}
inline Costs least(Costs a, Costs b) {
  return Costs::make([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline Costs add_products(Costs a, Costs b, Costs sum) {
  return Costs::make([&](int i) {
    return sum.v[i] + int16_t(a.v[i]) * int16_t(b.v[i]) + (a.v[i] >> 16) * (b.v[i] >> 16);
  });
}

}  // namespace
}  // namespace pcdvq

namespace pcdvq {
namespace {
constexpr const BlockKernels* kBlocks = nullptr;
}  // namespace
}  // namespace pcdvq

#include "kernels.h"

namespace pcdvq {
const Kernels* scalar_kernels() { return &kKernels; }
}  // namespace pcdvq
