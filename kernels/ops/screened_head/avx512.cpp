#include "simd_avx512.h"
#include "screened_head_kernel.h"

namespace llmopt {

const ScreenKernels& screen_kernels_avx512() {
  static const ScreenKernels kernels = avx512::make_screen_kernels();
  return kernels;
}

}  // namespace llmopt
