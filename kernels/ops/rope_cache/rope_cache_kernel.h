// qk-norm, rotary embedding (Su et al. 2021, arXiv 2104.09864) and the write into the KV cache, one head at a time.
#pragma once
#include <cmath>
#include <cstring>

#include "rope_cache.h"
#include "simd_math.h"

namespace llmopt::LLMOPT_ISA {

constexpr int64_t kMostDim = 512;

inline void norm_head(float* x, const float* weight, int64_t dim, float eps) {
  F32x16 sum = zero_f32();
  for (int64_t d = 0; d < dim; d += 16) sum = fmadd(load(x + d), load(x + d), sum);
  const F32x16 inverse = set1(1.0f / std::sqrt(reduce_add(sum) / static_cast<float>(dim) + eps));
  for (int64_t d = 0; d < dim; d += 16) {
    const int n = dim - d < 16 ? static_cast<int>(dim - d) : 16;
    store(x + d, mul(mul(load(x + d), inverse), load_n(weight + d, n)));
  }
}

inline void rotate_halves(float* x, const float* cos, const float* sin, int64_t half) {
  float* y = x + half;
  for (int64_t i = 0; i < half; i += 16) {
    const int n = half - i < 16 ? static_cast<int>(half - i) : 16;
    const F32x16 a = load_n(x + i, n), b = load_n(y + i, n), c = load_n(cos + i, n), s = load_n(sin + i, n);
    store_n(x + i, sub(mul(a, c), mul(b, s)), n);
    store_n(y + i, fmadd(a, s, mul(b, c)), n);
  }
}

inline void rotate_pairs(float* x, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[2 * i], b = x[2 * i + 1];
    x[2 * i] = a * cos[i] - b * sin[i];
    x[2 * i + 1] = b * cos[i] + a * sin[i];
  }
}

template <int kDType>
void store_head(const float* x, void* out, int64_t at, int64_t dim) {
  for (int64_t d = 0; d < dim; d += 16)
    store_as_n<kDType>(out, at + d, load(x + d), dim - d < 16 ? static_cast<int>(dim - d) : 16);
}

// `dim` values as int8, symmetric, with the scale beside them; values(d) gives sixteen from d on, zeros past the last. What is
// not finite makes the scale so, and with it every value read back; what lies below 1e-30 becomes zero.
template <class Values>
void store_codes(const Values& values, int8_t* out, float* scale, int64_t dim) {
  I32x16 bits = zero_i32();
  for (int64_t d = 0; d < dim; d += 16) bits = max(bits, abs_bits(values(d)));
  const int32_t top_bits = reduce_max(bits);
  float top;
  std::memcpy(&top, &top_bits, 4);
  const bool zero = top < 1e-30f;
  *scale = zero ? 0.0f : top / 127.0f;
  const F32x16 inverse = set1(zero ? 0.0f : 127.0f / top);
  for (int64_t d = 0; d < dim; d += 16) {
    int8_t codes[16];
    store_s8(codes, mul(values(d), inverse));
    std::memcpy(out + d, codes, static_cast<size_t>(dim - d < 16 ? dim - d : 16));
  }
}

template <int kDType>
void rope_cache_heads(const RopeCacheParams& p, int64_t begin, int64_t end) {
  const int64_t all = p.heads + 2 * p.kv_heads, half = p.rotary / 2;
  alignas(64) float x[kMostDim];
  for (int64_t i = begin; i < end; ++i) {
    const int64_t token = i / all, head = i % all;
    const bool query = head < p.heads, key = !query && head < p.heads + p.kv_heads;
    const float* from = p.qkv + token * p.qkv_stride + head * p.dim;
    for (int64_t d = 0; d < p.dim; d += 16)
      store(x + d, load_n(from + d, p.dim - d < 16 ? static_cast<int>(p.dim - d) : 16));
    if (query || key) {
      const float* weight = query ? p.q_norm : p.k_norm;
      if (weight) norm_head(x, weight, p.dim, p.eps);
      if (p.cos) {
        const float *cos = p.cos + p.position[token] * half, *sin = p.sin + p.position[token] * half;
        p.interleaved ? rotate_pairs(x, cos, sin, half) : rotate_halves(x, cos, sin, half);
      }
    }
    if (query) {
      store_head<kDType == 3 ? 1 : kDType>(x, p.q, (token * p.heads + head) * p.dim, p.dim);
    } else {
      const int64_t kv_head = (head - p.heads) % p.kv_heads;
      const int64_t at = p.seq[token] * p.seq_stride + kv_head * p.head_stride + p.slot[token] * p.dim;
      if constexpr (kDType == 3)
        store_codes([&x](int64_t d) { return load(x + d); }, static_cast<int8_t*>(key ? p.k : p.v) + at,
                    (key ? p.k_scale : p.v_scale) + at / p.dim, p.dim);
      else
        store_head<kDType>(x, key ? p.k : p.v, at, p.dim);
    }
  }
}

inline void rope_cache(const RopeCacheParams& p, int64_t begin, int64_t end) {
  if (p.dtype == 0) rope_cache_heads<0>(p, begin, end);
  if (p.dtype == 1) rope_cache_heads<1>(p, begin, end);
  if (p.dtype == 2) rope_cache_heads<2>(p, begin, end);
  if (p.dtype == 3) rope_cache_heads<3>(p, begin, end);
}

inline RopeCacheKernels make_rope_cache_kernels() { return {rope_cache}; }

}  // namespace llmopt::LLMOPT_ISA
