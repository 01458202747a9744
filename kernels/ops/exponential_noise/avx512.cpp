#include "simd_avx512.h"
#include "exponential_noise_kernel.h"

namespace llmopt {

const NoiseKernels& noise_kernels_avx512() {
  static const NoiseKernels kernels = avx512::make_noise_kernels();
  return kernels;
}

}  // namespace llmopt
