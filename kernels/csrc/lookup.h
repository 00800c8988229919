// Decodes the offered layouts, 32 weights at a time, for AVX2: signed and trellis codecs here.
// Included once per instruction set that has it, after its target pragma.
//
// Columns are taken in units of 128, in the order that isa.h explains: the low half of a register
// belongs to the first 64 columns of a unit, the high half to the last 64.
#pragma once

#include <immintrin.h>

#include <type_traits>

#include "isa.h"
#include "numeric.h"

#define PCDVQ_INLINE inline __attribute__((always_inline))

namespace pcdvq {
namespace {

using Bytes = __m256i;

inline Bytes load_bytes(const void* p) {
  return _mm256_loadu_si256(static_cast<const Bytes*>(p));
}

// Both halves of a register from memory.
inline Bytes load_halves(const uint8_t* low, const uint8_t* high) {
  const __m128i* p = reinterpret_cast<const __m128i*>(low);
  const __m128i* q = reinterpret_cast<const __m128i*>(high);
  return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(p)), _mm_loadu_si128(q), 1);
}

// Eight levels at each pointer.
inline __m128i two_rows(const int8_t* a, const int8_t* b) {
  const __m128d low = _mm_castsi128_pd(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(a)));
  return _mm_castpd_si128(_mm_loadh_pd(low, reinterpret_cast<const double*>(b)));
}

constexpr int log2_of(int value) { return value <= 1 ? 0 : 1 + log2_of(value / 2); }

// Signed codecs (STATES 0) and trellis codecs. Rows of the table are codewords, of trellis codecs
// each twice in a row: a rotated codeword is then an unaligned piece of it.
template <int DIM, int CODE_BITS, bool PARITY, int STATES>
struct Lookup {
  static constexpr int kRotationBits = STATES ? log2_of(DIM) : 0;
  static constexpr int kBaseBits = CODE_BITS - DIM - kRotationBits;
  static constexpr int kRowBytes = STATES ? 2 * DIM : DIM;
  static constexpr int kCodewords = 1 << (kBaseBits + PARITY + STATES);
  static_assert(!STATES || kRowBytes * kCodewords <= kTableBytes, "the table is on the stack");

  // The offset of a code in the table: rotation | parity | base | state, from the lowest bit on.
  static constexpr int kParityAt = log2_of(kRowBytes);
  static constexpr int kBaseAt = kParityAt + PARITY;
  static constexpr int kStateAt = kBaseAt + kBaseBits;

  static constexpr bool kWide = CODE_BITS > 16;  // a code per dword, else per word
  using Offset = std::conditional_t<kWide, uint32_t, uint16_t>;
  static constexpr int kHalfBytes = 64 / DIM * CODE_BITS / 8;  // codes of 64 columns
  static constexpr int kUnitBytes = 2 * kHalfBytes;
  // A unit's codes are loaded in one or two pieces, the second one up to the end of each half.
  static constexpr int kPieces = kHalfBytes <= 16 ? 1 : 2;
  static constexpr int kVectors = kUnitVectors / kPieces;  // of levels, from a piece
  static constexpr int kCodes = kWide ? 8 : 16;            // in a piece
  static constexpr int piece_byte(int piece) { return piece ? kHalfBytes - 16 : 0; }

  static constexpr bool kSignedLevels = false;  // else a level and its sign apart
  static constexpr bool kRowsFirst = false;  // `dots` loads units of all rows before it uses any

  struct Constants {
    alignas(32) uint8_t sign_byte[kUnitVectors][32];  // of a piece, where a level's sign bit is
    alignas(32) uint8_t sign_bit[kUnitVectors][32];
    alignas(32) uint8_t code_byte[kPieces][32];  // of a piece, for each byte of the codes' lanes
    alignas(32) uint32_t code_shift[kPieces][8];
  };
  static constexpr Constants make_constants() {
    Constants c = {};
    for (int b = 0; b < 32; ++b) {
      for (int v = 0; v < kUnitVectors; ++v) {
        const int column = 16 * v + b % 16;
        const int bit = column / DIM * CODE_BITS + column % DIM - 8 * piece_byte(v / kVectors);
        c.sign_byte[v][b] = uint8_t(bit / 8);
        c.sign_bit[v][b] = uint8_t(1 << bit % 8);
      }
      for (int piece = 0; piece < kPieces; ++piece) {
        const int code = piece * kCodes / 2 + b % 16 / int(sizeof(Offset));
        const int bit = code * CODE_BITS - 8 * piece_byte(piece);
        const int byte = bit / 8 + b % int(sizeof(Offset));
        c.code_byte[piece][b] = uint8_t(byte < 16 ? byte : 0x80);
        if (b % 4 == 0) c.code_shift[piece][b / 4] = uint32_t(bit % 8);
      }
    }
    return c;
  }
  static constexpr Constants kConstants = make_constants();

  static PCDVQ_INLINE Bytes set(int value) {
    return kWide ? _mm256_set1_epi32(value) : _mm256_set1_epi16(int16_t(value));
  }

  template <int RIGHT>
  static PCDVQ_INLINE Bytes shift(Bytes v) {
    constexpr int kBits = RIGHT < 0 ? -RIGHT : RIGHT;
    if (kWide) return RIGHT < 0 ? _mm256_slli_epi32(v, kBits) : _mm256_srli_epi32(v, kBits);
    return RIGHT < 0 ? _mm256_slli_epi16(v, kBits) : _mm256_srli_epi16(v, kBits);
  }

  static PCDVQ_INLINE Bytes load_piece(const uint8_t* unit, int piece) {
    if (kHalfBytes == 16) return load_bytes(unit);
    return load_halves(unit + piece_byte(piece), unit + kHalfBytes + piece_byte(piece));
  }

  // A code in the low bits of each lane, other bits above them.
  static PCDVQ_INLINE Bytes codes(Bytes bytes, int piece) {
    if (CODE_BITS == 16) return bytes;
    const Bytes lanes = _mm256_shuffle_epi8(bytes, load_bytes(kConstants.code_byte[piece]));
    if (kWide) return _mm256_srlv_epi32(lanes, load_bytes(kConstants.code_shift[piece]));
    static_assert(CODE_BITS == 12 || CODE_BITS >= 16, "every other code starts inside of a byte");
    return _mm256_blend_epi16(lanes, _mm256_srli_epi16(lanes, 4), 0xAA);
  }

  // What the codes of a row add to the offsets of the row below.
  static PCDVQ_INLINE Bytes states(Bytes codes) {
    constexpr int kMask = ((1 << STATES) - 1) << kStateAt;
    return _mm256_and_si256(shift<CODE_BITS - STATES - kStateAt>(codes), set(kMask));
  }

  static PCDVQ_INLINE Bytes parities(Bytes codes) {
    const Bytes odd = _mm256_setr_epi8(0, 1, 1, 0, 1, 0, 0, 1, 1, 0, 0, 1, 0, 1, 1, 0,  //
                                       0, 1, 1, 0, 1, 0, 0, 1, 1, 0, 0, 1, 0, 1, 1, 0);
    const Bytes nibble = DIM == 8 ? _mm256_xor_si256(codes, shift<4>(codes)) : codes;
    const Bytes table = _mm256_slli_epi16(odd, kParityAt);
    return _mm256_shuffle_epi8(table, _mm256_and_si256(nibble, set(15)));
  }

  static PCDVQ_INLINE Bytes offsets(Bytes codes) {
    constexpr int kMask = ((1 << kBaseBits) - 1) << kBaseAt;
    Bytes sum = _mm256_and_si256(shift<DIM - kBaseAt>(codes), set(kMask));
    if (PARITY) sum = _mm256_or_si256(sum, parities(codes));
    if (STATES) {
      const Bytes rotation = shift<CODE_BITS - kRotationBits>(codes);
      sum = _mm256_or_si256(sum, _mm256_and_si256(rotation, set(DIM - 1)));
    }
    return sum;
  }

  // 16 levels before signs, from codes that follow each other; `at` is the first one's offset.
  static PCDVQ_INLINE __m128i half_levels(const int8_t* table, const Offset* at) {
    if (DIM == 8) return two_rows(table + at[0], table + at[1]);
    // A load of four offsets and shifts take less time than four loads.
    const uint64_t four = load_as<uint64_t>(at);
    const auto row = [=](int i) __attribute__((always_inline)) {
      return load_as<int32_t>(table + uint16_t(four >> (16 * i)));
    };
    const __m128i a = _mm_insert_epi32(_mm_cvtsi32_si128(row(0)), row(1), 1);
    return _mm_insert_epi32(_mm_insert_epi32(a, row(2), 2), row(3), 3);
  }

  // Vector `v` of a piece's levels before signs; `at` are the offsets of the piece.
  static PCDVQ_INLINE Bytes levels(const int8_t* table, const Offset* at, int v) {
    const Offset* low = at + v * (16 / DIM);
    const __m128i high = half_levels(table, low + kCodes / 2);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(half_levels(table, low)), high, 1);
  }

  // All ones where a level of vector `v` of the unit is negative.
  static PCDVQ_INLINE Bytes negative(Bytes piece, int v) {
    const Bytes bit = load_bytes(kConstants.sign_bit[v]);
    const Bytes byte = _mm256_shuffle_epi8(piece, load_bytes(kConstants.sign_byte[v]));
    return _mm256_cmpeq_epi8(_mm256_and_si256(byte, bit), bit);
  }

  // What a unit of a row adds to the offsets of the row below.
  struct States {
    Bytes of_piece[kPieces];
  };

  static PCDVQ_INLINE States no_states() {
    States none;
    for (Bytes& piece : none.of_piece) piece = _mm256_setzero_si256();
    return none;
  }

  static PCDVQ_INLINE States states_of(const uint8_t* unit) {
    States all;
    for (int i = 0; i < kPieces; ++i) all.of_piece[i] = states(codes(load_piece(unit, i), i));
    return all;
  }

  // A unit of a row, of which levels are then asked for.
  struct Unit {
    Bytes bytes[kPieces];
    alignas(32) Offset offsets[kPieces][kCodes];

    // Piece `i`. `states` are of the row above, and then of this row.
    PCDVQ_INLINE void load(const int8_t*, const uint8_t* unit, int i, States& all) {
      bytes[i] = load_piece(unit, i);
      const Bytes c = codes(bytes[i], i);
      const Bytes at = _mm256_or_si256(Lookup::offsets(c), all.of_piece[i]);
      _mm256_store_si256(reinterpret_cast<Bytes*>(offsets[i]), at);
      // Or gcc would take the offsets from the register one by one, which takes longer than loads.
      __asm__("" : "+m"(offsets[i]));
      all.of_piece[i] = states(c);
    }

    PCDVQ_INLINE Bytes unsigned_levels(const int8_t* table, int v) const {
      return levels(table, offsets[v / kVectors], v % kVectors);
    }

    PCDVQ_INLINE Bytes signed_levels(const int8_t* table, int v) const {
      const Bytes sign = _mm256_or_si256(negative(bytes[v / kVectors], v), _mm256_set1_epi8(1));
      return _mm256_sign_epi8(unsigned_levels(table, v), sign);
    }
  };

  // The table of a trellis codec.
  static void expand(const int8_t* codewords, int8_t* table) {
    for (int64_t row = 0; row < kCodewords; ++row) {
      std::memcpy(table + row * kRowBytes, codewords + row * DIM, DIM);
      std::memcpy(table + row * kRowBytes + DIM, codewords + row * DIM, DIM);
    }
  }
};

}  // namespace
}  // namespace pcdvq
