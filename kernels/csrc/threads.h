// The calling thread's number in its team, with or without OpenMP.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

namespace pcdvq {

inline int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace pcdvq
