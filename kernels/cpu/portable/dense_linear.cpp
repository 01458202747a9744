#include "simd_portable.h"
#include "dense_linear_kernel.h"

namespace llmopt {

const DenseKernels& dense_kernels_portable() {
  static const DenseKernels kernels = portable::make_dense_kernels();
  return kernels;
}

}  // namespace llmopt
