#include "simd_avx512.h"
#include "rope_cache_kernel.h"

namespace llmopt {

const RopeCacheKernels& rope_cache_kernels_avx512() {
  static const RopeCacheKernels kernels = avx512::make_rope_cache_kernels();
  return kernels;
}

}  // namespace llmopt
