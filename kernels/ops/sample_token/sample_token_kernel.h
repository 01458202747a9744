// Passes over a row of logits, once per instruction set.
#pragma once
#include <algorithm>
#include <cmath>

#include "sample_token.h"
#include "simd_math.h"

namespace llmopt::LLMOPT_ISA {

inline void maxima(const float* x, int64_t n, float* out) {
  for (int64_t begin = 0; begin < n; begin += kSampleBlock) {
    const int64_t end = std::min(begin + kSampleBlock, n);
    F32x16 best = set1(-INFINITY);
    I32x16 bits = zero_i32();
    int64_t i = begin;
    for (; i + 16 <= end; i += 16) {
      const F32x16 values = load(x + i);
      // max returns its second operand where one is NaN; the bits keep it
      best = max(values, best), bits = max(bits, abs_bits(values));
    }
    float largest = reduce_max(best);
    bool nan = reduce_max(bits) > 0x7f800000;
    for (; i < end; ++i) largest = x[i] > largest ? x[i] : largest, nan = nan || std::isnan(x[i]);
    out[begin / kSampleBlock] = nan ? NAN : largest;
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

inline int64_t at_least(const float* x, int64_t n, float least, int32_t* out) {
  int64_t found = 0, i = 0;
  const auto keep = [&](int64_t end) {
    for (; i < end; ++i) {
      if (x[i] >= least) out[found++] = static_cast<int32_t>(i);
    }
  };
  while (i + 16 <= n) {
    if (reduce_max(load(x + i)) >= least) {
      keep(i + 16);
    } else {
      i += 16;
    }
  }
  keep(n);
  return found;
}

inline int64_t draw(const float* x, const float* noise, int64_t n, float top, float scale, float* largest) {
  float held[kSampleBlock];
  float best = -1.0f;
  int64_t at = 0;
  for (int64_t begin = 0; begin < n; begin += kSampleBlock) {
    const int64_t count = std::min(kSampleBlock, n - begin);
    F32x16 top_of_block = zero_f32();
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
      const F32x16 ratio = ratios(load(x + begin + i), load(noise + begin + i), top, scale);
      store(held + i, ratio);
      top_of_block = max(ratio, top_of_block);
    }
    float block = reduce_max(top_of_block);
    if (i < count) {
      const int rest = static_cast<int>(count - i);
      float tail[16];
      store(tail, ratios(load_n(x + begin + i, rest), load_n(noise + begin + i, rest), top, scale));
      for (int j = 0; j < rest; ++j) held[i + j] = tail[j], block = tail[j] > block ? tail[j] : block;
    }
    if (!(block > best)) continue;
    int64_t j = 0;
    while (j + 1 < count && held[j] != block) ++j;
    best = block, at = begin + j;
  }
  *largest = best;
  return at;
}

inline SampleTokenKernels make_sample_token_kernels() { return {maxima, sums, at_least, draw}; }

}  // namespace llmopt::LLMOPT_ISA
