// Products of int8 activations with blocks (block_decode.h), for AVX-512 with VNNI. Included once.
//
// Of each block an output gets the exact sum of 64 products, at most 64 * 127 * 255 < 2^21 in
// magnitude, which a float holds; it is scaled and added to the blocks before. So the bits of an
// output depend neither on the tile it falls in nor on the order of columns inside a block, and no
// integer overflows, whatever K is. (The int8 activations of a row that has a NaN or an infinity may
// be -128: the sums still fit, and their scale makes the output NaN or infinite.)
#pragma once

#include "block_codes.h"
#include "block_nibbles.h"
#include "block_windows.h"
#include "quantize.h"

namespace pcdvq {
namespace {

// In assembly because gcc 12 copies the accumulators of the intrinsic.
PCDVQ_INLINE void add_dots(Wide& sum, Wide levels, Wide x) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(levels), "v"(x));
}

// The same where x is the four columns at `x`, which every row has to be multiplied with.
PCDVQ_INLINE void add_dots(Wide& sum, Wide levels, const int8_t* x) {
  using Four = int32_t __attribute__((may_alias));
  const Four& four = *reinterpret_cast<const Four*>(x);
  __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(levels), "m"(four));
}

// total + scale * sum, of one block.
PCDVQ_INLINE __m512 add_scaled(Wide sum, float scale, __m512 total) {
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(scale), total);
}

PCDVQ_INLINE Wide four_columns(const int8_t* x) { return _mm512_set1_epi32(load_as<int32_t>(x)); }

template <int ROWS>
PCDVQ_INLINE void block_tile(const BlockTiles& t, int64_t row) {
  constexpr int kStrips = 2;  // their sums fit into registers, as integers and as floats
  const BlockRows x = t.x.from(row, 0);
  for (int first = 0; first < kPanelStrips; first += kStrips) {
    float* acc = t.acc + (row * kPanelStrips + first) * kBlockRows;
    const uint8_t* levels = t.levels + first * kStepBytes;
    __m512 total[ROWS][kStrips];
    for (int i = 0; i < ROWS; ++i) {
      for (int j = 0; j < kStrips; ++j) {
        total[i][j] = _mm512_loadu_ps(acc + (i * kPanelStrips + j) * kBlockRows);
      }
    }
    for (int64_t b = 0; b < t.blocks; ++b) {
      Wide sum[ROWS][kStrips];
      for (int i = 0; i < ROWS; ++i) {
        for (Wide& start : sum[i]) start = _mm512_set1_epi32(x.corrections[i * x.scale_stride + b]);
      }
#pragma GCC unroll 4
      for (int s = 0; s < kBlockSteps; ++s, levels += kPanelStrips * kStepBytes) {
        Wide w[kStrips];
        for (int j = 0; j < kStrips; ++j) w[j] = _mm512_load_si512(levels + j * kStepBytes);
        for (int i = 0; i < ROWS; ++i) {
          const Wide four = four_columns(x.levels + i * x.stride + b * kScaleColumns + 4 * s);
          for (int j = 0; j < kStrips; ++j) add_dots(sum[i][j], w[j], four);
        }
      }
      for (int i = 0; i < ROWS; ++i) {
        const float scale = x.scales[i * x.scale_stride + b];
        for (int j = 0; j < kStrips; ++j) total[i][j] = add_scaled(sum[i][j], scale, total[i][j]);
      }
    }
    for (int i = 0; i < ROWS; ++i) {
      for (int j = 0; j < kStrips; ++j) {
        _mm512_storeu_ps(acc + (i * kPanelStrips + j) * kBlockRows, total[i][j]);
      }
    }
  }
}

// Tiles of MOST rows, then the rest.
template <int MOST>
void block_tiles(const BlockTiles& t, int64_t row) {
  for (; row + MOST <= t.rows; row += MOST) block_tile<MOST>(t, row);
  if constexpr (MOST > 1) {
    if (row < t.rows) block_tiles<MOST - 1>(t, row);
  }
}

// 24 accumulators, of 32 registers.
void accumulate_blocks(const BlockTiles& t) { block_tiles<6>(t, 0); }

// Sums of a block and ROWS rows of activations; a sink, which multiplies steps as they are decoded.
template <int ROWS>
class BlockSums {
 public:
  PCDVQ_INLINE BlockSums(const BlockRows& x, int64_t block) : x_(x), block_(block) {
    for (int i = 0; i < ROWS; ++i) {
      sums_[i][0] = _mm512_set1_epi32(x.corrections[i * x.scale_stride + block]);
      for (int t = 1; t < kTurns; ++t) sums_[i][t] = _mm512_setzero_si512();
    }
  }

  PCDVQ_INLINE void operator()(int s, int turn, Wide levels) {
    const int8_t* x = x_.levels + block_ * ROWS * kScaleColumns + 4 * s;
    for (int i = 0; i < ROWS; ++i) {
      add_dots(sums_[i][turn % kTurns], levels, x + i * kScaleColumns);
    }
  }

  // acc: [ROWS, kBlockRows]
  PCDVQ_INLINE void add_to(float* acc) const {
    for (int i = 0; i < ROWS; ++i) {
      Wide sum = sums_[i][0];
      for (int t = 1; t < kTurns; ++t) sum = _mm512_add_epi32(sum, sums_[i][t]);
      const float scale = x_.scales[i * x_.scale_stride + block_];
      float* to = acc + i * kBlockRows;
      _mm512_storeu_ps(to, add_scaled(sum, scale, _mm512_loadu_ps(to)));
    }
  }

 private:
  static constexpr int kTurns = ROWS == 1 ? 2 : 1;  // so that a product need not wait for the last
  const BlockRows x_;  // a copy: stores of sums might change another
  const int64_t block_;
  Wide sums_[ROWS][kTurns];
};

// How far ahead packed codes are fetched.
constexpr int64_t kAheadBytes = 2048;

template <class L, bool PACKED, int ROWS>
void dot_blocks(const Weights& w, int64_t row, int64_t rows, const BlockRows& x, float* acc) {
  BlockCodes<L, PACKED> strip = {w, row, rows, {}};
  const int64_t below = kBlockRows * w.row_bytes;
  const typename L::Tables tables(w.table);
  for (int64_t b = 0; b * kScaleColumns < w.k; ++b) {
    strip.visit(b, [&](const uint8_t* codes, int64_t stride) __attribute__((always_inline)) {
      // Addresses past the weights are harmless.
      if (PACKED) {
        for (int i = 0; i < kBlockRows * L::kBlockBytes; i += 64) {
          __builtin_prefetch(codes + kAheadBytes + i);
        }
      } else {  // the hardware does not follow as many rows
        for (int r = 0; r < kBlockRows; ++r) __builtin_prefetch(codes + below + r * stride);
      }
      // Or gcc would keep the sums in `acc` a second time, on the stack.
      __asm__ volatile("" : : : "memory");
      BlockSums<ROWS> sums(x, b);
      L::decode(tables, codes, stride, sums);
      sums.add_to(acc);
    });
  }
}

// The same of any layout, by its other decoder.
template <int ROWS>
void dot_other(const Weights& w, int64_t row, int64_t rows, const BlockRows& x, float* acc) {
  alignas(64) uint8_t levels[2 * kBlockSteps * kStepBytes];  // of a unit
  for (int64_t b = 0; b * kScaleColumns < w.k; ++b) {
    if (b % 2 == 0) decode_other(w, row, rows, b, 2, kStepBytes, levels);
    const uint8_t* step = levels + b % 2 * kBlockSteps * kStepBytes;
    BlockSums<ROWS> sums(x, b);
    for (int s = 0; s < kBlockSteps; s += 2, step += 2 * kStepBytes) {
      sums(s, 0, load_wide(step));
      sums(s + 1, 1, load_wide(step + kStepBytes));
    }
    sums.add_to(acc);
  }
}

struct ByteLanes {
  uint8_t lane[64];
};

// Which column comes in each place of the order of steps, of which each has coordinate j of four codes
// of `dim` columns.
constexpr ByteLanes make_order(int dim) {
  ByteLanes order = {};
  for (int i = 0; i < kScaleColumns; i += 4 * dim) {
    for (int j = 0; j < 4 * dim; ++j) order.lane[i + j] = uint8_t(i + j % 4 * dim + j / 4);
  }
  return order;
}

// quantize_scale (quantize.h) of a block, whose integers take the order of `order`.
PCDVQ_INLINE void quantize_block(const float* x, Wide order, int8_t* levels, float* scale,
                                 int32_t* correction) {
  __m512 v[4];
  Wide largest = _mm512_setzero_si512();
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_loadu_ps(x + 16 * i);
    largest = _mm512_max_epu32(largest, _mm512_castps_si512(_mm512_abs_ps(v[i])));
  }
  const float highest = bits_to_float(_mm512_reduce_max_epu32(largest));
  const float inverse = highest < 1e-30f ? 0.0f : 127.0f / highest;
  const __m512 factor = _mm512_set1_ps(inverse), round = _mm512_set1_ps(kRound);
  __m128i bytes[4];
  for (int i = 0; i < 4; ++i) {  // the integers are in the low bits
    const __m512 rounded = _mm512_add_ps(_mm512_mul_ps(v[i], factor), round);
    bytes[i] = _mm512_cvtepi32_epi8(_mm512_castps_si512(rounded));
  }
  const Wide all = join(_mm256_set_m128i(bytes[1], bytes[0]), _mm256_set_m128i(bytes[3], bytes[2]));
  _mm512_storeu_si512(levels, _mm512_permutexvar_epi8(order, all));
  const Wide sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), all);
  *correction = -128 * _mm512_reduce_add_epi32(sums);
  *scale = highest / 127.0f;
}

void quantize_blocks(float* x, int64_t columns, int64_t order_dim, const BlockRows& out) {
  alignas(64) static constexpr ByteLanes kOrders[] = {make_order(1), make_order(2), make_order(4),
                                                      make_order(8)};
  for (; columns % kScaleColumns; ++columns) x[columns] = 0.0f;
  const int place = order_dim == 8 ? 3 : order_dim == 4 ? 2 : order_dim == 2 ? 1 : 0;
  const Wide order = load_wide(kOrders[place].lane);
  for (int64_t b = 0; b * kScaleColumns < columns; ++b) {
    quantize_block(x + b * kScaleColumns, order, out.levels + b * out.block_stride, out.scales + b,
                   out.corrections + b);
  }
}

// Bits of bf16 in the low half of each lane, as float_to_bfloat has them.
inline Wide bfloat_bits(__m512 value) {
  const Wide bits = _mm512_castps_si512(value);
  const Wide even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const Wide bias = _mm512_add_epi32(even, _mm512_set1_epi32(0x7FFF));
  const Wide rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  const Wide quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
  return _mm512_mask_mov_epi32(rounded, nan, quiet);
}

void finish_blocks(const float* acc, const float* row_scale, const float* bias, int64_t count,
                   int32_t dtype, void* out) {
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = __mmask16((1u << smaller(16, count - i)) - 1);
    __m512 y = _mm512_mul_ps(_mm512_loadu_ps(acc + i), _mm512_maskz_loadu_ps(mask, row_scale + i));
    if (bias) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, bias + i));
    if (dtype == PCDVQ_F32) {
      _mm512_mask_storeu_ps(static_cast<float*>(out) + i, mask, y);
      continue;
    }
    const __m256i words = dtype == PCDVQ_BF16
                              ? _mm512_cvtepi32_epi16(bfloat_bits(y))
                              : _mm512_cvtps_ph(y, _MM_FROUND_TO_NEAREST_INT);
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(out) + i, mask, words);
  }
}

template <class L, bool PACKED>
BlockDecoder block_decoder(void (*expand)(const int8_t*, int8_t*), int64_t order_dim = 0) {
  return {decode_blocks<L, PACKED>,
          {dot_blocks<L, PACKED, 1>, dot_blocks<L, PACKED, 2>, dot_blocks<L, PACKED, 4>,
           dot_blocks<L, PACKED, 6>, dot_blocks<L, PACKED, 8>},
          expand,
          L::kCodewordBytes,
          PACKED ? pack_strip<L> : nullptr,
          kBlockRows * L::kBlockBytes,
          order_dim};
}

// Codes of 8 bits beside the signs whose tables have 512 entries a coordinate.
template <int DIM, int CODE_BITS, bool PARITY, int STATES>
constexpr bool is_planes() {
  return CODE_BITS == 8 + DIM && PARITY && STATES == (STATES ? log2_of(DIM) : 0);
}

template <int DIM, int CODE_BITS, bool PARITY, int STATES, bool PACKED>
bool match_blocks(const PcdvqLayout& layout, BlockDecoder* decoder) {
  if (!is_lookup<DIM, CODE_BITS, PARITY, STATES>(layout)) return false;
  if constexpr (PACKED && is_planes<DIM, CODE_BITS, PARITY, STATES>()) {
    using L = std::conditional_t<DIM == 8 && !STATES, NibbleBlocks, PlaneBlocks<DIM, STATES>>;
    *decoder = block_decoder<L, PACKED>(L::expand, DIM);
  } else {
    using L = LookupBlocks<DIM, CODE_BITS, PARITY, STATES>;
    *decoder = block_decoder<L, PACKED>(L::expand);
  }
  return true;
}

template <bool PACKED>
bool find_windows(const PcdvqLayout& layout, BlockDecoder* decoder) {
  if (!is_windows(layout)) return false;
  const auto use = [decoder](auto l) {
    using L = decltype(l);
    *decoder = block_decoder<L, PACKED>(L::expand, kWindowDim);
  };
  const int extra = extra_bits(layout.pattern_bits);
  if (extra == 0) use(WindowBlocks<0, PACKED>());
  if (extra == 1) use(WindowBlocks<1, PACKED>());
  if (extra == 2) use(WindowBlocks<2, PACKED>());
  return true;
}

template <bool PACKED>
bool find_blocks(const PcdvqLayout& layout, BlockDecoder* decoder) {
  if (match_blocks<8, 16, true, 0, PACKED>(layout, decoder) ||
      match_blocks<8, 18, true, 0, PACKED>(layout, decoder) ||
      match_blocks<4, 12, true, 0, PACKED>(layout, decoder) ||
      match_blocks<4, 16, false, 0, PACKED>(layout, decoder) ||
      match_blocks<8, 16, true, 3, PACKED>(layout, decoder) ||
      match_blocks<8, 18, true, 3, PACKED>(layout, decoder) ||
      match_blocks<4, 12, true, 3, PACKED>(layout, decoder) ||
      match_blocks<4, 16, false, 2, PACKED>(layout, decoder)) {
    return true;
  }
  if (find_windows<PACKED>(layout, decoder)) return true;
  if (is_direct<8, 16>(layout) && !layout.pyramid_rows) {
    *decoder = block_decoder<RowBlocks, PACKED>(nullptr);
    return true;
  }
  if (is_direct<1, 8>(layout)) {
    *decoder = block_decoder<Int8Blocks, PACKED>(nullptr);
    return true;
  }
  return false;
}

BlockDecoder find_block_decoder(const PcdvqLayout& layout, bool packed) {
  BlockDecoder decoder = {};
  if (packed) {
    find_blocks<true>(layout, &decoder);
  } else if (!find_blocks<false>(layout, &decoder)) {
    decoder = {decode_other,
               {dot_other<1>, dot_other<2>, dot_other<4>, dot_other<6>, dot_other<8>}};
    decoder.expand = find_decoder(layout).expand;
    const int64_t base_bits = layout.pattern_bits - layout.rotation_bits + layout.magnitude_bits;
    if (decoder.expand) {
      decoder.codeword_bytes = layout.vector_dim << (base_bits + layout.state_bits + layout.parity);
    }
  }
  return decoder;
}

constexpr BlockKernels kBlockKernels = {find_block_decoder, quantize_blocks, accumulate_blocks,
                                        finish_blocks};
constexpr const BlockKernels* kBlocks = &kBlockKernels;

}  // namespace
}  // namespace pcdvq
