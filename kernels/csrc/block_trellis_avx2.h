// Products of int8 activations with codec `trellis` for AVX2, as block_trellis.h and block_products.h
// have them for AVX-512; with AVX-VNNI where the CPU has it. Included once.
//
// Of a step, a register has rows 0 to 3 and 8 to 11, another the others: so both come from one register
// for each pair, which has the codes of rows 0 to 7 in one half and those of rows 8 to 15 in the other.
#pragma once

#include "chain_tiles.h"
#include "quantize.h"

namespace pcdvq {
namespace {

// 128 plus levels.
struct Step {
  Bytes rows[2];
};

struct StoreStep {
  uint8_t* out;
  int64_t step;

  // Rows in order.
  PCDVQ_INLINE void operator()(int s, const Step& levels) const {
    __m256i* to = reinterpret_cast<__m256i*>(out + s * step);
    _mm256_storeu_si256(to, _mm256_permute2x128_si256(levels.rows[0], levels.rows[1], 0x20));
    _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(levels.rows[0], levels.rows[1], 0x31));
  }
};

// Four columns of a row of activations, which every row of a step is multiplied with.
//
// Without VNNI products of pairs have to fit into 16 bits: they are those of the magnitudes with levels
// from -128 to 127. Where an activation is negative, the level is -1 - level instead, and the sum lacks
// a magnitude for each of these, which a block's correction has.
template <bool VNNI>
struct FourColumns {
  Bytes x, flip;

  PCDVQ_INLINE explicit FourColumns(const int8_t* p) : x(_mm256_set1_epi32(load_as<int32_t>(p))) {
    if (VNNI) return;
    const Bytes negative = _mm256_cmpgt_epi8(_mm256_setzero_si256(), x);
    flip = _mm256_xor_si256(negative, _mm256_set1_epi8(int8_t(0x80)));
    x = _mm256_abs_epi8(x);
  }

  PCDVQ_INLINE void add_products(Bytes& sum, Bytes levels) const {
    if (VNNI) {
      __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(levels), "x"(x));
      return;
    }
    const Bytes pairs = _mm256_maddubs_epi16(x, _mm256_xor_si256(levels, flip));
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    __asm__("" : "+x"(sum));  // or gcc would add the products of several steps in another order, and spill
  }

  // Of the activations of a block.
  static int32_t correction(const int8_t* levels) {
    int32_t sum = 0;
    for (int64_t i = 0; i < kScaleColumns; ++i) {
      sum += VNNI ? -128 * levels[i] : levels[i] < 0 ? -levels[i] : 0;
    }
    return sum;
  }
};

PCDVQ_INLINE void add_scaled(Bytes sum, float scale, float* to) {
  const __m256 product = _mm256_cvtepi32_ps(sum);
  _mm256_storeu_ps(to, _mm256_fmadd_ps(product, _mm256_set1_ps(scale), _mm256_loadu_ps(to)));
}

// Sums of a block and ROWS rows of activations, of which row i is at x.levels + i * stride.
template <bool VNNI, int ROWS>
struct StepSums {
  const BlockRows x;
  const int64_t stride;
  Bytes sums[ROWS][2];

  PCDVQ_INLINE StepSums(const BlockRows& rows, int64_t row_stride) : x(rows), stride(row_stride) {
    for (int i = 0; i < ROWS; ++i) {
      for (Bytes& sum : sums[i]) sum = _mm256_set1_epi32(x.corrections[i * x.scale_stride]);
    }
  }

  PCDVQ_INLINE void operator()(int s, const Step& levels) {
    for (int i = 0; i < ROWS; ++i) {
      const FourColumns<VNNI> four(x.levels + i * stride + 4 * s);
      for (int h = 0; h < 2; ++h) four.add_products(sums[i][h], levels.rows[h]);
    }
  }

  // acc: [ROWS, acc_stride], of each the first kBlockRows. ORDERED: steps had rows in order.
  template <bool ORDERED>
  PCDVQ_INLINE void add_to(float* acc, int64_t acc_stride) const {
    for (int i = 0; i < ROWS; ++i) {
      const float scale = x.scales[i * x.scale_stride];
      const Bytes a = sums[i][0], b = sums[i][1];
      float* to = acc + i * acc_stride;
      add_scaled(ORDERED ? a : _mm256_permute2x128_si256(a, b, 0x20), scale, to);
      add_scaled(ORDERED ? b : _mm256_permute2x128_si256(a, b, 0x31), scale, to + 8);
    }
  }
};

// Rows [row, row + ROWS) of activations and a strip whose steps are stored.
template <bool VNNI, int ROWS>
void dot_stored(const uint8_t* levels, int64_t step, const BlockRows& x, int64_t stride, float* acc,
                int64_t acc_stride) {
  StepSums<VNNI, ROWS> sums(x, stride);
  for (int s = 0; s < kBlockSteps; ++s, levels += step) {
    sums(s, {{load_bytes(levels), load_bytes(levels + 32)}});
  }
  sums.template add_to<true>(acc, acc_stride);
}

// As many rows as sums fit into registers at a time.
template <bool VNNI>
void dot_stored_rows(const uint8_t* levels, int64_t step, int64_t rows, const BlockRows& x,
                     int64_t stride, float* acc, int64_t acc_stride) {
  int64_t i = 0;
  const auto from = [&](int64_t row) {
    BlockRows rest = x;
    rest.levels += row * stride;
    rest.scales += row * x.scale_stride;
    rest.corrections += row * x.scale_stride;
    return rest;
  };
  for (; i + 4 <= rows; i += 4) {
    dot_stored<VNNI, 4>(levels, step, from(i), stride, acc + i * acc_stride, acc_stride);
  }
  for (; i + 2 <= rows; i += 2) {
    dot_stored<VNNI, 2>(levels, step, from(i), stride, acc + i * acc_stride, acc_stride);
  }
  if (i < rows) {
    dot_stored<VNNI, 1>(levels, step, from(i), stride, acc + i * acc_stride, acc_stride);
  }
}

template <bool VNNI, int BITS, int ROWS>
struct ChainHalves {
  using Places = ChainPlaces<BITS, ROWS>;
  using Store = StoreStep;
  static constexpr int kBits = BITS, kRows = ROWS;
  static constexpr bool kSingles = BITS >= kSinglesFrom;

  // Of register i of a step, where the dword of each row is in the register of codes, and how far the
  // last window is from its lowest bit.
  struct Tables {
    alignas(32) uint8_t byte[2][32];
    alignas(32) uint32_t right[2][8], left[2][8];
  };

  static constexpr Tables make_tables() {
    Tables t = {};
    for (int i = 0; i < 2; ++i) {
      for (int lane = 0; lane < 8; ++lane) {
        const int row = lane / 4 * 8 + 4 * i + lane % 4;
        // The lower half of the register starts with the last 8 bytes of the group's.
        const int bit = (kBlockRows - 1 - row) * BITS - (row < 8 ? 16 * BITS - 64 : 0);
        for (int b = 0; b < 4; ++b) {
          const int at = bit / 8 + b;
          t.byte[i][4 * lane + b] = uint8_t(at < 16 ? at : 0x80);
        }
        t.right[i][lane] = uint32_t(bit % 8);
        t.left[i][lane] = uint32_t(16 - bit % 8);
      }
    }
    return t;
  }

  // Bytes of a group's pair: [the last eight, then two of the group before][the first ten or more].
  static PCDVQ_INLINE Bytes load_pair(const uint8_t* own, const uint8_t* before) {
    constexpr int kBytes = Places::kPairBytes;
    __m128i low, high;
    if (kBytes < 8) {
      const uint64_t bits = load_as<uint32_t>(own) | uint64_t(load_as<uint16_t>(own + 4)) << 32;
      low = _mm_cvtsi64_si128(int64_t(bits << 16));
      high = _mm_cvtsi64_si128(int64_t(bits));
    } else {
      low = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(own + kBytes - 8));
      high = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(own));
      if (7 * BITS + kWindowBits > 64) {
        high = _mm_insert_epi16(high, load_as<uint16_t>(own + 8), 4);
      }
    }
    low = _mm_insert_epi16(low, load_as<uint16_t>(before), 4);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
  }

  static PCDVQ_INLINE Bytes means(Bytes windows) {
    const Bytes factor = _mm256_set1_epi16(int16_t(kTrellisFactor));
    const Bytes low = _mm256_mullo_epi16(windows, factor);
    const Bytes high = _mm256_add_epi16(_mm256_mulhi_epu16(windows, factor), low);
    return _mm256_avg_epu8(low, high);
  }

  // Windows `more` bits above the last ones, of both pairs.
  static PCDVQ_INLINE Bytes windows(const Bytes (&pairs)[2], const Tables& t, int i, int more) {
    const Bytes by = _mm256_set1_epi32(more);
    const Bytes right = _mm256_add_epi32(load_bytes(t.right[i]), by);
    const Bytes left = _mm256_sub_epi32(load_bytes(t.left[i]), by);
    return _mm256_blend_epi16(_mm256_srlv_epi32(pairs[0], right), _mm256_sllv_epi32(pairs[1], left),
                              0xAA);
  }

  // Group `v` of a block.
  template <class Sink>
  static PCDVQ_INLINE void decode(const uint8_t* block, int v, Sink&& sink) {
    static constexpr Tables kTables = make_tables();
    for (int quad = 0; quad < kQuads; ++quad) {
      Bytes codes[2];
      for (int p = 0; p < 2; ++p) {
        codes[p] = load_pair(block + Places::pair(quad, v, p), block + Places::before(quad, v, p));
      }
      Step levels;
      for (int i = 0; i < 2; ++i) {
        Bytes pairs[2];
        for (int p = 0; p < 2; ++p) {
          pairs[p] = _mm256_shuffle_epi8(codes[p], load_bytes(kTables.byte[i]));
        }
        levels.rows[i] = means(windows(pairs, kTables, i, 0));
        if (!kSingles) continue;
        const Bytes last = levels.rows[i], first = means(windows(pairs, kTables, i, BITS / 2));
        const Bytes u_v = _mm256_blendv_epi8(first, last, _mm256_set1_epi16(int16_t(0xFF00)));
        const Bytes v_u = _mm256_or_si256(_mm256_slli_epi16(last, 8), _mm256_srli_epi16(first, 8));
        levels.rows[i] = _mm256_avg_epu8(u_v, v_u);
      }
      sink(quad, levels);
    }
  }

  // acc [X_ROWS, kTileRows] += x times group `v` of block `b`.
  template <int X_ROWS>
  static PCDVQ_INLINE void dot(const uint8_t* block, int v, const BlockRows& x, int64_t b,
                               float* acc) {
    BlockRows here = x;
    here.levels += b * X_ROWS * kScaleColumns;
    here.scales += b;
    here.corrections += b;
    if constexpr (X_ROWS <= 2) {
      StepSums<VNNI, X_ROWS> sums(here, kScaleColumns);
      decode(block, v, sums);
      sums.template add_to<false>(acc, kTileRows);
    } else {
      alignas(32) uint8_t levels[kBlockSteps * kStepBytes];
      decode(block, v, StoreStep{levels, kStepBytes});
      dot_stored_rows<VNNI>(levels, kStepBytes, X_ROWS, here, kScaleColumns, acc, kTileRows);
    }
  }
};

template <int BITS, int ROWS>
using PlainChains = ChainHalves<false, BITS, ROWS>;
template <int BITS, int ROWS>
using VnniChains = ChainHalves<true, BITS, ROWS>;

template <bool VNNI>
void accumulate_blocks(const BlockTiles& t) {
  const int64_t acc_stride = kPanelStrips * kBlockRows;
  for (int64_t b = 0; b < t.blocks; ++b) {
    BlockRows x = t.x;
    x.levels += b * x.block_stride;
    x.scales += b;
    x.corrections += b;
    for (int64_t j = 0; j < kPanelStrips; ++j) {
      const uint8_t* levels = t.levels + (b * kBlockSteps * kPanelStrips + j) * kStepBytes;
      dot_stored_rows<VNNI>(levels, kPanelStrips * kStepBytes, t.rows, x, x.stride,
                            t.acc + j * kBlockRows, acc_stride);
    }
  }
}

template <bool VNNI>
void quantize_blocks(float* x, int64_t columns, const BlockRows& out) {
  for (; columns % kScaleColumns; ++columns) x[columns] = 0.0f;
  for (int64_t b = 0; b * kScaleColumns < columns; ++b) {
    int16_t integers[kScaleColumns];
    int8_t* levels = out.levels + b * out.block_stride;
    out.scales[b] = quantize_scale(x + b * kScaleColumns, 127.0f, integers);
    for (int64_t i = 0; i < kScaleColumns; ++i) levels[i] = int8_t(integers[i]);
    out.corrections[b] = FourColumns<VNNI>::correction(levels);
  }
}

void finish_blocks(const float* acc, const float* row_scale, const float* bias, int64_t count,
                   int32_t dtype, void* out) {
  for (int64_t i = 0; i < count; ++i) {
    float y = acc[i] * row_scale[i];
    if (bias) y += bias[i];
    store_element(out, dtype, i, y);
  }
}

template <bool VNNI>
BlockDecoder find_block_decoder(const PcdvqLayout& layout, bool) {
  if (!is_trellis(layout)) return {};
  return VNNI ? find_chain_decoder<VnniChains>(layout) : find_chain_decoder<PlainChains>(layout);
}

template <bool VNNI>
constexpr BlockKernels kBlockKernels = {find_block_decoder<VNNI>, quantize_blocks<VNNI>,
                                        accumulate_blocks<VNNI>, finish_blocks};

bool has_vnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 4 & 1;
}

const BlockKernels* const kBlocks = has_vnni() ? &kBlockKernels<true> : &kBlockKernels<false>;

}  // namespace
}  // namespace pcdvq
