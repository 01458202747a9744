// Function table of the GPTQ rounding loops; see gptq_round_kernel.h.
#pragma once
#include <cstdint>

#include "isa.h"

namespace llmopt {

struct RoundKernels {
  // scale and zero of one group of up to 16 rows; w: [rows][row_stride], weight: [columns]
  void (*search)(const float* w, int64_t row_stride, int rows, int64_t columns, const float* weight, int bits,
                 bool symmetric, float* scale, float* zero);
  // codes and scaled errors of one span of up to 16 rows; u: [columns][u_stride] upper triangular
  void (*round)(const float* w, int64_t row_stride, int rows, int64_t columns, const float* u, int64_t u_stride,
                const float* scale, const float* zero, int top, float* q, float* error);
};

const RoundKernels& round_kernels_portable();
const RoundKernels& round_kernels_avx2();
const RoundKernels& round_kernels_avx512();

inline const RoundKernels& round_kernels(Isa isa) {
#ifdef LLMOPT_X86
  if (isa >= Isa::kAvx512) return round_kernels_avx512();
  if (isa == Isa::kAvx2) return round_kernels_avx2();
#else
  (void)isa;
#endif
  return round_kernels_portable();
}

}  // namespace llmopt
