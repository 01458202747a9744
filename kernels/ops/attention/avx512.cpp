#include "simd_avx512.h"

namespace llmopt::avx512 {
// rows and vectors of columns of one block of a product: 24 accumulators of the 32 registers
constexpr int kBlockRows = 6, kBlockVecs = 4;
}  // namespace llmopt::avx512

#include "attention_kernel.h"

namespace llmopt {
const AttentionKernels& attention_kernels_avx512(int dtype) { return avx512::kernels_for(dtype); }
}  // namespace llmopt
