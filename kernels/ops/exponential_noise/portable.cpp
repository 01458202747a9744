#include "simd_portable.h"
#include "exponential_noise_kernel.h"

namespace llmopt {

const NoiseKernels& noise_kernels_portable() {
  static const NoiseKernels kernels = portable::make_noise_kernels();
  return kernels;
}

}  // namespace llmopt
