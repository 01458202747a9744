#include "simd_portable.h"
#include "latent_cache_kernel.h"

namespace llmopt {

const LatentCacheKernels& latent_cache_kernels_portable() {
  static const LatentCacheKernels kernels = portable::make_latent_cache_kernels();
  return kernels;
}

}  // namespace llmopt
