#include "simd_avx512.h"

namespace llmopt::avx512 {
constexpr int kBlockVecs = 4;  // of attention_math.h
// keys whose scores are in registers at once; rows and vectors of a block of values
constexpr int kKeyBlock = 24, kRowBlock = 8, kVecBlock = 2;
}  // namespace llmopt::avx512

#include "latent_attention_kernel.h"

namespace llmopt {
const LatentKernels& latent_kernels_avx512(int dtype) { return avx512::latent_kernels_for(dtype); }
}  // namespace llmopt
