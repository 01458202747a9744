#include "simd_portable.h"
#include "packed_tiles_kernel.h"

namespace llmopt {

const PackKernels& pack_kernels_portable() {
  static const PackKernels kernels = portable::make_pack_kernels();
  return kernels;
}

}  // namespace llmopt
