// What the screen of an 8-bit head needs of every instruction set.
//
// A code is 16 * high + low. The first plane gives every logit with 7.5 in place of `low`; what that is off is
//   sum over groups of s * x_scale * sum over k of (7.5 - low[k]) * x[k],
// and for low nibbles without a pattern its standard deviation is 4.6 * sqrt(sum of s^2 * energy), energy = x_scale^2 * sum of
// x[k]^2. A row whose logit, plus a margin of several such deviations, stays under a logit that is known exactly cannot win.
#pragma once
#include <cstdint>

#include "quant_linear.h"

namespace llmopt {

// One token, by group of its inputs, in caller-owned memory.
struct ScreenTerms {
  float* shift;   // 7.5 * x_scale * sum of q
  float* energy;  // margin^2 * x_scale^2 * sum of q^2
  float* offset;  // of the product with the high plane: the sums of the weights are those of both
};

struct Candidate {
  float value;
  int64_t index;
};

struct ScreenKernels {
  void (*terms)(const QuantTokens& x, int64_t token, const QuantWeight& w, float margin, const ScreenTerms& out);
  // Tiles [begin, end) of the high plane `w`. product: [16 * (end - begin)] of its product with one token. Writes
  // upper[tile]: above every logit of the tile, Inf where one is NaN; raises `best` to the largest logit the screen gives
  // and its tile.
  void (*bounds)(const QuantWeight& w, int64_t begin, int64_t end, const float* product, const ScreenTerms& terms,
                 float* upper, Candidate& best);
  // first of upper[begin, end) that is not under `least`, or end
  int64_t (*find)(const float* upper, int64_t begin, int64_t end, float least);
};

const ScreenKernels& screen_kernels_portable();
const ScreenKernels& screen_kernels_avx2();
const ScreenKernels& screen_kernels_avx512();

inline const ScreenKernels& screen_kernels(Isa isa) {
#ifdef LLMOPT_X86
  if (isa >= Isa::kAvx512) return screen_kernels_avx512();
  if (isa == Isa::kAvx2) return screen_kernels_avx2();
#else
  (void)isa;
#endif
  return screen_kernels_portable();
}

}  // namespace llmopt
