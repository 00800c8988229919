// Decodes octets: 8 consecutive levels, from one code or several. Included once per instruction
// set, after its target pragma and its `Vec8` and `Vec`.
#pragma once

#include <type_traits>

#include "isa.h"
#include "numeric.h"
#include "sign_masks.h"

#define PCDVQ_INLINE inline __attribute__((always_inline))

namespace pcdvq {
namespace {

constexpr int64_t kPrefetchBytes = 4096;
constexpr int kAnyStates = -1;

// Codes of a weight row and, for its states, of the row above; `keep` is 0 where a segment starts
// and all ones elsewhere.
struct Row {
  const uint8_t* codes;
  const uint8_t* above;
  uint64_t keep;
};

inline uint64_t keep_states(int64_t row) { return row % kSegmentRows ? ~uint64_t(0) : 0; }

// CODE_BITS 0: any code_bits, from the layout. STATES: state_bits of the trellis codec, whose
// patterns then are rotations; kAnyStates: both from the layout.
template <int DIM, int CODE_BITS, bool SIGNS, bool PARITY, int STATES = 0>
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
  // Whether a table with a row per code, signs included, stays in L1.
  static constexpr bool kSignedTable =
      DIM == 4 && SIGNS && !STATES && CODE_BITS && DIM << CODE_BITS <= kTableBytes;
  // Whether a table with a row per state and pattern, rotations made, stays in L1.
  static constexpr bool kRotatedTable =
      DIM == 4 && STATES > 0 && DIM << (STATES + CODE_BITS - kSignBits + PARITY) <= kTableBytes;
  // Whether the octets of a trellis codec are taken from 32-bit words.
  static constexpr bool kWords = STATES > 0 && kPeriod == 1 && kOctetBits > 16 && kOctetBits <= 32;
  // Largest offset in a byte of an octet's first bit.
  static constexpr int kMaxOffset = kPeriod ? 8 - 8 / kPeriod : 7;
  static_assert(kPeriod <= 1 || (kCodes == 1 && kSignBits % 8 == 0), "fields start as octets do");

  const int8_t* const table;

  explicit Codec(const Weights& w)
      : table(w.table),
        code_bits_(int(w.layout.sign_bits + w.layout.pattern_bits + w.layout.magnitude_bits)),
        state_bits_(int(w.layout.state_bits)),
        rotation_bits_(int(w.layout.rotation_bits)) {}

  int code_bits() const { return CODE_BITS ? CODE_BITS : code_bits_; }
  int state_bits() const { return STATES == kAnyStates ? state_bits_ : STATES; }
  int base_bits() const { return code_bits() - kSignBits - rotation_bits(); }
  int octet_bits() const { return kCodes * code_bits(); }

  // Bytes that `octet` may read, from the byte of an octet's first bit on.
  int read_bytes() const {
    const int last_field = STATES ? code_bits() - state_bits() : kSignBits;
    const int last = last_field > kSignBits ? last_field : kSignBits;
    if (kWords) return 4;
    return kPeriod == 1 ? kOctetBits / 8 : ((kCodes - 1) * code_bits() + last + 7) / 8 + 4;
  }

  // The octet whose first bit is bit `bit` from byte `byte` on.
  PCDVQ_INLINE Levels octet(const Row& row, int64_t byte, int64_t bit) const {
    const uint8_t* bytes = row.codes + byte;
    if (DIM == 1) return Levels::load_codes(bytes + (bit >> 3));
    uint64_t rows[kCodes];
    uint64_t rotations[kCodes] = {};
    uint64_t signs = 0;
    for (int i = 0; i < kCodes; ++i) {
      const int64_t first = bit + i * code_bits();
      if (kSignedTable) {
        rows[i] = field(bytes, first, i * CODE_BITS, CODE_BITS);
        continue;
      }
      const uint64_t code_signs = kSignBits ? field(bytes, first, i * CODE_BITS, kSignBits) : 0;
      uint64_t fields = field(bytes, first + kSignBits, i * CODE_BITS + kSignBits,
                              code_bits() - kSignBits);
      if (STATES) {
        const int at = code_bits() - state_bits();
        const uint64_t state = field(row.above + byte, first + at, i * CODE_BITS + at, state_bits());
        const int row_bits = kRotatedTable ? code_bits() - kSignBits : base_bits();
        rotations[i] = fields >> row_bits;
        fields = (fields & ((uint64_t(1) << row_bits) - 1)) | (state << row_bits & row.keep);
      }
      rows[i] = codeword_row(fields, code_signs);
      signs |= code_signs << (DIM * i);
    }
    if (DIM == 4 && CODE_BITS == 16) {  // both codes' signs at once
      signs = (load_as<uint32_t>(bytes + (bit >> 3)) & 0x000F000Fu) * 0x10010u >> 16;
    }
    const Levels levels = STATES && !kRotatedTable ? load_rotated(rows, rotations) : load(rows);
    return SIGNS && !kSignedTable ? levels.negate(signs) : levels;
  }

  // table[code] = levels of every code, for four dimensions. The loops are shaped to be vectorized:
  // this runs in every call.
  static void expand(const int8_t* codewords, int8_t* table) {
    constexpr int kCombinations = 16;  // of the signs, the lowest bits of a code
    uint32_t odd[kCombinations];
    int8_t negated[4 * kCombinations];
    for (int s = 0; s < kCombinations; ++s) {
      odd[s] = kSignMasks.parity[s] ? ~0u : 0;
      for (int j = 0; j < 4; ++j) negated[4 * s + j] = kSignMasks.factors[s][j] < 0 ? -1 : 0;
    }
    for (int64_t row = 0; row < (1 << CODE_BITS) / kCombinations; ++row) {
      const int8_t* p = codewords + 4 * codeword_row(row, 0);
      const uint32_t even = load_as<uint32_t>(p), change = even ^ load_as<uint32_t>(p + 4 * PARITY);
      uint32_t words[kCombinations];
      for (int s = 0; s < kCombinations; ++s) words[s] = even ^ (change & odd[s]);
      int8_t levels[sizeof(words)];
      std::memcpy(levels, words, sizeof(words));
      int8_t* out = table + row * int64_t(sizeof(words));
      for (size_t i = 0; i < sizeof(words); ++i) {
        out[i] = int8_t((levels[i] ^ negated[i]) - negated[i]);
      }
    }
  }

  // table[state][pattern][parity] = levels before signs, for four dimensions.
  static void expand_rotations(const int8_t* codewords, int8_t* table) {
    constexpr int64_t kStates = kRotatedTable ? 1 << STATES : 0;
    constexpr int64_t kRows =
        kRotatedTable ? 1 << (CODE_BITS - kSignBits - kRotationBits + PARITY) : 0;
    for (int64_t state = 0; state < kStates; ++state) {
      for (int rotation = 0; rotation < DIM; ++rotation) {
        for (int64_t row = 0; row < kRows; ++row) {
          const uint32_t word = load_as<uint32_t>(codewords + (state * kRows + row) * DIM);
          const uint32_t levels = uint32_t((uint64_t(word) << 32 | word) >> (8 * rotation));
          std::memcpy(table + ((state * DIM + rotation) * kRows + row) * DIM, &levels, DIM);
        }
      }
    }
  }

 private:
  const int code_bits_, state_bits_, rotation_bits_;

  static constexpr int kRotationBits = DIM == 8 ? 3 : DIM == 4 ? 2 : 1;
  int rotation_bits() const { return STATES == kAnyStates ? rotation_bits_ : STATES ? kRotationBits : 0; }

  // `width` bits of `bytes` from bit `bit` on, bit `position` of their octet.
  static PCDVQ_INLINE uint64_t field(const uint8_t* bytes, int64_t bit, int position, int width) {
    if (kWords) {
      const uint32_t word = load_as<uint32_t>(bytes + ((bit - position) >> 3));
      return word >> position & ((1u << width) - 1);
    }
    const uint8_t* p = bytes + (bit >> 3);
    const int end = width + (kPeriod == 1 ? position & 7 : kMaxOffset);
    const uint64_t word = !CODE_BITS || end > 16 ? load_as<uint32_t>(p)
                          : end > 8              ? load_as<uint16_t>(p)
                                                 : *p;
    return word >> (bit & 7) & ((uint64_t(1) << width) - 1);
  }

  // [magnitude][pattern][parity] is the order of the codewords, so no field is taken apart.
  static PCDVQ_INLINE uint64_t codeword_row(uint64_t row, uint64_t signs) {
    return PARITY ? 2 * row + kSignMasks.parity[signs] : row;
  }

  // Rotations are of bytes towards the lowest.
  PCDVQ_INLINE Levels load_rotated(const uint64_t* rows, const uint64_t* rotations) const {
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

  PCDVQ_INLINE Levels load(const uint64_t* rows) const {
    if (DIM == 8) return Levels::load8(table + rows[0] * 8);
    if (DIM == 4) return Levels::load4(table + rows[0] * 4, table + rows[1 % kCodes] * 4);
    uint16_t pairs[4];
    for (int i = 0; i < 4; ++i) pairs[i] = load_as<uint16_t>(table + rows[i % kCodes] * 2);
    return Levels::load8(reinterpret_cast<const int8_t*>(pairs));
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

inline Row weight_row(const Weights& w, int64_t row) {
  const uint8_t* codes = w.qweight + row * w.row_bytes;
  const uint64_t keep = keep_states(row);
  return {codes, keep ? codes - w.row_bytes : codes, keep};
}

// Calls step(octet index, bytes, bit) for `count` octets; `bytes` and `bit` are such that bit
// offsets become constants where the codec's period allows it. `bit` must be below 8.
template <class C, int STEP, class F>
PCDVQ_INLINE void for_octets(const C& codec, int64_t bit, int64_t count, F step) {
  constexpr int kUnroll = C::kPeriod > STEP ? C::kPeriod : STEP;
  int64_t i = 0;
  int64_t byte = 0;
  if (C::kPeriod && bit == 0) {
    for (; i + kUnroll <= count; i += kUnroll) {
#pragma GCC unroll 8
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
    const Row whole = weight_row(w, row + r);
    const auto run = [&](const Row& codes, int64_t base_bit, int64_t octets, float* out)
                         __attribute__((always_inline)) {
      for_octets<C, 1>(codec, base_bit, octets, [&](int64_t i, int64_t byte, int64_t offset)
                                                    __attribute__((always_inline)) {
        Vec8::convert(codec.octet(codes, byte, offset)).store(out + 8 * i);
      });
    };
    float* out = panel + r * kPanelColumns;
    run({whole.codes + (bit >> 3), whole.above + (bit >> 3), whole.keep}, bit & 7, split.safe, out);
    if (split.safe < count) {
      uint8_t tails[2][RowSplit::kTailBytes];
      split.copy_tail(whole.above, w.row_bytes, tails[0]);
      split.copy_tail(whole.codes, w.row_bytes, tails[1]);
      run({tails[1], tails[0], whole.keep}, split.tail_bit, count - split.safe,
          out + 8 * split.safe);
    }
  }
}

// Dot products of ROWS weight rows of a segment with X_ROWS activation rows, octets in registers.
// bytes[r + 1] are the codes of row r, bytes[0] of the row above; `keep` is for row 0.
template <class C, int ROWS, int X_ROWS>
PCDVQ_INLINE void fused_run(const C& codec, const uint8_t* const* bytes, uint64_t keep,
                            int64_t bit, int64_t count, const float* x, int64_t x_stride,
                            Vec (&sum)[ROWS][X_ROWS]) {
  constexpr int kStep = Vec::kLanes / 8;
  for_octets<C, kStep>(codec, bit, count, [&](int64_t i, int64_t byte, int64_t offset)
                                              __attribute__((always_inline)) {
    Vec a[X_ROWS];
    for (int m = 0; m < X_ROWS; ++m) a[m] = Vec::load(x + m * x_stride + 8 * i);
    for (int r = 0; r < ROWS; ++r) {
      const Row row = {bytes[r + 1], bytes[r], r ? ~uint64_t(0) : keep};
      const Vec b = decode_vec(codec, row, byte, offset);
      for (int m = 0; m < X_ROWS; ++m) sum[r][m] = fma(a[m], b, sum[r][m]);
    }
  });
}

// The hardware follows each weight row, but has to start over at the next ones: short rows end
// before it is under way. Addresses past the end of the weights are harmless.
PCDVQ_INLINE void prefetch_rows(const uint8_t* bytes, int64_t count) {
  const int64_t limit = count < kPrefetchBytes ? count : kPrefetchBytes;
  for (int64_t i = 0; i < limit; i += 64) __builtin_prefetch(bytes + i);
}

template <class C, int ROWS, int X_ROWS>
void fused_rows(const Weights& w, int64_t row, const float* x, int64_t x_stride, int64_t octets,
                float* out, int64_t out_stride) {
  const C codec(w);
  const RowSplit split(codec, w.row_bytes, 0, octets);
  const Row top = weight_row(w, row);
  uint8_t tails[ROWS + 1][RowSplit::kTailBytes];
  const uint8_t* bytes[ROWS + 1] = {top.above};
  Vec sum[ROWS][X_ROWS];
  for (int r = 0; r < ROWS; ++r) {
    bytes[r + 1] = top.codes + r * w.row_bytes;
    for (int m = 0; m < X_ROWS; ++m) sum[r][m] = Vec::broadcast(0.0f);
  }
  prefetch_rows(top.codes + ROWS * w.row_bytes, ROWS * w.row_bytes);
  fused_run(codec, bytes, top.keep, 0, split.safe, x, x_stride, sum);
  if (split.safe < octets) {
    for (int r = 0; r <= ROWS; ++r) {
      split.copy_tail(bytes[r], w.row_bytes, tails[r]);
      bytes[r] = tails[r];
    }
    fused_run(codec, bytes, top.keep, split.tail_bit, octets - split.safe, x + 8 * split.safe,
              x_stride, sum);
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
  static_assert(kSegmentRows % 4 == 0 && kPanelRows % 4 == 0, "four rows share a segment");
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
  return {decode<C>, fused<C>,
          C::kSignedTable    ? C::expand
          : C::kRotatedTable ? C::expand_rotations
                             : nullptr};
}

template <int DIM>
Decoder generic_decoder(const PcdvqLayout& layout) {
  if (layout.state_bits) {
    return layout.parity ? make_decoder<Codec<DIM, 0, true, true, kAnyStates>>()
                         : make_decoder<Codec<DIM, 0, true, false, kAnyStates>>();
  }
  if (layout.parity) return make_decoder<Codec<DIM, 0, true, true>>();
  return layout.sign_bits ? make_decoder<Codec<DIM, 0, true, false>>()
                          : make_decoder<Codec<DIM, 0, false, false>>();
}

template <int DIM, int CODE_BITS, bool SIGNS, bool PARITY, int STATES = 0>
bool match(const PcdvqLayout& layout, Decoder* decoder) {
  const bool same = layout.vector_dim == DIM && layout.state_bits == STATES &&
                    (STATES ? int64_t(1) << layout.rotation_bits == DIM : !layout.rotation_bits) && (layout.sign_bits > 0) == SIGNS &&
                    (layout.parity > 0) == PARITY &&
                    layout.sign_bits + layout.pattern_bits + layout.magnitude_bits == CODE_BITS;
  if (same) *decoder = make_decoder<Codec<DIM, CODE_BITS, SIGNS, PARITY, STATES>>();
  return same;
}

Decoder find_decoder(const PcdvqLayout& layout) {
  Decoder decoder = layout.vector_dim == 8   ? generic_decoder<8>(layout)
                    : layout.vector_dim == 4 ? generic_decoder<4>(layout)
                                             : generic_decoder<2>(layout);
  match<1, 8, false, false>(layout, &decoder) || match<8, 16, true, true>(layout, &decoder) ||
      match<8, 18, true, true>(layout, &decoder) || match<8, 16, false, false>(layout, &decoder) ||
      match<8, 18, false, false>(layout, &decoder) ||
      match<4, 12, true, true>(layout, &decoder) || match<4, 16, true, false>(layout, &decoder) ||
      match<8, 16, true, true, 3>(layout, &decoder) ||
      match<8, 18, true, true, 3>(layout, &decoder) ||
      match<4, 12, true, true, 3>(layout, &decoder) ||
      match<4, 16, true, false, 2>(layout, &decoder);
  return decoder;
}

}  // namespace
}  // namespace pcdvq
