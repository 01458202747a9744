#include "simd_avx512.h"
#include "sample_token_kernel.h"

namespace llmopt {

const SampleTokenKernels& sample_token_kernels_avx512() {
  static const SampleTokenKernels kernels = avx512::make_sample_token_kernels();
  return kernels;
}

}  // namespace llmopt
