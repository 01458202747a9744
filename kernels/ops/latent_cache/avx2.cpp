#include "simd_avx2.h"
#include "latent_cache_kernel.h"

namespace llmopt {

const LatentCacheKernels& latent_cache_kernels_avx2() {
  static const LatentCacheKernels kernels = avx2::make_latent_cache_kernels();
  return kernels;
}

}  // namespace llmopt
