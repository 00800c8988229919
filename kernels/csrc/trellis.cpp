// Drivers of pcdvq_trellis and pcdvq_windows.
#include <algorithm>

#include "isa.h"

int32_t pcdvq_trellis(const PcdvqTrellis* problem) {
  const pcdvq::Kernels* kernels = pcdvq::kernels_for(problem->isa);
  if (!kernels) return PCDVQ_NO_ISA;
  const int64_t segments = (problem->rows + pcdvq::kSegmentRows - 1) / pcdvq::kSegmentRows;
  const int64_t chains = segments * problem->groups;
  // Small problems in smaller units, so that every thread has work.
  const int64_t share = (chains + problem->threads - 1) / problem->threads;
  const int64_t vectors = (share + kernels->lanes - 1) / kernels->lanes;
  const int64_t unit = std::max<int64_t>(1, std::min<int64_t>(4, vectors)) * kernels->lanes;
  const int64_t units = (chains + unit - 1) / unit;
#pragma omp parallel for schedule(dynamic) num_threads(problem->threads)
  for (int64_t i = 0; i < units; ++i) {
    kernels->trellis(*problem, i * unit, std::min(unit, chains - i * unit));
  }
  return PCDVQ_OK;
}

int32_t pcdvq_windows(const PcdvqWindows* problem) {
  const pcdvq::Kernels* kernels = pcdvq::kernels_for(problem->isa);
  if (!kernels) return PCDVQ_NO_ISA;
  const int64_t segments = (problem->rows + pcdvq::kSegmentRows - 1) / pcdvq::kSegmentRows;
  const int64_t chains = segments * problem->groups, unit = kernels->lanes;
#pragma omp parallel for schedule(dynamic) num_threads(problem->threads)
  for (int64_t first = 0; first < chains; first += unit) {
    kernels->windows(*problem, first, std::min(unit, chains - first));
  }
  return PCDVQ_OK;
}
