// Decodes any layout, an octet (8 consecutive levels, from one code or several) at a time. Included
// once per instruction set, after its target pragma, its `Levels` and its find_offered().
#pragma once

#include <type_traits>

#include "isa.h"
#include "numeric.h"
#include "pyramid.h"
#include "sign_masks.h"
#include "windows.h"

namespace pcdvq {
namespace {

// STATES: there are states or rotations, or both.
template <int DIM, bool SIGNS, bool PARITY, bool STATES>
struct Codec {
  static constexpr int kCodes = 8 / DIM;
  static constexpr int kSignBits = SIGNS ? DIM : 0;

  const int8_t* const table;

  explicit Codec(const Weights& w)
      : table(w.table),
        code_bits_(int(w.layout.sign_bits + w.layout.pattern_bits + w.layout.magnitude_bits)),
        state_bits_(int(w.layout.state_bits)),
        rotation_bits_(int(w.layout.rotation_bits)) {}

  int octet_bits() const { return kCodes * code_bits_; }

  // Bytes that `octet` may read, from the byte of an octet's first bit on.
  int read_bytes() const {
    const int last_field = STATES ? code_bits_ - state_bits_ : kSignBits;
    const int last = last_field > kSignBits ? last_field : kSignBits;
    return ((kCodes - 1) * code_bits_ + last + 7) / 8 + 4;
  }

  // The octet whose first bit is bit `bit` of the row.
  inline Levels octet(const Row& row, int64_t bit) const {
    uint64_t rows[kCodes];
    uint64_t rotations[kCodes] = {};
    uint64_t signs = 0;
    for (int i = 0; i < kCodes; ++i) {
      const int64_t first = bit + i * code_bits_;
      const uint64_t code_signs = kSignBits ? field(row.codes, first, kSignBits) : 0;
      uint64_t fields = field(row.codes, first + kSignBits, code_bits_ - kSignBits);
      if (STATES) {
        const int base_bits = code_bits_ - kSignBits - rotation_bits_;
        const uint64_t state = field(row.above, first + code_bits_ - state_bits_, state_bits_);
        rotations[i] = fields >> base_bits;
        fields = (fields & ((uint64_t(1) << base_bits) - 1)) | (state << base_bits & row.keep);
      }
      // [magnitude][pattern][parity] is the order of the codewords: no field is taken apart.
      rows[i] = PARITY ? 2 * fields + kSignMasks.parity[code_signs] : fields;
      signs |= code_signs << (DIM * i);
    }
    const Levels levels = STATES ? load_rotated(rows, rotations) : load(rows);
    return SIGNS ? levels.negate(signs) : levels;
  }

 private:
  const int code_bits_, state_bits_, rotation_bits_;

  // `width` bits from bit `bit` on.
  static inline uint64_t field(const uint8_t* bytes, int64_t bit, int width) {
    const uint64_t word = load_as<uint32_t>(bytes + (bit >> 3));
    return word >> (bit & 7) & ((uint64_t(1) << width) - 1);
  }

  // Rotations are of bytes towards the lowest.
  inline Levels load_rotated(const uint64_t* rows, const uint64_t* rotations) const {
    using Word = std::conditional_t<DIM == 8, uint64_t,
                                    std::conditional_t<DIM == 4, uint32_t, uint16_t>>;
    uint64_t octet = 0;
    for (int i = 0; i < kCodes; ++i) {
      const Word word = load_as<Word>(table + rows[i] * DIM);
      const uint64_t shift = 8 * rotations[i];
      const Word rotated = Word(word >> shift | uint64_t(word) << (-shift & (8 * DIM - 1)));
      octet |= uint64_t(rotated) << (8 * DIM * i);
    }
    return Levels::load8(reinterpret_cast<const int8_t*>(&octet));
  }

  inline Levels load(const uint64_t* rows) const {
    if (DIM == 8) return Levels::load8(table + rows[0] * 8);
    if (DIM == 4) return Levels::load4(table + rows[0] * 4, table + rows[1 % kCodes] * 4);
    int8_t levels[8];
    for (int i = 0; i < kCodes; ++i) std::memcpy(levels + i * DIM, table + rows[i] * DIM, DIM);
    return Levels::load8(levels);
  }
};

// Where the octets of a weight row are read: in place, and the last ones from a padded copy,
// because the last row may end where the mapped memory ends.
struct RowSplit {
  int64_t safe;       // octets of the row whose words end inside of it
  int64_t tail_byte;  // first byte of the copy

  template <class C>
  RowSplit(const C& codec, int64_t row_bytes) {
    const int64_t spare_bits = 8 * (row_bytes - codec.read_bytes() + 1);
    safe = spare_bits > 0 ? (spare_bits - 1) / codec.octet_bits() + 1 : 0;
    tail_byte = safe * codec.octet_bits() / 8;
  }

  // At most two octets' words and the rest of an octet, under 16 bytes each, are copied.
  static constexpr int64_t kTailBytes = 64;

  void copy_tail(const uint8_t* row, int64_t row_bytes, uint8_t* tail) const {
    std::memset(tail, 0, kTailBytes);
    if (tail_byte < row_bytes) std::memcpy(tail, row + tail_byte, size_t(row_bytes - tail_byte));
  }
};

// Octet i of a row of a panel.
inline int8_t* octet_place(int8_t* panel, int64_t i) {
  return panel + i / 16 * kUnitColumns + run_place(i % 16 / 2) + i % 2 * 8;
}

template <class C>
void decode(const Weights& w, int64_t row, int64_t rows, int64_t first, int64_t units,
            int8_t* panel) {
  const C codec(w);
  const RowSplit split(codec, w.row_bytes);
  const int64_t begin = first * (kUnitColumns / 8);
  const int64_t end = smaller(begin + units * (kUnitColumns / 8), w.k / 8);
  const int64_t safe = smaller(split.safe < begin ? begin : split.safe, end);
  for (int64_t r = 0; r < rows; ++r, panel += kPanelColumns) {
    const Row whole = weight_row(w, row + r);
    for (int64_t i = begin; i < safe; ++i) {
      codec.octet(whole, i * codec.octet_bits()).store8(octet_place(panel, i - begin));
    }
    if (safe == end) continue;
    uint8_t tails[2][RowSplit::kTailBytes];
    split.copy_tail(whole.codes, w.row_bytes, tails[0]);
    split.copy_tail(whole.above, w.row_bytes, tails[1]);
    for (int64_t i = safe; i < end; ++i) {
      const int64_t bit = i * codec.octet_bits() - 8 * split.tail_byte;
      codec.octet({tails[0], tails[1], whole.keep}, bit).store8(octet_place(panel, i - begin));
    }
  }
}

template <int DIM, bool SIGNS, bool PARITY, bool STATES = false>
constexpr Decoder make_decoder() {
  return {decode<Codec<DIM, SIGNS, PARITY, STATES>>, nullptr, nullptr, nullptr};
}

template <int DIM>
Decoder generic_decoder(const PcdvqLayout& layout) {
  if (layout.state_bits || layout.rotation_bits) {
    return layout.parity ? make_decoder<DIM, true, true, true>()
                         : make_decoder<DIM, true, false, true>();
  }
  if (layout.parity) return make_decoder<DIM, true, true>();
  return layout.sign_bits ? make_decoder<DIM, true, false>() : make_decoder<DIM, false, false>();
}

Decoder find_decoder(const PcdvqLayout& layout) {
  Decoder decoder;
  if (find_offered(layout, &decoder)) return decoder;
  if (is_windows(layout)) return {decode<WindowCodec>, nullptr, nullptr, nullptr};
  if (layout.pyramid_rows) return {decode<PyramidCodec>, nullptr, nullptr, nullptr};
  return layout.vector_dim == 8   ? generic_decoder<8>(layout)
         : layout.vector_dim == 4 ? generic_decoder<4>(layout)
         : layout.vector_dim == 2 ? generic_decoder<2>(layout)
                                  : make_decoder<1, false, false>();
}

}  // namespace
}  // namespace pcdvq
