#pragma once
#include <cstdint>

#include "isa.h"

namespace llmopt {

// logits whose largest is kept: what a filter leaves out whole is not looked at again
constexpr int64_t kSampleBlock = 256;
// smaller noise counts as this much: weights have a floor, and nothing that light may win
constexpr float kLeastNoise = 1e-20f;

struct SampleTokenKernels {
  // the largest of each block of x[0, n); NaN where a block holds one
  void (*maxima)(const float* x, int64_t n, float* out);
  // the sum of e^((x - top) * scale) over each block
  void (*sums)(const float* x, int64_t n, float top, float scale, float* out);
  // those of a block x[0, n) that are at least `least`, in order; how many
  int64_t (*at_least)(const float* x, int64_t n, float least, float* out);
  // of a block x[0, n): index of the first largest e^((x - top) * scale) / noise among those that are at least `least`, if it
  // is more than `largest`, which it then becomes; or else -1
  int64_t (*draw)(const float* x, const float* noise, int64_t n, float top, float scale, float least, float* largest);
};

const SampleTokenKernels& sample_token_kernels_portable();
const SampleTokenKernels& sample_token_kernels_avx2();
const SampleTokenKernels& sample_token_kernels_avx512();

inline const SampleTokenKernels& sample_token_kernels(Isa isa) {
#ifdef LLMOPT_X86
  if (isa >= Isa::kAvx512) return sample_token_kernels_avx512();
  if (isa == Isa::kAvx2) return sample_token_kernels_avx2();
#else
  (void)isa;
#endif
  return sample_token_kernels_portable();
}

}  // namespace llmopt
