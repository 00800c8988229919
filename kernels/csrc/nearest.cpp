// Driver of pcdvq_nearest.
#include <algorithm>

#include "isa.h"

int32_t pcdvq_nearest(const PcdvqNearest* problem) {
  using pcdvq::kNearestGroups;
  const pcdvq::Kernels* kernels = pcdvq::kernels_for(problem->isa);
  if (!kernels) return PCDVQ_NO_ISA;
  const int64_t blocks = (problem->groups + kNearestGroups - 1) / kNearestGroups;
#pragma omp parallel for schedule(dynamic) num_threads(problem->threads)
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t first = i * kNearestGroups;
    kernels->nearest(*problem, first, std::min(kNearestGroups, problem->groups - first));
  }
  return PCDVQ_OK;
}
