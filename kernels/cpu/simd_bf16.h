// What kernels in bfloat16 need beside simd_avx512.h. The instructions of AVX512_BF16 are in assembly: the rest of a file
// is compiled for processors without them, and only a check at run time leads here.
#pragma once
#include "simd_avx512.h"

namespace llmopt::avx512 {

inline F32x16 fmsub(F32x16 a, F32x16 b, F32x16 c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }
inline bool any_above(F32x16 a, F32x16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ) != 0; }
// lanes [begin, end) of a, any bounds below 2^31, and `other` in the rest
inline F32x16 only_between(F32x16 a, int64_t begin, int64_t end, F32x16 other) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __mmask16 from = _mm512_cmpge_epi32_mask(lane, _mm512_set1_epi32(static_cast<int>(begin)));
  return {_mm512_mask_mov_ps(other.v,
                             _mm512_mask_cmplt_epi32_mask(from, lane, _mm512_set1_epi32(static_cast<int>(end))), a.v)};
}
// a * 2^n for the integer n in the low bits of `shifted`, or 0 where `shifted` is not above `least`; NaN counts as above
inline F32x16 add_exponent_where_above(F32x16 a, F32x16 shifted, F32x16 least) {
  const __mmask16 above = _mm512_cmp_ps_mask(shifted.v, least.v, _CMP_NLE_UQ);
  const __m512i n = _mm512_slli_epi32(_mm512_castps_si512(shifted.v), 23);
  return {_mm512_castsi512_ps(_mm512_maskz_add_epi32(above, _mm512_castps_si512(a.v), n))};
}

// n <= 32 bf16 as they lie, two to a lane, then zeros
inline F32x16 load_pairs_n(const uint16_t* p, int n) {
  return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << n) - 1), p))};
}
// lane i: even[i] in its low half, odd[i] in its high half; zeros past the first so many
inline F32x16 interleave_n(const uint16_t* even, int num_even, const uint16_t* odd, int num_odd) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(num_even), even));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(num_odd), odd));
  return {_mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)))};
}
// two rows of pairs, as pairs of their even and of their odd elements: lane i of `even` is a[2i], b[2i]
inline void pair_up(F32x16 a, F32x16 b, F32x16& even, F32x16& odd) {
  const __m512i x = _mm512_castps_si512(a.v), y = _mm512_castps_si512(b.v);
  constexpr __mmask32 kHigh = 0xaaaaaaaa;
  even = {_mm512_castsi512_ps(_mm512_mask_mov_epi16(x, kHigh, _mm512_slli_epi32(y, 16)))};
  odd = {_mm512_castsi512_ps(_mm512_mask_mov_epi16(_mm512_srli_epi32(x, 16), kHigh, y))};
}
// the upper half of each float's bits, a bfloat16
inline F32x16 upper_half(F32x16 a) {
  return {_mm512_castsi512_ps(
      _mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
}
// the same after rounding to nearest, halves upwards; of numbers from 0 to 1
inline F32x16 rounded_upper_half(F32x16 a) {
  return upper_half({_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x8000)))});
}
// the upper half moved to the lower one, zeros above
inline F32x16 lower_of_upper(F32x16 a) {
  return {_mm512_castsi512_ps(_mm512_srli_epi32(_mm512_castps_si512(a.v), 16))};
}

// 32 values rounded to nearest even
inline void store_bf16(uint16_t* p, F32x16 low, F32x16 high) {
  __m512i both;
  __asm__("vcvtne2ps2bf16 %2, %1, %0" : "=v"(both) : "v"(high.v), "v"(low.v));
  _mm512_storeu_si512(p, both);
}
// the pair at p in every lane
inline F32x16 load_pair(const uint16_t* p) {
  float pair;
  std::memcpy(&pair, p, 4);
  return {_mm512_set1_ps(pair)};
}
// acc[lane] += both products of a pair
inline F32x16 dot_bf16(F32x16 acc, F32x16 a, F32x16 b) {
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc.v) : "v"(a.v), "v"(b.v));
  return acc;
}

// Operands of dot_rows_bf16, in elements: rows of 32 values, `row` apart, the next 32 of them `next` further on; and panels
// of 16 pairs x 16 columns, the second `panel` after the first, the next 32 terms `next` further on.
struct DotRows {
  const uint16_t* at;
  int64_t row, next;
};
struct DotPanels {
  const uint16_t* at;
  int64_t panel, next;
};

// c[8 rows, 32 columns] (+)= a[8, 32 * steps] x b[32 * steps, 32], in registers throughout
template <bool kAdd>
inline void dot_rows_bf16(DotRows a, DotPanels b, int64_t steps, float* c, int64_t ldc) {
  F32x16 sum[8][2];
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) {
    sum[r][0] = kAdd ? load(c + r * ldc) : zero_f32();
    sum[r][1] = kAdd ? load(c + r * ldc + 16) : zero_f32();
  }
  for (int64_t i = 0; i < steps; ++i, a.at += a.next, b.at += b.next) {
    for (int64_t k = 0; k < 16; ++k) {
      const float* at = reinterpret_cast<const float*>(b.at) + 16 * k;
      const F32x16 x = load(at), y = load(at + b.panel / 2);
#pragma GCC unroll 8
      for (int r = 0; r < 8; ++r) {
        const F32x16 pair = load_pair(a.at + r * a.row + 2 * k);
        sum[r][0] = dot_bf16(sum[r][0], pair, x);
        sum[r][1] = dot_bf16(sum[r][1], pair, y);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) {
    store(c + r * ldc, sum[r][0]);
    store(c + r * ldc + 16, sum[r][1]);
  }
}

}  // namespace llmopt::avx512
