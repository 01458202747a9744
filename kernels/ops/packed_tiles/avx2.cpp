#include "simd_avx2.h"
#include "packed_tiles_kernel.h"

namespace llmopt {

const PackKernels& pack_kernels_avx2() {
  static const PackKernels kernels = avx2::make_pack_kernels();
  return kernels;
}

}  // namespace llmopt
