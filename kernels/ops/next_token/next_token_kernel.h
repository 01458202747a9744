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
    int64_t i = begin;
    // max returns its second operand where one is NaN
    for (; i + 16 <= end; i += 16) best = max(load(x + i), best);
    float block = reduce_max(best);
    for (; i < end; ++i) block = x[i] > block ? x[i] : block;
    if (!(block > top)) continue;
    top = block;
    for (at = begin; x[at] != top;) ++at;
  }
  *largest = top;
  return at;
}

inline NextTokenKernels make_next_token_kernels() { return {argmax}; }

}  // namespace llmopt::LLMOPT_ISA
