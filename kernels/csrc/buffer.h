// Uninitialised scratch, aligned to cache lines; null if there is no memory.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

namespace pcdvq {

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

template <class T>
Buffer<T> allocate(int64_t count) {
  const int64_t bytes = round_up(count * int64_t(sizeof(T)), 64);
  return Buffer<T>(static_cast<T*>(std::aligned_alloc(64, size_t(bytes))));
}

}  // namespace pcdvq
