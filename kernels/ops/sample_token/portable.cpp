#include "simd_portable.h"
#include "sample_token_kernel.h"

namespace llmopt {

const SampleTokenKernels& sample_token_kernels_portable() {
  static const SampleTokenKernels kernels = portable::make_sample_token_kernels();
  return kernels;
}

}  // namespace llmopt
