#include "simd_portable.h"
#include "screened_head_kernel.h"

namespace llmopt {

const ScreenKernels& screen_kernels_portable() {
  static const ScreenKernels kernels = portable::make_screen_kernels();
  return kernels;
}

}  // namespace llmopt
