// Norm of the latents, rotary embedding (Su et al. 2021, arXiv 2104.09864) of the part that carries positions, and the
// write into the latent cache (DeepSeek-V2, arXiv 2405.04434).
#pragma once
#include "../rope_cache/rope_cache_kernel.h"
#include "latent_cache.h"

namespace llmopt::LLMOPT_ISA {

static_assert(kMostRope <= kMostDim);

template <int kDType>
void rotate_part(const LatentCacheParams& p, int64_t token, const float* from, void* out, int64_t at) {
  alignas(64) float x[kMostDim];
  const int64_t half = p.rope / 2;
  for (int64_t d = 0; d < p.rope; d += 16)
    store(x + d, load_n(from + d, p.rope - d < 16 ? static_cast<int>(p.rope - d) : 16));
  const float *cos = p.cos + p.position[token] * half, *sin = p.sin + p.position[token] * half;
  p.interleaved ? rotate_pairs(x, cos, sin, half) : rotate_halves(x, cos, sin, half);
  store_head<kDType>(x, out, at, p.rope);
}

template <int kDType>
void write_latent_rows(const LatentCacheParams& p, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const float* x = p.kv_a + t * p.kv_stride;
    const int64_t at = p.seq[t] * p.seq_stride + p.slot[t] * p.row;
    F32x16 sum = zero_f32();
    const auto lanes = [&](int64_t d) { return p.rank - d < 16 ? static_cast<int>(p.rank - d) : 16; };
    for (int64_t d = 0; d < p.rank; d += 16) {
      const F32x16 v = load_n(x + d, lanes(d));
      sum = fmadd(v, v, sum);
    }
    const F32x16 inverse = set1(1.0f / std::sqrt(reduce_add(sum) / static_cast<float>(p.rank) + p.eps));
    const auto normalized = [&](int64_t d) {
      return mul(mul(load_n(x + d, lanes(d)), inverse), load_n(p.norm + d, lanes(d)));
    };
    if constexpr (kDType == 3) {
      int8_t* out = static_cast<int8_t*>(p.cache) + at;
      store_codes(normalized, out, p.scales + p.seq[t] * p.scale_stride + p.slot[t], p.rank);
      rotate_part<1>(p, t, x + p.rank, out + p.rank, 0);
    } else {
      for (int64_t d = 0; d < p.rank; d += 16) store_as_n<kDType>(p.cache, at + d, normalized(d), lanes(d));
      rotate_part<kDType>(p, t, x + p.rank, p.cache, at + p.rank);
    }
  }
}

template <int kDType>
void write_query_heads(const LatentCacheParams& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t token = i / p.heads, head = i % p.heads, at = i * p.query_dim();
    const float* x = p.q + token * p.q_stride + head * (p.nope + p.rope);
    for (int64_t d = 0; !p.absorbed && d < p.nope; d += 16) {
      const int n = p.nope - d < 16 ? static_cast<int>(p.nope - d) : 16;
      store_as_n<kDType>(p.query, at + d, load_n(x + d, n), n);
    }
    rotate_part<kDType>(p, token, x + p.nope, p.query, at + p.query_dim() - p.rope);
  }
}

inline void write_rows(const LatentCacheParams& p, int64_t begin, int64_t end) {
  if (p.dtype == 0) write_latent_rows<0>(p, begin, end);
  if (p.dtype == 1) write_latent_rows<1>(p, begin, end);
  if (p.dtype == 2) write_latent_rows<2>(p, begin, end);
  if (p.dtype == 3) write_latent_rows<3>(p, begin, end);
}

inline void write_queries(const LatentCacheParams& p, int64_t begin, int64_t end) {
  if (p.query_dtype() == 0) write_query_heads<0>(p, begin, end);
  if (p.query_dtype() == 1) write_query_heads<1>(p, begin, end);
  if (p.query_dtype() == 2) write_query_heads<2>(p, begin, end);
}

inline LatentCacheKernels make_latent_cache_kernels() { return {write_rows, write_queries}; }

}  // namespace llmopt::LLMOPT_ISA
