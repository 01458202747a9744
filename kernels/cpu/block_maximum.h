// The largest of some floats, and whether one is NaN. Include simd_math.h first.
#pragma once
#include <cmath>
#include <cstdint>

namespace llmopt::LLMOPT_ISA {

struct BlockMaximum {
  float value;  // of those that are no NaN
  bool nan;
};

inline BlockMaximum block_maximum(const float* x, int64_t n) {
  F32x16 best = set1(-INFINITY);
  I32x16 bits = zero_i32();
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const F32x16 values = load(x + i);
    // max returns its second operand where one is NaN; the bits keep it
    best = max(values, best), bits = max(bits, abs_bits(values));
  }
  BlockMaximum found{reduce_max(best), reduce_max(bits) > 0x7f800000};
  for (; i < n; ++i) {
    found.value = x[i] > found.value ? x[i] : found.value;
    found.nan = found.nan || std::isnan(x[i]);
  }
  return found;
}

}  // namespace llmopt::LLMOPT_ISA
