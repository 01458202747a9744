// Loops of the screened head, once per instruction set.
#pragma once
#include <cmath>

#include "screened_head.h"
#include "simd_math.h"

namespace llmopt::LLMOPT_ISA {

inline void screen_terms(const QuantTokens& x, int64_t token, const QuantWeight& w, float margin,
                         const ScreenTerms& out) {
  for (int64_t g = 0; g < x.num_groups; ++g) {
    const int8_t* q = x.q + token * x.padded_cols + g * w.group;
    const float scale = x.scales[token * x.num_groups + g];
    // a code of padding is the zero point, and its weights have no low nibbles
    const int64_t left = w.cols - g * w.group, n = left < w.group ? left : w.group;
    int32_t sum = 0, squares = 0;
    for (int64_t k = 0; k < n; ++k) sum += q[k], squares += q[k] * q[k];
    out.shift[g] = 7.5f * scale * static_cast<float>(sum);
    out.offset[g] = x.offsets[token * x.num_groups + g] / 16.0f;
    out.energy[g] = margin * scale * (margin * scale) * static_cast<float>(squares);
  }
}

inline void screen_bounds(const QuantWeight& w, int64_t begin, int64_t end, const float* product,
                          const ScreenTerms& terms, float* upper, Candidate& best) {
  const F32x16 infinite = set1(INFINITY), sixteen = set1(16.0f);
  for (int64_t t = begin; t < end; ++t, product += 16) {
    const uint8_t* line = w.data + t * w.step_bytes();
    F32x16 logit = mul(load(product), sixteen), variance = zero_f32();
    for (int64_t g = 0; g < w.num_groups(); ++g, line += w.group_bytes()) {
      const F32x16 s = load_f16(reinterpret_cast<const uint16_t*>(line));
      logit = fmadd(s, set1(terms.shift[g]), logit);
      variance = fmadd(mul(s, s), set1(terms.energy[g]), variance);
    }
    // a minimum returns its second operand where one is NaN
    upper[t] = reduce_max(min(add(logit, sqrt(variance)), infinite));
    const float largest = reduce_max(max(logit, set1(-INFINITY)));
    if (largest > best.value) best = {largest, t};
  }
}

inline int64_t screen_find(const float* upper, int64_t begin, int64_t end, float least) {
  for (; begin + 16 <= end; begin += 16)
    if (!(reduce_max(load(upper + begin)) < least)) break;
  while (begin < end && upper[begin] < least) ++begin;
  return begin;
}

inline ScreenKernels make_screen_kernels() { return {screen_terms, screen_bounds, screen_find}; }

}  // namespace llmopt::LLMOPT_ISA
