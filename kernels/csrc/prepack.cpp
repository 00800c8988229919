// Driver of pcdvq_prepack. The order of codes is in the ISA kernels.
#include "isa.h"

namespace pcdvq {
namespace {

BlockDecoder packed_decoder(const PcdvqPrepack& p) {
  const Kernels* kernels = kernels_for(p.isa);
  const bool blocks = kernels && kernels->blocks && p.layout.activations == PCDVQ_INT8;
  return blocks ? kernels->blocks->decoder(p.layout, true) : BlockDecoder{};
}

}  // namespace
}  // namespace pcdvq

int64_t pcdvq_packed_bytes(const PcdvqPrepack* problem) {
  return pcdvq::packed_decoder(*problem).block_bytes;
}

int32_t pcdvq_prepack(const PcdvqPrepack* problem) {
  const PcdvqPrepack& p = *problem;
  const pcdvq::BlockDecoder decoder = pcdvq::packed_decoder(p);
  if (!decoder.pack) return PCDVQ_NO_ISA;
  const pcdvq::Weights rows = {p.qweight, nullptr, p.n, p.k, p.row_bytes, p.layout, false};
  const int64_t blocks = (p.k + pcdvq::kScaleColumns - 1) / pcdvq::kScaleColumns;
  const int64_t strips = (p.n + pcdvq::kBlockRows - 1) / pcdvq::kBlockRows;
#pragma omp parallel for num_threads(p.threads)
  for (int64_t i = 0; i < strips; i += decoder.strips) {
    decoder.pack(rows, i, p.out + i * blocks * decoder.block_bytes);
  }
  return PCDVQ_OK;
}
