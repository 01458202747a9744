// What packing works on, and the function table of its loops; see packed_tiles_kernel.h.
#pragma once
#include <cstdint>

#include "isa.h"
#include "quant_linear.h"

namespace llmopt {

struct PackedTiles {
  QuantWeight weight;
  const uint16_t* scales;  // [rows, groups] float16, from row 16 * first on
  const uint8_t* zeros;    // [rows, groups], or null; likewise
  uint8_t* out;            // the whole packed weight
  int64_t first = 0;       // tile that is written first
};

struct PackKernels {
  // words [ceil(cols * bits / 32), stride]: a word holds consecutive columns of a row, the first in the lowest bits
  void (*words)(const PackedTiles& tiles, const uint32_t* words, int64_t stride, int64_t tile);
  // the nearest codes of float32 or bfloat16 rows, from row 16 * first on; false: a weight is NaN or Inf
  bool (*nearest_f32)(const PackedTiles& tiles, const void* weight, int64_t stride, int64_t tile);
  bool (*nearest_bf16)(const PackedTiles& tiles, const void* weight, int64_t stride, int64_t tile);
  // the sums of a symmetric tile that has scales and codes
  void (*sums)(const PackedTiles& tiles, int64_t tile);
};

const PackKernels& pack_kernels_portable();
const PackKernels& pack_kernels_avx2();
const PackKernels& pack_kernels_avx512();

inline const PackKernels& pack_kernels(Isa isa) {
#ifdef LLMOPT_X86
  if (isa >= Isa::kAvx512) return pack_kernels_avx512();
  if (isa == Isa::kAvx2) return pack_kernels_avx2();
#else
  (void)isa;
#endif
  return pack_kernels_portable();
}

}  // namespace llmopt
