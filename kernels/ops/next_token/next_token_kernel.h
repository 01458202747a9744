// argmax of a row of logits, once per instruction set.
#pragma once
#include <cmath>

#include "next_token.h"
#include "simd_math.h"
#include "block_maximum.h"

namespace llmopt::LLMOPT_ISA {

// values whose maximum is taken at once; only a block that raises it is searched
constexpr int64_t kArgmaxBlock = 512;

inline int64_t argmax(const float* x, int64_t n, float* largest) {
  float top = -INFINITY;
  int64_t at = 0;
  for (int64_t begin = 0; begin < n; begin += kArgmaxBlock) {
    const int64_t end = begin + kArgmaxBlock < n ? begin + kArgmaxBlock : n;
    const BlockMaximum block = block_maximum(x + begin, end - begin);
    if (block.nan) {
      for (at = begin; !std::isnan(x[at]);) ++at;
      *largest = x[at];
      return at;
    }
    if (!(block.value > top)) continue;
    top = block.value;
    for (at = begin; x[at] != top;) ++at;
  }
  *largest = top;
  return at;
}

inline NextTokenKernels make_next_token_kernels() { return {argmax}; }

}  // namespace llmopt::LLMOPT_ISA
