#include "simd_avx2.h"
#include "screened_head_kernel.h"

namespace llmopt {

const ScreenKernels& screen_kernels_avx2() {
  static const ScreenKernels kernels = avx2::make_screen_kernels();
  return kernels;
}

}  // namespace llmopt
