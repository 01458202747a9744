// Linear layers whose weights are not quantized (float32, bfloat16, float16), for the few tokens of a decode step: bound by
// reading the weights, row by row. Many tokens are torch's business.
#pragma once
#include <cstdint>

#include "isa.h"
#include "quant_linear.h"

namespace llmopt {

struct DenseWeight {
  const void* data;  // [rows, cols], dense
  int dtype;         // DType
  int64_t rows, cols;
};

struct DenseKernels {
  // tokens [begin, end) as float32, normalized where the source says so, in the order in which product() for weights of
  // `weight_dtype` wants them; rows of out are padded_cols(cols) apart
  void (*prepare)(const TokenSource& x, int weight_dtype, int64_t begin, int64_t end, float* out);
  // y[token, row] for rows [row_begin, row_end); row_begin a multiple of 16
  void (*product)(const DenseWeight& w, const float* x, int64_t tokens, int64_t row_begin, int64_t row_end,
                  const Output& y);
};

// floats of one prepared token
inline int64_t padded_cols(int64_t cols) { return (cols + 31) / 32 * 32; }

const DenseKernels& dense_kernels_portable();
const DenseKernels& dense_kernels_avx2();
const DenseKernels& dense_kernels_avx512();

inline const DenseKernels& dense_kernels(Isa isa) {
#ifdef LLMOPT_X86
  if (isa >= Isa::kAvx512) return dense_kernels_avx512();
  if (isa == Isa::kAvx2) return dense_kernels_avx2();
#else
  (void)isa;
#endif
  return dense_kernels_portable();
}

}  // namespace llmopt
