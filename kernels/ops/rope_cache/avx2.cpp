#include "simd_avx2.h"
#include "rope_cache_kernel.h"

namespace llmopt {

const RopeCacheKernels& rope_cache_kernels_avx2() {
  static const RopeCacheKernels kernels = avx2::make_rope_cache_kernels();
  return kernels;
}

}  // namespace llmopt
