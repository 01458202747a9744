// Small products for attention, on the lanes of simd_*.h. All accumulate in float32.
#pragma once

#include "attention_rows.h"

namespace llmopt::LLMOPT_ISA {

// 64 bytes from element i on, whatever they hold
template <int kDType>
inline F32x16 load_bits(const void* base, int64_t i) {
  return load(static_cast<const float*>(element<kDType>(base, i)));
}
// Asks for the line that holds element i. Keys and values come in short runs of two streams, which the hardware does not
// follow by itself: without this, waiting and computing add up.
template <int kDType>
inline void prefetch(const void* base, int64_t i) {
  __builtin_prefetch(element<kDType>(base, i), 0, 2);
}

// vectors of 16 elements in a line of the cache
template <int kDType>
constexpr int kLineVecs = kDType == 0   ? 1
                          : kDType == 3 ? 4
                                        : 2;

// 2^x for x <= 0, relative error under 2e-7, and exactly 0 from -64 down: beside the row's largest weight, which is 1,
// that is far below float32's rounding. NaN stays NaN.
inline F32x16 exp2_weight(F32x16 x) {
  const F32x16 clamped = max(set1(-64.0f), x);
  const F32x16 n = round_even(clamped);
  const F32x16 r = sub(clamped, n);
  F32x16 p = set1(1.326472726e-3f);
  p = fmadd(p, r, set1(9.671512700e-3f));
  p = fmadd(p, r, set1(5.550733744e-2f));
  p = fmadd(p, r, set1(2.402224208e-1f));
  p = fmadd(p, r, set1(6.931469776e-1f));
  p = fmadd(p, r, set1(1.0f));
  return sub(scale_pow2(p, n), set1(5.421010862e-20f));  // 2^-64
}
inline float exp2_weight(float x) {
  float t[16];
  store(t, exp2_weight(set1(x)));
  return t[0];
}

// Rows that are read where they lie come, in bfloat16, 32 values at a time as even and odd ones; what is left below 32
// comes in order. `in` and `out` may not overlap.
template <int kDType>
constexpr bool kPairs = kDType == 1;
inline void restore_order(const float* in, int64_t dim, float* out) {
  int64_t d = 0;
  for (; d + 32 <= dim; d += 32) {
    for (int i = 0; i < 16; ++i) {
      out[d + 2 * i] = in[d + i];
      out[d + 2 * i + 1] = in[d + 16 + i];
    }
  }
  std::copy(in + d, in + round_up(dim, 16), out + d);
}

// c[R, 16 V] = keep[r] * c[r] + a[R, k] @ b[k, 16 V]; keep == nullptr starts from zero. `lanes` < 16 only with V == 1.
// kStream: b comes from memory, and what lies `ahead` elements on is wanted next.
template <int R, int V, int kDType, bool kStream>
[[gnu::noinline]] void product_block(const float* a, int64_t lda, const void* b, int64_t ldb, float* c, int64_t ldc,
                                     int64_t k, const float* keep, int lanes, int64_t ahead) {
  F32x16 acc[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[r][v] = keep ? mul(load(c + r * ldc + 16 * v), set1(keep[r])) : zero_f32();
  }
  for (int64_t j = 0; j < k; ++j) {
    F32x16 x[V];
    if constexpr (kStream && kPairs<kDType> && V > 1) {
#pragma GCC unroll 8
      for (int v = 0; v < V; v += 2) split_bf16(load_bits<kDType>(b, j * ldb + 16 * v), x[v], x[v + 1]);
    } else {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v)
        x[v] = V == 1 && lanes < 16 ? load_as_n<kDType>(b, j * ldb, lanes) : load_as<kDType>(b, j * ldb + 16 * v);
    }
    if constexpr (kStream) {
#pragma GCC unroll 8
      for (int v = 0; v < V; v += kLineVecs<kDType>) prefetch<kDType>(b, j * ldb + ahead + 16 * v);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const F32x16 w = set1(a[r * lda + j]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[r][v] = fmadd(w, x[v], acc[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(c + r * ldc + 16 * v, acc[r][v]);
  }
}

// product_block over all columns: V vectors at a time, then half as many, down to a tail of less than one
template <int R, int V, int kDType, bool kStream>
inline void product(const float* a, int64_t lda, const void* b, int64_t ldb, float* c, int64_t ldc, int64_t k,
                    const float* keep, int64_t cols, int64_t ahead = 0) {
  int64_t done = 0;
  for (; done + 16 * V <= cols; done += 16 * V)
    product_block<R, V, kDType, kStream>(a, lda, element<kDType>(b, done), ldb, c + done, ldc, k, keep, 16, ahead);
  if (done == cols) return;
  if constexpr (V > 1) {
    product<R, V / 2, kDType, kStream>(a, lda, element<kDType>(b, done), ldb, c + done, ldc, k, keep, cols - done,
                                       ahead);
  } else {
    const int lanes = static_cast<int>(cols - done);
    product_block<R, 1, kDType, kStream>(a, lda, element<kDType>(b, done), ldb, c + done, ldc, k, keep, lanes, ahead);
  }
}

// product of `rows` <= R rows of float32
template <int R>
inline void product_rows(int rows, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                         int64_t k, const float* keep, int64_t cols) {
  if (rows == R) {
    product<R, kBlockVecs, 0, false>(a, lda, b, ldb, c, ldc, k, keep, cols);
  } else if constexpr (R > 1) {
    product_rows<R - 1>(rows, a, lda, b, ldb, c, ldc, k, keep, cols);
  }
}

// acc[r * C + c] += q[r] . k[c] over `dim` elements, q in the order in which k comes (see kPairs), padded with zeros to
// whole vectors. Prefetches what lies `ahead` elements on.
template <int R, int C, int kDType>
inline void dots(const float* q, int64_t ldq, const void* const (&k)[C], int64_t dim, int64_t ahead, F32x16* acc) {
  F32x16 sum[R * C];
#pragma GCC unroll 16
  for (int i = 0; i < R * C; ++i) sum[i] = acc[i];
  int64_t d = 0;
  if constexpr (kPairs<kDType>) {
    for (; d + 32 <= dim; d += 32) {
      F32x16 even[C], odd[C];
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        split_bf16(load_bits<kDType>(k[c], d), even[c], odd[c]);
        prefetch<kDType>(k[c], d + ahead);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const F32x16 x = load(q + r * ldq + d), y = load(q + r * ldq + d + 16);
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) sum[r * C + c] = fmadd(y, odd[c], fmadd(x, even[c], sum[r * C + c]));
      }
    }
  }
  for (; d < dim; d += 16) {
    const int lanes = static_cast<int>(std::min<int64_t>(16, dim - d));
    F32x16 x[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      x[c] = lanes == 16 ? load_as<kDType>(k[c], d) : load_as_n<kDType>(k[c], d, lanes);
      if (d % (16 * kLineVecs<kDType>) == 0) prefetch<kDType>(k[c], d + ahead);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const F32x16 y = load(q + r * ldq + d);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sum[r * C + c] = fmadd(y, x[c], sum[r * C + c]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R * C; ++i) acc[i] = sum[i];
}

// dots() of int8 keys and queries in int16, padded with zeros to 32: exact sums of products, half of the work of float32. A
// lane's sum fits into int32 up to a dim of 8192.
template <int R, int C>
inline void dots_s8(const int16_t* q, int64_t ldq, const void* const (&k)[C], int64_t dim, int64_t ahead, F32x16* acc) {
  I32x16 sum[R * C];
#pragma GCC unroll 16
  for (int i = 0; i < R * C; ++i) sum[i] = zero_i32();
  for (int64_t d = 0; d < dim; d += 32) {
    const int n = static_cast<int>(std::min<int64_t>(32, dim - d));
    S16x32 x[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const int8_t* at = static_cast<const int8_t*>(k[c]) + d;
      x[c] = n == 32 ? load_s8x32(at) : load_s8x32_n(at, n);
      if (d % 64 == 0) prefetch<3>(at, ahead);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const S16x32 y = load_s16x32(q + r * ldq + d);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sum[r * C + c] = dot_s16(sum[r * C + c], y, x[c]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R * C; ++i) acc[i] = to_f32(sum[i]);
}

// out[d, key] = in[key, d] for up to kTileKeys keys; keys past `n` give zeros
template <int kDType>
inline void pack_transposed(const void* in, int64_t stride, int64_t n, int64_t dim, float* out) {
  for (int64_t key = 0; key < kTileKeys; key += 16) {
    int64_t d = 0;
    if constexpr (kPairs<kDType>) {
      // pairs of neighbours in d move as one lane: half the shuffles
      for (; d + 32 <= dim; d += 32) {
        F32x16 x[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          const int64_t at = (key + i) * stride + d;
          x[i] = key + i < n ? load_bits<kDType>(in, at) : zero_f32();
          prefetch<kDType>(in, at + kTileKeys * stride);
        }
        transpose(x);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          F32x16 even, odd;
          split_bf16(x[i], even, odd);
          store(out + (d + 2 * i) * kTileKeys + key, even);
          store(out + (d + 2 * i + 1) * kTileKeys + key, odd);
        }
      }
    }
    for (; d < dim; d += 16) {
      const int lanes = static_cast<int>(std::min<int64_t>(16, dim - d));
      F32x16 x[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const int64_t at = (key + i) * stride + d;
        if (key + i >= n)
          x[i] = zero_f32();
        else
          x[i] = lanes == 16 ? load_as<kDType>(in, at) : load_as_n<kDType>(in, at, lanes);
        if (d % (16 * kLineVecs<kDType>) == 0) prefetch<kDType>(in, at + kTileKeys * stride);
      }
      transpose(x);
      for (int i = 0; i < lanes; ++i) store(out + (d + i) * kTileKeys + key, x[i]);
    }
  }
}

// out[key, d] = in[key, d] as float32, rows padded with zeros to `out_stride`, a multiple of 16
template <int kDType>
inline void pack_rows(const void* in, int64_t stride, int64_t n, int64_t dim, float* out, int64_t out_stride) {
  for (int64_t key = 0; key < n; ++key) {
    int64_t d = 0;
    for (; d + 16 <= dim; d += 16) {
      store(out + key * out_stride + d, load_as<kDType>(in, key * stride + d));
      if (d % (16 * kLineVecs<kDType>) == 0) prefetch<kDType>(in, (key + kTileKeys) * stride + d);
    }
    if (d < dim) store(out + key * out_stride + d, load_as_n<kDType>(in, key * stride + d, static_cast<int>(dim - d)));
  }
}

}  // namespace llmopt::LLMOPT_ISA
