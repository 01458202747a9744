#include "simd_portable.h"
#include "quant_linear_kernel.h"

namespace llmopt {

const LinearKernels& linear_kernels_portable() {
  static const LinearKernels kernels = portable::make_linear_kernels();
  return kernels;
}

}  // namespace llmopt
