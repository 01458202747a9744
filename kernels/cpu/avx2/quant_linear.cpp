#include "simd_avx2.h"
#include "quant_linear_kernel.h"

namespace llmopt {

const LinearKernels& linear_kernels_avx2() {
  static const LinearKernels kernels = avx2::make_linear_kernels();
  return kernels;
}

}  // namespace llmopt
