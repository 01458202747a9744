#include "simd_avx2.h"
#include "gptq_round_kernel.h"

namespace llmopt {

const RoundKernels& round_kernels_avx2() {
  static const RoundKernels kernels{avx2::search, avx2::round};
  return kernels;
}

}  // namespace llmopt
