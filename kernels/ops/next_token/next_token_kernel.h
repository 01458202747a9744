// argmax of a row of logits, once per instruction set.
#pragma once
#include <cmath>

#include "next_token.h"
#include "simd_math.h"

namespace llmopt::LLMOPT_ISA {

// values whose maximum is taken at once; only a block that raises it is searched
constexpr int64_t kArgmaxBlock = 512;

inline int64_t argmax(const float* x, int64_t n, float* largest) {
  float top = -INFINITY;
  int64_t at = 0;
  for (int64_t begin = 0; begin < n; begin += kArgmaxBlock) {
    const int64_t end = begin + kArgmaxBlock < n ? begin + kArgmaxBlock : n;
    F32x16 best = set1(-INFINITY);
    I32x16 bits = zero_i32();
    int64_t i = begin;
    for (; i + 16 <= end; i += 16) {
      const F32x16 values = load(x + i);
      // max returns its second operand where one is NaN; the bits keep it
      best = max(values, best), bits = max(bits, abs_bits(values));
    }
    float block = reduce_max(best);
    bool nan = reduce_max(bits) > 0x7f800000;
    for (; i < end; ++i) block = x[i] > block ? x[i] : block, nan = nan || std::isnan(x[i]);
    if (nan) {
      for (at = begin; !std::isnan(x[at]);) ++at;
      *largest = x[at];
      return at;
    }
    if (!(block > top)) continue;
    top = block;
    for (at = begin; x[at] != top;) ++at;
  }
  *largest = top;
  return at;
}

inline NextTokenKernels make_next_token_kernels() { return {argmax}; }

}  // namespace llmopt::LLMOPT_ISA
