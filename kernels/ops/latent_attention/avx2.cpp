#include "simd_avx2.h"

namespace llmopt::avx2 {
constexpr int kBlockVecs = 1;  // of attention_math.h
// keys whose scores are in registers at once; rows and vectors of a block of values
constexpr int kKeyBlock = 6, kRowBlock = 4, kVecBlock = 1;
}  // namespace llmopt::avx2

#include "latent_attention_kernel.h"

namespace llmopt {
const LatentKernels& latent_kernels_avx2(int dtype) { return avx2::latent_kernels_for(dtype); }
}  // namespace llmopt
