// Decodes any layout, eight levels at a time. Included once per instruction set, after its target
// pragma, its `Levels` and its find_offered().
#pragma once

#include "isa.h"
#include "numeric.h"
#include "pyramid.h"
#include "trellis_code.h"

namespace pcdvq {
namespace {

// Codes that are rows of the table: DIM levels each, 8 or 1.
template <int DIM>
struct TableCodec {
  static constexpr int kCodes = 8 / DIM;

  const int8_t* const table;

  explicit TableCodec(const Weights& w)
      : table(w.table), code_bits_(int(w.layout.pattern_bits + w.layout.magnitude_bits)) {}

  int octet_bits() const { return kCodes * code_bits_; }

  // Bytes that `octet` may read, from the byte of an octet's first bit on.
  int read_bytes() const { return ((kCodes - 1) * code_bits_ + 7) / 8 + 4; }

  // The octet whose first bit is bit `bit` of the row.
  inline Levels octet(const uint8_t* codes, int64_t bit) const {
    if (DIM == 8) return Levels::load8(table + row(codes, bit) * 8);
    int8_t levels[8];
    for (int i = 0; i < 8; ++i) levels[i] = table[row(codes, bit + i * code_bits_)];
    return Levels::load8(levels);
  }

 private:
  const int code_bits_;

  // [magnitude][pattern] is the order of the rows: no field is taken apart.
  inline int64_t row(const uint8_t* codes, int64_t bit) const {
    const uint64_t word = load_as<uint32_t>(codes + (bit >> 3));
    return int64_t(word >> (bit & 7) & ((uint64_t(1) << code_bits_) - 1));
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
    const uint8_t* codes = w.qweight + (row + r) * w.row_bytes;
    for (int64_t i = begin; i < safe; ++i) {
      codec.octet(codes, i * codec.octet_bits()).store8(octet_place(panel, i - begin));
    }
    if (safe == end) continue;
    uint8_t tail[RowSplit::kTailBytes];
    split.copy_tail(codes, w.row_bytes, tail);
    for (int64_t i = safe; i < end; ++i) {
      const int64_t bit = i * codec.octet_bits() - 8 * split.tail_byte;
      codec.octet(tail, bit).store8(octet_place(panel, i - begin));
    }
  }
}

Decoder find_decoder(const PcdvqLayout& layout) {
  Decoder decoder;
  if (find_offered(layout, &decoder)) return decoder;
  if (is_trellis(layout)) return {decode_chains, nullptr, nullptr};
  if (layout.pyramid_rows) return {decode<PyramidCodec>, nullptr, nullptr};
  if (layout.vector_dim == 8) return {decode<TableCodec<8>>, nullptr, nullptr};
  return {decode<TableCodec<1>>, nullptr, nullptr};
}

}  // namespace
}  // namespace pcdvq
