// Products of int8 activations with blocks (block_decode.h), for AVX-512 with VNNI. Included once.
//
// Of each block an output gets the exact sum of 64 products, at most 64 * 127 * 255 < 2^21 in
// magnitude, which a float holds; it is scaled and added to the blocks before. So the bits of an
// output depend neither on the tile it falls in nor on the order of columns inside a block, and no
// integer overflows, whatever K is. (The int8 activations of a row that has a NaN or an infinity may
// be -128: the sums still fit, and their scale makes the output NaN or infinite.)
#pragma once

#include "block_decode.h"
#include "quantize.h"

namespace pcdvq {
namespace {

// In assembly because gcc 12 copies the accumulators of the intrinsic.
PCDVQ_INLINE void add_dots(Wide& sum, Wide levels, Wide x) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(levels), "v"(x));
}

template <int ROWS, int STRIPS>
PCDVQ_INLINE void block_tile(const BlockTiles& t, int64_t row) {
  // Sums that take turns, so that the latency of one product does not hold up the next.
  constexpr int kTurns = ROWS * STRIPS >= 4 ? 1 : 4 / (ROWS * STRIPS);
  const int8_t* x = t.x.levels + row * t.x.stride;
  const int64_t first_scale = row * t.x.scale_stride;
  float* acc = t.acc + row * STRIPS * kBlockRows;
  const uint8_t* levels = t.levels;
  for (int64_t b = 0; b < t.blocks; ++b, x += kScaleColumns) {
    Wide sum[kTurns][ROWS][STRIPS];
    for (int i = 0; i < ROWS; ++i) {
      const int32_t start = t.x.corrections[first_scale + i * t.x.scale_stride + b];
      for (int j = 0; j < STRIPS; ++j) {
        sum[0][i][j] = _mm512_set1_epi32(start);
        for (int turn = 1; turn < kTurns; ++turn) sum[turn][i][j] = _mm512_setzero_si512();
      }
    }
#pragma GCC unroll 4
    for (int s = 0; s < kBlockSteps; ++s, levels += STRIPS * kStepBytes) {
      Wide w[STRIPS];
      for (int j = 0; j < STRIPS; ++j) w[j] = _mm512_load_si512(levels + j * kStepBytes);
      for (int i = 0; i < ROWS; ++i) {
        const Wide four = _mm512_set1_epi32(load_as<int32_t>(x + i * t.x.stride + 4 * s));
        for (int j = 0; j < STRIPS; ++j) add_dots(sum[s % kTurns][i][j], w[j], four);
      }
    }
    for (int i = 0; i < ROWS; ++i) {
      const __m512 scale = _mm512_set1_ps(t.x.scales[first_scale + i * t.x.scale_stride + b]);
      for (int j = 0; j < STRIPS; ++j) {
        Wide all = sum[0][i][j];
        for (int turn = 1; turn < kTurns; ++turn) all = _mm512_add_epi32(all, sum[turn][i][j]);
        float* out = acc + (i * STRIPS + j) * kBlockRows;
        const __m512 more = _mm512_fmadd_ps(_mm512_cvtepi32_ps(all), scale, _mm512_loadu_ps(out));
        _mm512_storeu_ps(out, more);
      }
    }
  }
}

// Tiles of MOST rows, then the rest.
template <int MOST, int STRIPS>
void block_tiles(const BlockTiles& t, int64_t row = 0) {
  for (; row + MOST <= t.rows; row += MOST) block_tile<MOST, STRIPS>(t, row);
  if constexpr (MOST > 1) {
    if (row < t.rows) block_tiles<MOST - 1, STRIPS>(t, row);
  }
}

// 24 accumulators at most, of 32 registers.
void accumulate_blocks(const BlockTiles& t) {
  (t.strips == 1 ? block_tiles<8, 1> : block_tiles<6, kPanelStrips>)(t, 0);
}

void quantize_blocks(float* x, int64_t columns, const BlockRows& out) {
  for (; columns % kScaleColumns; ++columns) x[columns] = 0.0f;
  for (int64_t b = 0; b * kScaleColumns < columns; ++b) {
    int16_t integers[kScaleColumns];
    out.scales[b] = quantize_scale(x + b * kScaleColumns, 127.0f, integers);
    int8_t* levels = out.levels + b * kScaleColumns;
    int32_t sum = 0;
    for (int64_t i = 0; i < kScaleColumns; ++i) {
      levels[i] = int8_t(integers[i]);
      sum += levels[i];
    }
    out.corrections[b] = -128 * sum;
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

template <int DIM, int CODE_BITS, bool PARITY, int STATES = 0>
bool match_blocks(const PcdvqLayout& layout, BlockDecoder* decoder) {
  using L = LookupBlocks<DIM, CODE_BITS, PARITY, STATES>;
  const bool same = is_lookup<DIM, CODE_BITS, PARITY, STATES>(layout);
  if (same) *decoder = {decode_blocks<L>, L::expand};
  return same;
}

BlockDecoder find_block_decoder(const PcdvqLayout& layout) {
  BlockDecoder decoder;
  if (match_blocks<8, 16, true>(layout, &decoder) || match_blocks<8, 18, true>(layout, &decoder) ||
      match_blocks<4, 12, true>(layout, &decoder) || match_blocks<4, 16, false>(layout, &decoder) ||
      match_blocks<8, 16, true, 3>(layout, &decoder) ||
      match_blocks<8, 18, true, 3>(layout, &decoder) ||
      match_blocks<4, 12, true, 3>(layout, &decoder) ||
      match_blocks<4, 16, false, 2>(layout, &decoder)) {
    return decoder;
  }
  if (is_direct<8, 16>(layout)) return {decode_blocks<RowBlocks>, nullptr};
  if (is_direct<1, 8>(layout)) return {decode_blocks<Int8Blocks>, nullptr};
  return {decode_other, find_decoder(layout).expand};
}

constexpr BlockKernels kBlockKernels = {find_block_decoder, quantize_blocks, accumulate_blocks,
                                        finish_blocks};
constexpr const BlockKernels* kBlocks = &kBlockKernels;

}  // namespace
}  // namespace pcdvq
