#include "simd_avx2.h"

namespace llmopt::avx2 {
// rows and vectors of columns of one block of a product: 12 accumulators of the 16 registers, two for each sixteen lanes
constexpr int kBlockRows = 6, kBlockVecs = 1;
}  // namespace llmopt::avx2

#include "attention_kernel.h"

namespace llmopt {
const AttentionKernels& attention_kernels_avx2(int dtype) { return avx2::kernels_for(dtype); }
}  // namespace llmopt
