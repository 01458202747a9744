#include "simd_portable.h"
#include "next_token_kernel.h"

namespace llmopt {

const NextTokenKernels& next_token_kernels_portable() {
  static const NextTokenKernels kernels = portable::make_next_token_kernels();
  return kernels;
}

}  // namespace llmopt
