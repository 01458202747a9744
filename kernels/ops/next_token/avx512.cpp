#include "simd_avx512.h"
#include "next_token_kernel.h"

namespace llmopt {

const NextTokenKernels& next_token_kernels_avx512() {
  static const NextTokenKernels kernels = avx512::make_next_token_kernels();
  return kernels;
}

}  // namespace llmopt
