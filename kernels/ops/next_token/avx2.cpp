#include "simd_avx2.h"
#include "next_token_kernel.h"

namespace llmopt {

const NextTokenKernels& next_token_kernels_avx2() {
  static const NextTokenKernels kernels = avx2::make_next_token_kernels();
  return kernels;
}

}  // namespace llmopt
