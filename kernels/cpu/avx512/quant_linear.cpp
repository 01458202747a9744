#include "simd_avx512.h"
#include "quant_linear_kernel.h"

namespace llmopt {

const LinearKernels& linear_kernels_avx512() {
  static const LinearKernels kernels = avx512::make_linear_kernels();
  return kernels;
}

}  // namespace llmopt
