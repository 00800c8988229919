#include "isa.h"

#include "sign_masks.h"

namespace pcdvq {
namespace {

constexpr SignMasks make_sign_masks() {
  SignMasks table = {};
  for (uint32_t s = 0; s < 256; ++s) {
    for (uint32_t j = 0; j < 8; ++j) table.lanes[s][j] = (s >> j & 1) << 31;
    for (uint32_t j = 0; j < 8; ++j) table.factors[s][j] = s >> j & 1 ? -1 : 1;
  }
  return table;
}

}  // namespace

constexpr SignMasks kSignMasks = make_sign_masks();

const Kernels* kernels_for(int32_t isa) {
  const int32_t best = pcdvq_best_isa();
  if (isa == PCDVQ_ISA_AUTO) isa = best;
  if (isa > best) return nullptr;
  if (isa == PCDVQ_ISA_AVX512) return avx512_kernels();
  return isa == PCDVQ_ISA_AVX2 ? avx2_kernels() : scalar_kernels();
}

}  // namespace pcdvq

void pcdvq_struct_bytes(int64_t bytes[8]) {
  bytes[0] = sizeof(PcdvqLinear);
  bytes[1] = sizeof(PcdvqEmbedding);
  bytes[2] = sizeof(PcdvqMoe);
  bytes[3] = sizeof(PcdvqNearest);
  bytes[4] = sizeof(PcdvqVptqSegment);
  bytes[5] = sizeof(PcdvqVptq);
  bytes[6] = sizeof(PcdvqPrepack);
  bytes[7] = sizeof(PcdvqChains);
}

int32_t pcdvq_best_isa() {
#if defined(__x86_64__) && defined(__GNUC__)
  // The AVX2 kernels also use f16c, popcnt, bmi and bmi2: every CPU with AVX2 and FMA but the
  // first has them, and virtual machines may hide any.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c") && __builtin_cpu_supports("popcnt") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  // Ice Lake, Zen 4 and later; of earlier CPUs the AVX2 kernels are as fast.
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vbmi") &&
                      __builtin_cpu_supports("avx512vbmi2") &&
                      __builtin_cpu_supports("avx512bitalg") &&
                      __builtin_cpu_supports("avx512vnni");
  if (avx2 && avx512) return PCDVQ_ISA_AVX512;
  if (avx2) return PCDVQ_ISA_AVX2;
#endif
  return PCDVQ_ISA_SCALAR;
}
