#include "simd_avx512.h"
#include "dense_linear_kernel.h"

namespace llmopt {

const DenseKernels& dense_kernels_avx512() {
  static const DenseKernels kernels = avx512::make_dense_kernels();
  return kernels;
}

}  // namespace llmopt
