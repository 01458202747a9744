// Passes over a row of logits, once per instruction set.
#pragma once
#include <algorithm>
#include <cmath>

#include "sample_token.h"
#include "simd_math.h"
#include "block_maximum.h"

namespace llmopt::LLMOPT_ISA {

inline void maxima(const float* x, int64_t n, float* out) {
  for (int64_t begin = 0; begin < n; begin += kSampleBlock) {
    const BlockMaximum block = block_maximum(x + begin, std::min(kSampleBlock, n - begin));
    out[begin / kSampleBlock] = block.nan ? NAN : block.value;
  }
}

inline F32x16 weights(F32x16 x, float top, float scale) { return exp(mul(sub(x, set1(top)), set1(scale))); }

inline F32x16 ratios(F32x16 x, F32x16 noise, float top, float scale) {
  return div(weights(x, top, scale), max(noise, set1(kLeastNoise)));
}

inline void sums(const float* x, int64_t n, float top, float scale, float* out) {
  for (int64_t begin = 0; begin < n; begin += kSampleBlock) {
    const int64_t end = std::min(begin + kSampleBlock, n);
    F32x16 sum = zero_f32();
    int64_t i = begin;
    for (; i + 16 <= end; i += 16) sum = add(sum, weights(load(x + i), top, scale));
    float total = reduce_add(sum);
    if (i < end) {
      float tail[16];
      store(tail, weights(load_n(x + i, static_cast<int>(end - i)), top, scale));
      for (int64_t j = 0; j < end - i; ++j) total += tail[j];
    }
    out[begin / kSampleBlock] = total;
  }
}

inline int64_t at_least(const float* x, int64_t n, float least, float* out) {
  int64_t found = 0;
  for (int64_t i = 0; i < n; ++i) {
    out[found] = x[i];
    found += x[i] >= least;
  }
  return found;
}

inline int64_t draw(const float* x, const float* noise, int64_t n, float top, float scale, float least,
                    float* largest) {
  float held[kSampleBlock + 16];
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store(held + i, ratios(load(x + i), load(noise + i), top, scale));
  if (i < n) {
    const int rest = static_cast<int>(n - i);
    store(held + i, ratios(load_n(x + i, rest), load_n(noise + i, rest), top, scale));
  }
  for (int64_t j = 0; j < n; ++j) held[j] = x[j] >= least ? held[j] : 0.0f;
  for (int64_t j = n; j % 16 != 0; ++j) held[j] = 0.0f;
  F32x16 best = zero_f32();
  for (int64_t j = 0; j < n; j += 16) best = max(load(held + j), best);
  const float block = reduce_max(best);
  if (!(block > *largest)) return -1;
  *largest = block;
  int64_t at = 0;
  while (at + 1 < n && held[at] != block) ++at;
  return at;
}

inline SampleTokenKernels make_sample_token_kernels() { return {maxima, sums, at_least, draw}; }

}  // namespace llmopt::LLMOPT_ISA
