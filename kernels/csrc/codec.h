// Decodes octets: 8 consecutive levels, from one code or several. Included once per instruction
// set, after its target pragma and its `Vec8` and `Vec`.
#pragma once

#include "isa.h"
#include "numeric.h"
#include "sign_masks.h"

#define PCDVQ_INLINE inline __attribute__((always_inline))

namespace pcdvq {
namespace {

// CODE_BITS 0: any code_bits, from the layout. Otherwise an octet's codes fit one word.
template <int DIM, int CODE_BITS, bool SIGNS, bool PARITY>
struct Codec {
  static constexpr int kCodes = 8 / DIM;
  static constexpr int kSignBits = SIGNS ? DIM : 0;
  static constexpr int kOctetBits = kCodes * CODE_BITS;
  // Octets after which the bit offset in a byte repeats; 0: unknown.
  static constexpr int kPeriod = !CODE_BITS            ? 0
                                 : kOctetBits % 8 == 0 ? 1
                                 : kOctetBits % 4 == 0 ? 2
                                 : kOctetBits % 2 == 0 ? 4
                                                       : 8;
  static constexpr bool kWord32 = kPeriod == 1 ? kOctetBits <= 32 : kOctetBits + 7 <= 32;
  // Small tables are expanded to fp32, the smallest with a row per code, signs included.
  static constexpr bool kSignedTable = CODE_BITS && DIM << CODE_BITS <= kTableFloats;
  static constexpr bool kFloatTable =
      CODE_BITS && DIM << (CODE_BITS - kSignBits + PARITY) <= kTableFloats;
  static_assert(kOctetBits + 7 <= 64, "an octet's codes must fit one word");

  const void* table;
  int code_bits;

  explicit Codec(const Weights& w)
      : table(w.table),
        code_bits(int(w.layout.sign_bits + w.layout.pattern_bits + w.layout.magnitude_bits)) {}

  int octet_bits() const { return CODE_BITS ? kOctetBits : kCodes * code_bits; }

  // Bytes that `octet` may read, from the byte of an octet's first bit on.
  int read_bytes() const {
    if (CODE_BITS == 0) return ((kCodes - 1) * code_bits + 7) / 8 + 4;
    return kOctetBits == 16 ? 2 : kWord32 ? 4 : 8;
  }

  // The octet whose first bit is bit `bit` of `bytes`.
  PCDVQ_INLINE Vec8 octet(const uint8_t* bytes, int64_t bit) const {
    uint64_t word = 0;
    if (CODE_BITS) {
      const uint8_t* p = bytes + (bit >> 3);
      word = kOctetBits == 16 ? load_as<uint16_t>(p)
             : kWord32        ? load_as<uint32_t>(p)
                              : load_as<uint64_t>(p);
      if (kPeriod > 1) word >>= bit & 7;
    }
    uint64_t rows[kCodes];
    uint32_t signs = 0;
    for (int i = 0; i < kCodes; ++i) {
      uint32_t code;
      if (CODE_BITS) {
        code = uint32_t(word >> (i * CODE_BITS)) & ((1u << CODE_BITS) - 1);
      } else {
        const int64_t first = bit + i * code_bits;
        code = load_as<uint32_t>(bytes + (first >> 3)) >> (first & 7);
        code &= (1u << code_bits) - 1;
      }
      rows[i] = kSignedTable ? code : codeword_row(code);
      signs |= (code & kSignMask) << (DIM * i);
    }
    const Vec8 levels = kFloatTable ? float_levels(rows) : int8_levels(rows);
    return SIGNS && !kSignedTable ? levels.negate(signs) : levels;
  }

  static void expand(const PcdvqLayout& layout, const int8_t* codewords, float* table) {
    if (!kSignedTable) {
      const int64_t count = DIM << (layout.pattern_bits + layout.parity + layout.magnitude_bits);
      for (int64_t i = 0; i < count; ++i) table[i] = codewords[i];
      return;
    }
    for (uint32_t code = 0; code < 1u << CODE_BITS; ++code) {
      for (int j = 0; j < DIM; ++j) {
        const float level = codewords[codeword_row(code) * DIM + j];
        table[code * DIM + j] = (code & kSignMask) >> j & 1 ? -level : level;
      }
    }
  }

 private:
  static constexpr uint32_t kSignMask = (1u << kSignBits) - 1;

  // [magnitude][pattern][parity] is the order of the codewords, so no field is taken apart.
  static PCDVQ_INLINE uint32_t codeword_row(uint32_t code) {
    const uint32_t row = code >> kSignBits;
    return PARITY ? 2 * row + kSignMasks.parity[code & kSignMask] : row;
  }

  PCDVQ_INLINE Vec8 float_levels(const uint64_t* rows) const {
    const float* p = static_cast<const float*>(table);
    if (DIM == 8) return Vec8::load(p + rows[0] * 8);
    if (DIM == 4) return Vec8::load4(p + rows[0] * 4, p + rows[1 % kCodes] * 4);
    return Vec8::load2(p + rows[0] * 2, p + rows[1 % kCodes] * 2, p + rows[2 % kCodes] * 2,
                       p + rows[3 % kCodes] * 2);
  }

  PCDVQ_INLINE Vec8 int8_levels(const uint64_t* rows) const {
    const int8_t* p = static_cast<const int8_t*>(table);
    if (DIM == 8) return Vec8::load8_int8(p + rows[0] * 8);
    if (DIM == 4) return Vec8::load4_int8(p + rows[0] * 4, p + rows[1 % kCodes] * 4);
    uint16_t pairs[4];
    for (int i = 0; i < 4; ++i) pairs[i] = load_as<uint16_t>(p + rows[i % kCodes] * 2);
    return Vec8::load8_int8(reinterpret_cast<const int8_t*>(pairs));
  }
};

// Where the octets of a weight row are read: in place, and the last ones from a padded copy,
// because the last row may end where the mapped memory ends.
struct RowSplit {
  int64_t safe;       // octets, from the first on, whose words end inside the row
  int64_t tail_byte;  // first byte of the copy
  int tail_bit;       // offset in the copy of the first octet after those

  template <class C>
  RowSplit(const C& codec, int64_t row_bytes, int64_t first, int64_t count) {
    const int64_t spare_bits = 8 * (row_bytes - codec.read_bytes() + 1);
    const int64_t safe_end = spare_bits > 0 ? (spare_bits - 1) / codec.octet_bits() + 1 : 0;
    safe = safe_end < first ? 0 : safe_end - first < count ? safe_end - first : count;
    safe -= safe % (Vec::kLanes / 8);
    const int64_t bit = (first + safe) * codec.octet_bits();
    tail_byte = bit >> 3;
    tail_bit = int(bit & 7);
  }

  // At most two octets' words and the rest of an octet, under 16 bytes each, are copied.
  static constexpr int64_t kTailBytes = 64;

  void copy_tail(const uint8_t* row, int64_t row_bytes, uint8_t* tail) const {
    std::memset(tail, 0, kTailBytes);
    std::memcpy(tail, row + tail_byte, size_t(row_bytes - tail_byte));
  }
};

// Calls step(octet index, bytes, bit) for `count` octets; `bytes` and `bit` are such that bit
// offsets become constants where the codec's period allows it. `bit` must be below 8.
template <class C, int STEP, class F>
PCDVQ_INLINE void for_octets(const C& codec, int64_t bit, int64_t count, F step) {
  constexpr int kUnroll = C::kPeriod > STEP ? C::kPeriod : STEP;
  int64_t i = 0;
  int64_t byte = 0;
  if (C::kPeriod && bit == 0) {
    for (; i + kUnroll <= count; i += kUnroll) {
      for (int u = 0; u < kUnroll; u += STEP) step(i + u, byte, u * C::kOctetBits);
      byte += kUnroll * C::kOctetBits / 8;
    }
  }
  for (; i < count; i += STEP) step(i, byte, bit), bit += STEP * codec.octet_bits();
}

template <class C>
void decode(const Weights& w, int64_t row, int64_t rows, int64_t first, int64_t count,
            float* panel) {
  const C codec(w);
  const RowSplit split(codec, w.row_bytes, first, count);
  const int64_t bit = first * codec.octet_bits();
  for (int64_t r = 0; r < rows; ++r) {
    const uint8_t* bytes = w.qweight + (row + r) * w.row_bytes;
    const auto run = [&](const uint8_t* base, int64_t base_bit, int64_t octets, float* out)
                         __attribute__((always_inline)) {
      for_octets<C, 1>(codec, base_bit, octets, [&](int64_t i, int64_t byte, int64_t offset)
                                                    __attribute__((always_inline)) {
        codec.octet(base + byte, offset).store(out + 8 * i);
      });
    };
    float* out = panel + r * kPanelColumns;
    run(bytes + (bit >> 3), bit & 7, split.safe, out);
    if (split.safe < count) {
      uint8_t tail[RowSplit::kTailBytes];
      split.copy_tail(bytes, w.row_bytes, tail);
      run(tail, split.tail_bit, count - split.safe, out + 8 * split.safe);
    }
  }
}

// Dot products of ROWS weight rows at `bytes` with X_ROWS activation rows, octets in registers.
template <class C, int ROWS, int X_ROWS>
PCDVQ_INLINE void fused_run(const C& codec, const uint8_t* const* bytes, int64_t bit,
                            int64_t count, const float* x, int64_t x_stride,
                            Vec (&sum)[ROWS][X_ROWS]) {
  constexpr int kStep = Vec::kLanes / 8;
  for_octets<C, kStep>(codec, bit, count, [&](int64_t i, int64_t byte, int64_t offset)
                                              __attribute__((always_inline)) {
    Vec a[X_ROWS];
    for (int m = 0; m < X_ROWS; ++m) a[m] = Vec::load(x + m * x_stride + 8 * i);
    for (int r = 0; r < ROWS; ++r) {
      const Vec b = decode_vec(codec, bytes[r] + byte, offset);
      for (int m = 0; m < X_ROWS; ++m) sum[r][m] = fma(a[m], b, sum[r][m]);
    }
  });
}

template <class C, int ROWS, int X_ROWS>
void fused_rows(const Weights& w, int64_t row, const float* x, int64_t x_stride, int64_t octets,
                float* out, int64_t out_stride) {
  const C codec(w);
  const RowSplit split(codec, w.row_bytes, 0, octets);
  uint8_t tails[ROWS][RowSplit::kTailBytes];
  const uint8_t* bytes[ROWS];
  Vec sum[ROWS][X_ROWS];
  for (int r = 0; r < ROWS; ++r) {
    bytes[r] = w.qweight + (row + r) * w.row_bytes;
    for (int m = 0; m < X_ROWS; ++m) sum[r][m] = Vec::broadcast(0.0f);
  }
  fused_run(codec, bytes, 0, split.safe, x, x_stride, sum);
  if (split.safe < octets) {
    for (int r = 0; r < ROWS; ++r) {
      split.copy_tail(bytes[r], w.row_bytes, tails[r]);
      bytes[r] = tails[r];
    }
    fused_run(codec, bytes, split.tail_bit, octets - split.safe, x + 8 * split.safe, x_stride,
              sum);
  }
  for (int r = 0; r < ROWS; ++r) {
    for (int m = 0; m < X_ROWS; ++m) {
      alignas(64) float lanes[Vec::kLanes];
      sum[r][m].store(lanes);
      out[m * out_stride + r] = Vec::sum(lanes);
    }
  }
}

template <class C>
void fused(const Weights& w, int64_t row, int64_t rows, const float* x, int64_t x_stride,
           int64_t x_rows, int64_t octets, float* out) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    const auto run = x_rows == 1 ? fused_rows<C, 4, 1> : fused_rows<C, 4, 2>;
    run(w, row + r, x, x_stride, octets, out + r, rows);
  }
  for (; r < rows; ++r) {
    const auto run = x_rows == 1 ? fused_rows<C, 1, 1> : fused_rows<C, 1, 2>;
    run(w, row + r, x, x_stride, octets, out + r, rows);
  }
}

template <class C>
constexpr Decoder make_decoder() {
  return {decode<C>, fused<C>, C::kFloatTable ? C::expand : nullptr};
}

template <int DIM>
Decoder generic_decoder(const PcdvqLayout& layout) {
  if (layout.parity) return make_decoder<Codec<DIM, 0, true, true>>();
  return layout.sign_bits ? make_decoder<Codec<DIM, 0, true, false>>()
                          : make_decoder<Codec<DIM, 0, false, false>>();
}

template <int DIM, int CODE_BITS, bool SIGNS, bool PARITY>
bool match(const PcdvqLayout& layout, Decoder* decoder) {
  const bool same = layout.vector_dim == DIM && (layout.sign_bits > 0) == SIGNS &&
                    (layout.parity > 0) == PARITY &&
                    layout.sign_bits + layout.pattern_bits + layout.magnitude_bits == CODE_BITS;
  if (same) *decoder = make_decoder<Codec<DIM, CODE_BITS, SIGNS, PARITY>>();
  return same;
}

Decoder find_decoder(const PcdvqLayout& layout) {
  Decoder decoder = layout.vector_dim == 8   ? generic_decoder<8>(layout)
                    : layout.vector_dim == 4 ? generic_decoder<4>(layout)
                                             : generic_decoder<2>(layout);
  match<8, 16, true, true>(layout, &decoder) || match<8, 18, true, true>(layout, &decoder) ||
      match<8, 16, false, false>(layout, &decoder) ||
      match<8, 18, false, false>(layout, &decoder) ||
      match<4, 12, true, true>(layout, &decoder) || match<4, 16, true, false>(layout, &decoder) ||
      match<2, 8, true, false>(layout, &decoder);
  return decoder;
}

}  // namespace
}  // namespace pcdvq
