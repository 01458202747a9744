#pragma once
#include <cstdint>

#include "isa.h"

namespace llmopt {

struct NextTokenKernels {
  // index of the first largest of x[0, n), and that value; a NaN is the largest
  int64_t (*argmax)(const float* x, int64_t n, float* largest);
};

const NextTokenKernels& next_token_kernels_portable();
const NextTokenKernels& next_token_kernels_avx2();
const NextTokenKernels& next_token_kernels_avx512();

inline const NextTokenKernels& next_token_kernels(Isa isa) {
#ifdef LLMOPT_X86
  if (isa >= Isa::kAvx512) return next_token_kernels_avx512();
  if (isa == Isa::kAvx2) return next_token_kernels_avx2();
#else
  (void)isa;
#endif
  return next_token_kernels_portable();
}

}  // namespace llmopt
