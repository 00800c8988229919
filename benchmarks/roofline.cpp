// What a machine can do at most with weights that are read once: stream them, or multiply bf16
// weights with one row of activations. Built by roofline.py for the machine at hand.
#include <cstdint>
#include <cstring>

namespace {

typedef uint32_t Words __attribute__((vector_size(32)));
typedef float Floats __attribute__((vector_size(32)));

constexpr int64_t kPrefetchBytes = 2048;

template <class T>
T load(const void* p) {
  T value;
  std::memcpy(&value, p, sizeof(T));
  return value;
}

// w: bf16 [k], x: fp32 [k], of each 16 columns the even ones, then the odd ones.
float dot(const uint16_t* w, const float* x, int64_t k) {
  Floats sum[4] = {};
  for (int64_t i = 0; i < k; i += 32) {
    __builtin_prefetch(reinterpret_cast<const char*>(w + i) + kPrefetchBytes);
    for (int half = 0; half < 2; ++half) {
      const Words pairs = load<Words>(w + i + 16 * half);
      const Floats even = reinterpret_cast<const Floats&>(static_cast<const Words&>(pairs << 16));
      const Floats odd =
          reinterpret_cast<const Floats&>(static_cast<const Words&>(pairs & 0xFFFF0000u));
      sum[2 * half] += even * load<Floats>(x + i + 16 * half);
      sum[2 * half + 1] += odd * load<Floats>(x + i + 16 * half + 8);
    }
  }
  const Floats all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  float total = 0;
  for (int lane = 0; lane < 8; ++lane) total += all[lane];
  return total;
}

}  // namespace

extern "C" {

// y[n] = w[n] . x; w: bf16 [n, k], k a multiple of 32.
void bf16_gemv(const uint16_t* w, const float* x, float* y, int64_t n, int64_t k, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 16)
  for (int64_t row = 0; row < n; ++row) y[row] = dot(w + row * k, x, k);
}

// Reads `bytes`, a multiple of 128; returns something that depends on all of them.
uint32_t read_all(const uint8_t* p, int64_t bytes, int threads) {
  uint32_t total = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(^ : total)
  for (int64_t page = 0; page < bytes; page += 4096) {
    const int64_t end = page + 4096 < bytes ? page + 4096 : bytes;
    Words sum[4] = {};
    for (int64_t i = page; i < end; i += 128) {
      __builtin_prefetch(p + i + kPrefetchBytes);
      __builtin_prefetch(p + i + kPrefetchBytes + 64);
      for (int j = 0; j < 4; ++j) sum[j] ^= load<Words>(p + i + 32 * j);
    }
    const Words all = sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
    for (int lane = 0; lane < 8; ++lane) total ^= all[lane];
  }
  return total;
}
}
