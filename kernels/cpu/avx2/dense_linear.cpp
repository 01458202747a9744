#include "simd_avx2.h"
#include "dense_linear_kernel.h"

namespace llmopt {

const DenseKernels& dense_kernels_avx2() {
  static const DenseKernels kernels = avx2::make_dense_kernels();
  return kernels;
}

}  // namespace llmopt
