// Driver of pcdvq_embedding: single rows of the dense weight. The arithmetic is in the ISA kernels.
#include <algorithm>
#include <memory>
#include <new>

#include "isa.h"
#include "numeric.h"
#include "sign_masks.h"
#include "threads.h"

namespace pcdvq {
namespace {

// Rows below which starting threads takes longer than decoding.
constexpr int64_t kThreadRows = 4;

struct Embedding {
  const PcdvqEmbedding& p;
  const Kernels& kernels;
  const Decoder decoder;
  const BlockDecoder blocks;  // of packed codes

  // Levels of row `id`, in the order of columns; `row` has room for whole units.
  void decode(const Weights& weights, int64_t id, float* row) const {
    for (int64_t unit = 0; unit * kUnitColumns < p.k; ++unit, row += kUnitColumns) {
      alignas(64) int8_t levels[kPanelColumns] = {};
      decoder.decode(weights, id, 1, unit, 1, levels);
      for (int64_t run = 0; run < kUnitColumns / 16; ++run) {
        kernels.to_floats(levels + run_place(run), 16, row + 16 * run);
      }
    }
  }

  // The same of packed codes, of which a block is decoded whole: 16 rows.
  void decode_packed(const Weights& weights, int64_t id, float* row) const {
    const int64_t strip = id / kBlockRows * kBlockRows, rows = std::min(kBlockRows, p.n - strip);
    alignas(64) uint8_t levels[kBlockSteps][kStepBytes];
    for (int64_t block = 0; block * kScaleColumns < p.k; ++block, row += kScaleColumns) {
      blocks.decode(weights, strip, rows, block, 1, kStepBytes, levels[0]);
      for (int64_t i = 0; i < kScaleColumns; ++i) {
        row[i] = float(levels[i / 4][4 * (id - strip) + i % 4]) - 128.0f;
      }
    }
  }

  // Row `id` of Q H S, scaled, into row `index` of the output; `row` is scratch for k floats,
  // padded to whole units.
  void look_up(const Weights& weights, const uint8_t* no_signs, int64_t index, float* row) const {
    const int64_t id = p.ids[index];
    p.packed ? decode_packed(weights, id, row) : decode(weights, id, row);
    kernels.rotate(row, PCDVQ_F32, no_signs, p.k, p.layout.hadamard_block, row);
    const float scale = p.row_scale[id];
    for (int64_t i = 0; i < p.k; i += 8) {
      const int8_t* factors = kSignMasks.factors[p.signs_in[i / 8]];
      for (int64_t j = 0; j < 8; ++j) {
        const float value = row[i + j] * (scale * float(factors[j]));
        store_element(p.out, p.dtype, index * p.k + i + j, value);
      }
    }
  }

  PcdvqStatus run() const {
    const auto inside = [this](int64_t id) { return id >= 0 && id < p.n; };
    if (!std::all_of(p.ids, p.ids + p.count, inside)) return PCDVQ_BAD_ID;
    const int threads = int(std::clamp<int64_t>(p.count / kThreadRows, 1, p.threads));
    const int64_t row_floats = p.k + kUnitColumns;
    const std::unique_ptr<float[]> rows(new (std::nothrow) float[size_t(threads * row_floats)]);
    const std::unique_ptr<uint8_t[]> no_signs(new (std::nothrow) uint8_t[size_t(p.k / 8)]());
    if (!rows || !no_signs) return PCDVQ_NO_MEMORY;
#pragma omp parallel num_threads(threads)
    {
      const Weights weights = {p.qweight, p.codewords, p.n, p.k, p.row_bytes, p.layout,
                               p.packed != 0};
      float* row = rows.get() + thread_index() * row_floats;
#pragma omp for schedule(static)
      for (int64_t i = 0; i < p.count; ++i) look_up(weights, no_signs.get(), i, row);
    }
    return PCDVQ_OK;
  }
};

}  // namespace
}  // namespace pcdvq

int32_t pcdvq_embedding(const PcdvqEmbedding* problem) {
  const pcdvq::Kernels* kernels = pcdvq::kernels_for(problem->isa);
  if (!kernels) return PCDVQ_NO_ISA;
  if (problem->count == 0) return PCDVQ_OK;
  pcdvq::BlockDecoder blocks = {};
  if (problem->packed) {
    if (kernels->blocks) blocks = kernels->blocks->decoder(problem->layout, true);
    if (!blocks.decode) return PCDVQ_NO_ISA;
  }
  return pcdvq::Embedding{*problem, *kernels, kernels->decoder(problem->layout), blocks}.run();
}
