#include "simd_avx512.h"
#include "packed_tiles_kernel.h"

namespace llmopt {

const PackKernels& pack_kernels_avx512() {
  static const PackKernels kernels = avx512::make_pack_kernels();
  return kernels;
}

}  // namespace llmopt
