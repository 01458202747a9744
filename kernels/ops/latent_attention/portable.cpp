#include "simd_portable.h"

namespace llmopt::portable {
constexpr int kBlockVecs = 1;  // of attention_math.h
// keys whose scores are in registers at once; rows and vectors of a block of values
constexpr int kKeyBlock = 4, kRowBlock = 4, kVecBlock = 1;
}  // namespace llmopt::portable

#include "latent_attention_kernel.h"

namespace llmopt {
const LatentKernels& latent_kernels_portable(int dtype) { return portable::latent_kernels_for(dtype); }
}  // namespace llmopt
