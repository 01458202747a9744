#include "simd_avx2.h"
#include "sample_token_kernel.h"

namespace llmopt {

const SampleTokenKernels& sample_token_kernels_avx2() {
  static const SampleTokenKernels kernels = avx2::make_sample_token_kernels();
  return kernels;
}

}  // namespace llmopt
