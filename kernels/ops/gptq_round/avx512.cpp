#include "simd_avx512.h"
#include "gptq_round_kernel.h"

namespace llmopt {

const RoundKernels& round_kernels_avx512() {
  static const RoundKernels kernels{avx512::search, avx512::round};
  return kernels;
}

}  // namespace llmopt
