// Products of few rows with keys and values in bfloat16, which take pairs of terms (vdpbf16ps): half of the multiplications
// of float32, and nothing to widen. Queries stay bfloat16, weights are rounded to it, as in prefill.
#pragma once

#include "attention_math.h"
#include "simd_bf16.h"

namespace llmopt::LLMOPT_ISA {

// For rows of whole 32 values.
struct PairDots {
  static constexpr bool kOn = true;

  // Heads of a KV head from which they are used: fewer wait for memory either way. By the heads and not by the rows, so that a
  // token's numbers are the same alone and among a few.
  static constexpr int64_t kLeastGroup = 4;

  static bool takes(const AttentionParams& p) {
    return p.group() >= kLeastGroup && p.dim % 32 == 0 && p.dim_rope % 32 == 0 && p.dim_v % 32 == 0;
  }

  // acc[r * C + c] += q[r] . k[c], 16 partial sums each; prefetches what lies `ahead` elements on
  template <int R, int C>
  static void scores(const uint16_t* q, int64_t ldq, const void* const (&k)[C], int64_t dim, int64_t ahead,
                     F32x16* acc) {
    F32x16 sum[R * C];
#pragma GCC unroll 16
    for (int i = 0; i < R * C; ++i) sum[i] = acc[i];
    for (int64_t d = 0; d < dim; d += 32) {
      F32x16 x[C];
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        x[c] = load_bits<1>(k[c], d);
        prefetch<1>(k[c], d + ahead);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const F32x16 y = load_bits<1>(q + r * ldq, d);
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) sum[r * C + c] = dot_bf16(sum[r * C + c], y, x[c]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < R * C; ++i) acc[i] = sum[i];
  }

  static_assert(kTileKeys == 32, "a tile's weights are two vectors");
  static void store_weights(float* out, F32x16 low, F32x16 high) {
    store_bf16(reinterpret_cast<uint16_t*>(out), low, high);
  }

  // acc[R, cols] = keep[r] * acc[r] + weights[R, n] x values[n, cols], of each 32 columns first the even ones. Weights past n
  // are zero.
  template <int R, int V>
  static void values(const uint16_t* w, int64_t ldw, const uint16_t* v, int64_t ldv, float* acc, int64_t ldacc,
                     int64_t n, const float* keep, int64_t cols, int64_t ahead) {
    int64_t done = 0;
    for (; done + 16 * V <= cols; done += 16 * V)
      values_block<R, V>(w, ldw, v + done, ldv, acc + done, ldacc, n, keep, ahead);
    if constexpr (V > 2) {
      if (done < cols) values<R, V / 2>(w, ldw, v + done, ldv, acc + done, ldacc, n, keep, cols - done, ahead);
    }
  }

 private:
  template <int R, int V>
  [[gnu::noinline]] static void values_block(const uint16_t* w, int64_t ldw, const uint16_t* v, int64_t ldv, float* acc,
                                             int64_t ldacc, int64_t n, const float* keep, int64_t ahead) {
    F32x16 sum[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < V; ++i) sum[r][i] = mul(load(acc + r * ldacc + 16 * i), set1(keep[r]));
    for (int64_t j = 0; j < n; j += 2) {
      const uint16_t *even = v + j * ldv, *odd = even + ldv;
      F32x16 x[V];
#pragma GCC unroll 4
      for (int i = 0; i < V; i += 2) {
        const F32x16 a = load_bits<1>(even, 16 * i), b = j + 1 < n ? load_bits<1>(odd, 16 * i) : zero_f32();
        pair_up(a, b, x[i], x[i + 1]);
        prefetch<1>(even, ahead + 16 * i), prefetch<1>(odd, ahead + 16 * i);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const F32x16 pair = load_pair(w + r * ldw + j);
#pragma GCC unroll 8
        for (int i = 0; i < V; ++i) sum[r][i] = dot_bf16(sum[r][i], pair, x[i]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < V; ++i) store(acc + r * ldacc + 16 * i, sum[r][i]);
  }
};

}  // namespace llmopt::LLMOPT_ISA
