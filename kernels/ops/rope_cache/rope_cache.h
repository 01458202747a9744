// What op.cpp hands to the loops of one instruction set.
#pragma once
#include <cstdint>

#include "isa.h"

namespace llmopt {

struct RopeCacheParams {
  const float* qkv;              // [T, (heads + 2 kv_heads) * dim]
  int64_t qkv_stride;            // floats between tokens
  const float *q_norm, *k_norm;  // [dim], or null
  float eps;
  const float *cos, *sin;           // [positions, rotary / 2]
  const int32_t *position, *seq;    // [T]; rope's position, and the sequence a token belongs to
  const int32_t* slot;              // [T]; place in the cache
  void* q;                          // [T, heads, dim]
  void *k, *v;                      // [sequences, kv_heads, capacity, dim]
  float *k_scale, *v_scale;         // [sequences, kv_heads, capacity] of an int8 cache
  int64_t seq_stride, head_stride;  // elements of the cache
  int64_t tokens, heads, kv_heads, dim, rotary;
  bool interleaved;  // pairs (2i, 2i + 1) rather than (i, i + rotary / 2)
  int dtype;         // of k and v, and of q but for int8: then bfloat16
};

struct RopeCacheKernels {
  // head vectors [begin, end) of T * (heads + 2 kv_heads), token by token: queries, keys, values
  void (*run)(const RopeCacheParams& p, int64_t begin, int64_t end);
};

const RopeCacheKernels& rope_cache_kernels_portable();
const RopeCacheKernels& rope_cache_kernels_avx2();
const RopeCacheKernels& rope_cache_kernels_avx512();

inline const RopeCacheKernels& rope_cache_kernels(Isa isa) {
#ifdef LLMOPT_X86
  if (isa >= Isa::kAvx512) return rope_cache_kernels_avx512();
  if (isa == Isa::kAvx2) return rope_cache_kernels_avx2();
#else
  (void)isa;
#endif
  return rope_cache_kernels_portable();
}

}  // namespace llmopt
