#include "simd_avx512.h"
#include "latent_cache_kernel.h"

namespace llmopt {

const LatentCacheKernels& latent_cache_kernels_avx512() {
  static const LatentCacheKernels kernels = avx512::make_latent_cache_kernels();
  return kernels;
}

}  // namespace llmopt
