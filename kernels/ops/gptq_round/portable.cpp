#include "simd_portable.h"
#include "gptq_round_kernel.h"

namespace llmopt {

const RoundKernels& round_kernels_portable() {
  static const RoundKernels kernels{portable::search, portable::round};
  return kernels;
}

}  // namespace llmopt
