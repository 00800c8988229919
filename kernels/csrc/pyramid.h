// Decodes codes of integer pyramids (FORMAT.md, "Pyramid codes") by the tables that
// pcdvq_kernels/pyramid.py makes. Included once per instruction set, after its `Levels`.
#pragma once

#include "isa.h"
#include "numeric.h"

namespace pcdvq {
namespace {

constexpr int kRangeBits = 12;  // the top bits of a code, which tell its range
constexpr int kPyramidScaleBits = 7;

// Where the tables have the two halves of a code's point, four coordinates each, and its scale.
struct PyramidPoint {
  const int8_t* first;
  const int8_t* second;
  const int8_t* scale;  // int16, twice
};

inline PyramidPoint pyramid_point(const int8_t* table, uint32_t code, int code_bits) {
  const int64_t place = load_as<uint16_t>(table + 2 * int64_t(code >> (code_bits - kRangeBits)));
  const int8_t* range = table + 8 * place;
  const uint32_t last = load_as<uint32_t>(range + 4), divisor = load_as<uint32_t>(range + 8);
  uint32_t rest = code - load_as<uint32_t>(range);
  rest = rest < last ? rest : last;
  return {table + load_as<uint32_t>(range + 16) + 4 * int64_t(rest / divisor),
          table + load_as<uint32_t>(range + 20) + 4 * int64_t(rest % divisor), range + 24};
}

// What `decode` of codec.h asks for, for codes of any length.
struct PyramidCodec {
  const int8_t* const table;

  explicit PyramidCodec(const Weights& w)
      : table(w.table), code_bits_(int(w.layout.pattern_bits)) {}

  int octet_bits() const { return code_bits_; }
  int read_bytes() const { return 8; }

  inline Levels octet(const uint8_t* codes, int64_t bit) const {
    const uint64_t word = load_as<uint64_t>(codes + (bit >> 3)) >> (bit & 7);
    const uint32_t code = uint32_t(word & ((uint64_t(1) << code_bits_) - 1));
    const PyramidPoint point = pyramid_point(table, code, code_bits_);
    const int scale = load_as<int16_t>(point.scale);
    int8_t levels[8];
    for (int j = 0; j < 8; ++j) {
      const int y = j < 4 ? point.first[j] : point.second[j - 4];
      const int level = (y * scale + (1 << kPyramidScaleBits >> 1)) >> kPyramidScaleBits;
      levels[j] = int8_t(level > 127 ? 127 : level < -127 ? -127 : level);
    }
    return Levels::load8(levels);
  }

 private:
  const int code_bits_;
};

}  // namespace
}  // namespace pcdvq
