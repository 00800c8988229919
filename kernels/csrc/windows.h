// Codec `compact` (FORMAT.md, "Windows"): its layouts, and a decoder for any instruction set. Included
// once per instruction set, after its `Levels`.
#pragma once

#include "pyramid.h"

namespace pcdvq {
namespace {

constexpr int kWindowDim = 4;
constexpr int kWindowRows = 128;  // of a table [kWindowRows, kWindowDim]

inline bool is_windows(const PcdvqLayout& layout) { return layout.state_bits && !layout.sign_bits; }

// Bits that a coordinate has in a code of `code_bits` beside its two of the stream.
constexpr int extra_bits(int64_t code_bits) { return int(code_bits - 8) / kWindowDim; }

// Bits of a window that come before those of its coordinate, and of a state.
constexpr int older_bits(int extra) { return 5 - extra; }

// What `decode` of codec.h asks for.
struct WindowCodec {
  const int8_t* const table;

  explicit WindowCodec(const Weights& w)
      : table(w.table), code_bits_(int(w.layout.pattern_bits)), extra_(extra_bits(code_bits_)) {}

  int octet_bits() const { return 2 * code_bits_; }
  int read_bytes() const { return code_bits_ / 8 + 8; }

  inline Levels octet(const Row& row, int64_t bit) const {
    const int older = older_bits(extra_), ones = (1 << extra_) - 1;
    int8_t levels[2 * kWindowDim];
    for (int i = 0; i < 2; ++i, bit += code_bits_) {
      const uint32_t code = code_at(row.codes, bit), above = code_at(row.above, bit);
      const uint32_t fresh = code >> (kWindowDim * extra_);
      const uint32_t state = above >> (code_bits_ - older) & uint32_t(row.keep);
      const uint32_t stream = state | fresh >> 1 << older | (fresh & 1) << (older + 7);
      for (int j = 0; j < kWindowDim; ++j) {
        const uint32_t window = stream >> (2 * j) & ((4u << older) - 1);
        const uint32_t extra = code >> (extra_ * j) & uint32_t(ones);
        const uint32_t index = window | extra << (older + 2);
        levels[kWindowDim * i + j] = table[index * kWindowDim + uint32_t(j)];
      }
    }
    return Levels::load8(levels);
  }

 private:
  const int code_bits_, extra_;

  uint32_t code_at(const uint8_t* bytes, int64_t bit) const {
    return load_as<uint32_t>(bytes + (bit >> 3)) >> (bit & 7) & ((1u << code_bits_) - 1);
  }
};

}  // namespace
}  // namespace pcdvq
