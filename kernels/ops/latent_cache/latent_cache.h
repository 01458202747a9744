// What op.cpp hands to the loops of one instruction set.
#pragma once
#include <cstdint>

#include "isa.h"

namespace llmopt {

// largest qk_rope_head_dim
constexpr int64_t kMostRope = 512;

struct LatentCacheParams {
  const float* q;               // [T, heads * (nope + rope)]
  const float* kv_a;            // [T, rank + rope]
  int64_t q_stride, kv_stride;  // floats between tokens
  const float* norm;            // [rank], of the latents
  float eps;
  const float *cos, *sin;         // [positions, rope / 2]
  const int32_t *position, *seq;  // [T]; rope's position, and the sequence a token belongs to
  const int32_t* slot;            // [T]; place in the cache
  void* query;                    // [T, heads, query_dim], its last `rope` values are written here
  void* cache;                    // [sequences, capacity, row], see latent_rows.h
  int64_t row, seq_stride;        // elements of the cache
  float* scales;                  // [sequences, scale_stride], of an int8 cache
  int64_t scale_stride;
  int64_t tokens, heads, nope, rope, rank;
  bool absorbed;     // query_dim is rank + rope, and somebody else writes the latent part; else nope + rope
  bool interleaved;  // pairs (2i, 2i + 1) rather than (i, i + rope / 2)
  int dtype;         // of the cache, and of the query but for int8: then bfloat16

  int query_dtype() const { return dtype == 3 ? 1 : dtype; }
  int64_t query_dim() const { return (absorbed ? rank : nope) + rope; }
};

struct LatentCacheKernels {
  // tokens [begin, end): normalized latent and rotated key into the cache
  void (*write_rows)(const LatentCacheParams& p, int64_t begin, int64_t end);
  // heads [begin, end) of T * heads: the rotated part of the query, and the rest where it is not absorbed
  void (*write_queries)(const LatentCacheParams& p, int64_t begin, int64_t end);
};

const LatentCacheKernels& latent_cache_kernels_portable();
const LatentCacheKernels& latent_cache_kernels_avx2();
const LatentCacheKernels& latent_cache_kernels_avx512();

inline const LatentCacheKernels& latent_cache_kernels(Isa isa) {
#ifdef LLMOPT_X86
  if (isa >= Isa::kAvx512) return latent_cache_kernels_avx512();
  if (isa == Isa::kAvx2) return latent_cache_kernels_avx2();
#else
  (void)isa;
#endif
  return latent_cache_kernels_portable();
}

}  // namespace llmopt
