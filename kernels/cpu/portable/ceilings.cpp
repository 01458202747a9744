// Ceilings of plain C++, as the compiler vectorises it for the baseline instruction set.
#include "ceilings.h"

namespace llmopt {
namespace {

uint64_t read(const uint8_t* data, int64_t bytes) {
  const uint64_t* words = reinterpret_cast<const uint64_t*>(data);
  const int64_t half = bytes / 16;
  uint64_t sum[8] = {};
  for (int64_t i = 0; i < half; i += 8) {
    for (int j = 0; j < 8; ++j) sum[j] += words[i + j] + words[half + i + j];
  }
  return sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
}

// without a dot-product instruction the best plain loop works on widened operands: int16 x int16 into int32
double dot_int8(int64_t steps) {
  constexpr int kLength = 1024;
  alignas(64) static const int16_t zero[kLength] = {};
  const int16_t *a = zero, *b = zero;
  int32_t sum = 0;
  for (int64_t s = 0; s < steps; ++s) {
    __asm__ volatile("" : "+r"(a), "+r"(b)::"memory");  // or the compiler would hoist the whole product out of the loop
    for (int i = 0; i < kLength; ++i) sum += static_cast<int32_t>(a[i]) * b[i];
  }
  __asm__ volatile("" : : "r"(sum));
  return 2.0 * kLength * static_cast<double>(steps);
}

double fma_fp32(int64_t steps) {
  constexpr int kLanes = 32, kUnroll = 16;
  volatile float source = 0.5f;
  const float x = source, y = source;
  float acc[kLanes];
  for (int i = 0; i < kLanes; ++i) acc[i] = static_cast<float>(i);
  for (int64_t s = 0; s < steps; ++s) {
    for (int u = 0; u < kUnroll; ++u) {
      for (int i = 0; i < kLanes; ++i) acc[i] = acc[i] * x + y;
    }
  }
  for (float& value : acc) __asm__ volatile("" : : "m"(value));
  return 2.0 * kLanes * kUnroll * static_cast<double>(steps);
}

}  // namespace

CeilingLoops portable_ceilings() { return {read, dot_int8, nullptr, fma_fp32}; }

}  // namespace llmopt
