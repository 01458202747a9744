#include "simd_portable.h"
#include "rope_cache_kernel.h"

namespace llmopt {

const RopeCacheKernels& rope_cache_kernels_portable() {
  static const RopeCacheKernels kernels = portable::make_rope_cache_kernels();
  return kernels;
}

}  // namespace llmopt
