#include "simd_portable.h"

namespace llmopt::portable {
// rows and vectors of columns of one block of a product: what fits the 16 registers of plain x86-64, four for each sixteen lanes
constexpr int kBlockRows = 2, kBlockVecs = 1;
}  // namespace llmopt::portable

#include "attention_kernel.h"

namespace llmopt {
const AttentionKernels& attention_kernels_portable(int dtype) { return portable::kernels_for(dtype); }
}  // namespace llmopt
