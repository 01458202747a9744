// Small pieces of prefill_kernel.h on AVX-512 lanes: weights, and packing into pairs.
#pragma once

#include <algorithm>

#include "prefill.h"
#include "simd_bf16.h"

namespace llmopt::LLMOPT_ISA {

// 2^(x * scale) for x * scale up to some 100, relative error 1e-4: a twentieth of what rounding to bfloat16 does to it. Exactly 0 from
// -126 down; NaN stays NaN.
inline F32x16 weight_of(F32x16 x, F32x16 scale) {
  // adding 1.5 * 2^23 rounds to an integer, which the low bits of the sum then hold
  const F32x16 shift = set1(12582912.0f);
  const F32x16 shifted = fmadd(x, scale, shift);
  const F32x16 r = fmsub(x, scale, sub(shifted, shift));
  F32x16 p = set1(5.500898e-2f);
  p = fmadd(p, r, set1(2.4221112e-1f));
  p = fmadd(p, r, set1(6.9328294e-1f));
  p = fmadd(p, r, set1(1.0f));
  return add_exponent_where_above(p, shifted, set1(12582912.0f - 126.0f));
}

// 16 keys as one panel: out[d / 2][key][d % 2]; `seen` has a bit for each key there is, the others become zero
inline void pack_panel(const uint16_t* in, int64_t stride, uint32_t seen, int64_t dim, uint16_t* out) {
  for (int64_t d = 0; d < dim; d += kBlock, out += kPanelStep) {
    const int count = static_cast<int>(std::min(kBlock, dim - d));
    F32x16 x[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) x[i] = load_pairs_n(in + i * stride + d, seen >> i & 1 ? count : 0);
    transpose(x);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) store(reinterpret_cast<float*>(out) + 16 * i, x[i]);
  }
}

// 32 values as panels of 16 dimensions: out[d / 16][key / 2][d % 16][key % 2]
inline void pack_values(const uint16_t* in, int64_t stride, uint32_t seen, int64_t dim, uint16_t* out) {
  for (int64_t key = 0; key < kBlock; key += 2, out += 32) {
    const uint16_t* even = in + key * stride;
    for (int64_t d = 0; d < round_up(dim, kBlock); d += 16) {
      const int count = static_cast<int>(std::clamp<int64_t>(dim - d, 0, 16));
      const F32x16 pairs =
          interleave_n(even + d, seen >> key & 1 ? count : 0, even + stride + d, seen >> (key + 1) & 1 ? count : 0);
      store(reinterpret_cast<float*>(out + d / 16 * kPanelStep), pairs);
    }
  }
}

}  // namespace llmopt::LLMOPT_ISA
