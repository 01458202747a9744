#include "simd_avx2.h"
#include "exponential_noise_kernel.h"

namespace llmopt {

const NoiseKernels& noise_kernels_avx2() {
  static const NoiseKernels kernels = avx2::make_noise_kernels();
  return kernels;
}

}  // namespace llmopt
