// Products of int8 activations with blocks (block_decode.h), for AVX-512 with VNNI. Included once.
//
// Of each block an output gets the exact sum of 64 products, at most 64 * 127 * 255 < 2^21 in
// magnitude, which a float holds; it is scaled and added to the blocks before. So the bits of an
// output depend neither on the tile it falls in nor on the order of columns inside a block, and no
// integer overflows, whatever K is. (The int8 activations of a row that has a NaN or an infinity may
// be -128: the sums still fit, and their scale makes the output NaN or infinite.)
#pragma once

#include "block_codes.h"
#include "block_trellis.h"
#include "quantize.h"

namespace pcdvq {
namespace {

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

template <class L, bool PACKED, int ROWS>
void dot_blocks(const Weights& w, int64_t row, int64_t rows, const BlockRows& x, float* acc) {
  BlockCodes<L, PACKED> strip = {w, row, rows, {}};
  const int64_t below = kBlockRows * w.row_bytes;
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
      L::decode(w.table, codes, stride, sums);
      sums.add_to(acc, kBlockRows);
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
    sums.add_to(acc, kBlockRows);
  }
}

// quantize_scale (quantize.h) of a block.
PCDVQ_INLINE void quantize_block(const float* x, int8_t* levels, float* scale,
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
  _mm512_storeu_si512(levels, all);
  const Wide sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), all);
  *correction = -128 * _mm512_reduce_add_epi32(sums);
  *scale = highest / 127.0f;
}

void quantize_blocks(float* x, int64_t columns, const BlockRows& out) {
  for (; columns % kScaleColumns; ++columns) x[columns] = 0.0f;
  for (int64_t b = 0; b * kScaleColumns < columns; ++b) {
    quantize_block(x + b * kScaleColumns, out.levels + b * out.block_stride, out.scales + b,
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
BlockDecoder block_decoder() {
  return {decode_blocks<L, PACKED>,
          {dot_blocks<L, PACKED, 1>, dot_blocks<L, PACKED, 2>, dot_blocks<L, PACKED, 4>,
           dot_blocks<L, PACKED, 6>, dot_blocks<L, PACKED, 8>},
          1,
          PACKED ? pack_strip<L> : nullptr,
          kBlockRows * L::kBlockBytes};
}

BlockDecoder find_block_decoder(const PcdvqLayout& layout, bool packed) {
  if (is_trellis(layout)) return find_chain_decoder<ChainBlocks>(layout);
  if (is_direct<8, 16>(layout) && !layout.pyramid_rows) {
    return packed ? block_decoder<RowBlocks, true>() : block_decoder<RowBlocks, false>();
  }
  if (is_direct<1, 8>(layout)) {
    return packed ? block_decoder<Int8Blocks, true>() : block_decoder<Int8Blocks, false>();
  }
  if (packed) return {};
  return {decode_other, {dot_other<1>, dot_other<2>, dot_other<4>, dot_other<6>, dot_other<8>}, 1};
}

constexpr BlockKernels kBlockKernels = {find_block_decoder, quantize_blocks, accumulate_blocks,
                                        finish_blocks};
constexpr const BlockKernels* kBlocks = &kBlockKernels;

}  // namespace
}  // namespace pcdvq
