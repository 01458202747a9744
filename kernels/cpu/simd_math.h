// Functions built from the lanes of simd_*.h; include one of those first.
#pragma once

#ifndef LLMOPT_ISA
#error "include simd_portable.h, simd_avx2.h or simd_avx512.h before simd_math.h"
#endif

namespace llmopt::LLMOPT_ISA {

// e^x for x <= 88: range reduction by ln 2 and a degree-6 polynomial, under 2 ulp. Below -87.3 it gives
// the smallest normal float rather than 0; NaN stays NaN (a maximum returns its second operand when one is NaN).
inline F32x16 exp(F32x16 x) {
  const F32x16 low = set1(-87.33654f);
  const F32x16 clamped = max(low, x);
  const F32x16 n = round_even(mul(clamped, set1(1.44269504f)));
  F32x16 r = fmadd(n, set1(-0.693359375f), clamped);
  r = fmadd(n, set1(2.12194440e-4f), r);
  F32x16 p = set1(1.9875691500e-4f);
  p = fmadd(p, r, set1(1.3981999507e-3f));
  p = fmadd(p, r, set1(8.3334519073e-3f));
  p = fmadd(p, r, set1(4.1665795894e-2f));
  p = fmadd(p, r, set1(1.6666665459e-1f));
  p = fmadd(p, r, set1(5.0000001201e-1f));
  p = add(fmadd(p, mul(r, r), r), set1(1.0f));
  return scale_pow2(p, n);
}

// x * sigmoid(x)
inline F32x16 silu(F32x16 x) {
  const F32x16 e = exp(min(sub(zero_f32(), x), set1(88.0f)));
  return div(x, add(set1(1.0f), e));
}

// sixteen values of any supported dtype
template <int kDType>  // llmopt::DType as int: 0 float32, 1 bfloat16, 2 float16; to load from, 3 int8
inline F32x16 load_as(const void* base, int64_t i) {
  if constexpr (kDType == 0) return load(static_cast<const float*>(base) + i);
  if constexpr (kDType == 1) return load_bf16(static_cast<const uint16_t*>(base) + i);
  if constexpr (kDType == 2) return load_f16(static_cast<const uint16_t*>(base) + i);
  if constexpr (kDType == 3) return load_s8(static_cast<const int8_t*>(base) + i);
}
template <int kDType>
inline F32x16 load_as_n(const void* base, int64_t i, int n) {
  if constexpr (kDType == 0) return load_n(static_cast<const float*>(base) + i, n);
  if constexpr (kDType == 1) return load_bf16_n(static_cast<const uint16_t*>(base) + i, n);
  if constexpr (kDType == 2) return load_f16_n(static_cast<const uint16_t*>(base) + i, n);
  if constexpr (kDType == 3) return load_s8_n(static_cast<const int8_t*>(base) + i, n);
}
template <int kDType>
inline void store_as(void* base, int64_t i, F32x16 x) {
  if constexpr (kDType == 0) store(static_cast<float*>(base) + i, x);
  if constexpr (kDType == 1) store_bf16(static_cast<uint16_t*>(base) + i, x);
  if constexpr (kDType == 2) store_f16(static_cast<uint16_t*>(base) + i, x);
}
template <int kDType>
inline void store_as_n(void* base, int64_t i, F32x16 x, int n) {
  if constexpr (kDType == 0) store_n(static_cast<float*>(base) + i, x, n);
  if constexpr (kDType == 1) store_bf16_n(static_cast<uint16_t*>(base) + i, x, n);
  if constexpr (kDType == 2) store_f16_n(static_cast<uint16_t*>(base) + i, x, n);
}

}  // namespace llmopt::LLMOPT_ISA
