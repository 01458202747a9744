// Sixteen lanes on AVX-512 (F, BW, VL, DQ, VNNI). Same names as in simd_avx2.h and simd_portable.h: a kernel is written
// once against them and compiled once per ISA, each time in that ISA's own namespace.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define LLMOPT_ISA avx512

namespace llmopt::avx512 {

struct F32x16 {
  __m512 v;
};
struct I32x16 {
  __m512i v;
};
struct U8x64 {
  __m512i v;
};
struct S16x32 {
  __m512i v;
};

// register budget of the int8 product: 16-row tiles x tokens held in accumulators at once
constexpr int kTiles = 2;
constexpr int kTokens = 12;

inline F32x16 zero_f32() { return {_mm512_setzero_ps()}; }
inline F32x16 set1(float x) { return {_mm512_set1_ps(x)}; }
inline F32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, F32x16 a) { _mm512_storeu_ps(p, a.v); }
inline __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
inline F32x16 load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
inline void store_n(float* p, F32x16 a, int n) { _mm512_mask_storeu_ps(p, first(n), a.v); }

inline F32x16 load_bf16(const uint16_t* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
}
inline F32x16 load_bf16_n(const uint16_t* p, int n) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n), p)), 16))};
}
// lanes that hold two bf16 each, as the low ones and the high ones: 32 values at half the cost of widening in order
inline void split_bf16(F32x16 pairs, F32x16& low, F32x16& high) {
  const __m512i x = _mm512_castps_si512(pairs.v);
  low = {_mm512_castsi512_ps(_mm512_slli_epi32(x, 16))};
  high = {_mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
}
inline F32x16 load_f16(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
inline F32x16 load_f16_n(const uint16_t* p, int n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p))}; }

// round to nearest even; NaN stays NaN
inline __m256i bf16_bits(F32x16 a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
}
inline void store_bf16(uint16_t* p, F32x16 a) { _mm256_storeu_si256((__m256i*)p, bf16_bits(a)); }
inline void store_bf16_n(uint16_t* p, F32x16 a, int n) { _mm256_mask_storeu_epi16(p, first(n), bf16_bits(a)); }
inline __m256i f16_bits(F32x16 a) { return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline void store_f16(uint16_t* p, F32x16 a) { _mm256_storeu_si256((__m256i*)p, f16_bits(a)); }
inline void store_f16_n(uint16_t* p, F32x16 a, int n) { _mm256_mask_storeu_epi16(p, first(n), f16_bits(a)); }

inline F32x16 add(F32x16 a, F32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32x16 sub(F32x16 a, F32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F32x16 mul(F32x16 a, F32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32x16 div(F32x16 a, F32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F32x16 max(F32x16 a, F32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F32x16 min(F32x16 a, F32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F32x16 fmadd(F32x16 a, F32x16 b, F32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F32x16 sqrt(F32x16 a) { return {_mm512_sqrt_ps(a.v)}; }
inline float reduce_add(F32x16 a) { return _mm512_reduce_add_ps(a.v); }
inline float first_lane(F32x16 a) { return _mm512_cvtss_f32(a.v); }
inline float reduce_max(F32x16 a) { return _mm512_reduce_max_ps(a.v); }
// lane j of the result is the sum of x[j]'s lanes
inline F32x16 sum_each(const F32x16 (&x)[16]) {
  __m512 t[8], u[4];
  for (int i = 0; i < 8; ++i)
    t[i] =
        _mm512_add_ps(_mm512_unpacklo_ps(x[2 * i].v, x[2 * i + 1].v), _mm512_unpackhi_ps(x[2 * i].v, x[2 * i + 1].v));
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(t[2 * i]), b = _mm512_castps_pd(t[2 * i + 1]);
    u[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  const auto halves = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return {halves(halves(u[0], u[1]), halves(u[2], u[3]))};
}
// x[i] lane j <-> x[j] lane i
inline void transpose(F32x16 (&x)[16]) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(x[i].v, x[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(x[i].v, x[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {
    const __m512d a = _mm512_castps_pd(t[i]), b = _mm512_castps_pd(t[i + 1]);
    const __m512d c = _mm512_castps_pd(t[i + 2]), d = _mm512_castps_pd(t[i + 3]);
    x[i].v = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    x[i + 1].v = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    x[i + 2].v = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    x[i + 3].v = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
  // now x[4 * g + c] holds, in its four 128-bit quarters q, column 4 * q + c of rows 4 * g .. 4 * g + 3
  for (int c = 0; c < 4; ++c) {
    const __m512 a = _mm512_shuffle_f32x4(x[c].v, x[4 + c].v, 0x88),
                 b = _mm512_shuffle_f32x4(x[8 + c].v, x[12 + c].v, 0x88);
    const __m512 d = _mm512_shuffle_f32x4(x[c].v, x[4 + c].v, 0xdd),
                 e = _mm512_shuffle_f32x4(x[8 + c].v, x[12 + c].v, 0xdd);
    t[c] = _mm512_shuffle_f32x4(a, b, 0x88);
    t[8 + c] = _mm512_shuffle_f32x4(a, b, 0xdd);
    t[4 + c] = _mm512_shuffle_f32x4(d, e, 0x88);
    t[12 + c] = _mm512_shuffle_f32x4(d, e, 0xdd);
  }
  for (int i = 0; i < 16; ++i) x[i].v = t[i];
}
inline F32x16 round_even(F32x16 a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// a * 2^n for integral n held as float, n in the normal exponent range
inline F32x16 scale_pow2(F32x16 a, F32x16 n) { return {_mm512_scalef_ps(a.v, n.v)}; }

inline I32x16 zero_i32() { return {_mm512_setzero_si512()}; }
inline I32x16 set1(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline I32x16 add(I32x16 a, I32x16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline I32x16 mul(I32x16 a, I32x16 b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
inline F32x16 to_f32(I32x16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline I32x16 load_s16(const int16_t* p) { return {_mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)p))}; }
// sixteen unsigned bytes, widened
inline I32x16 load_u8(const uint8_t* p) { return {_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))}; }

// magnitude as ordered bits: NaN > Inf > finite, so that a maximum never loses a NaN
inline I32x16 abs_bits(F32x16 a) { return {_mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x7fffffff))}; }
inline I32x16 max(I32x16 a, I32x16 b) { return {_mm512_max_epi32(a.v, b.v)}; }
inline int32_t reduce_max(I32x16 a) { return _mm512_reduce_max_epi32(a.v); }
inline int32_t reduce_add(I32x16 a) { return _mm512_reduce_add_epi32(a.v); }
// rounds to nearest even and stores sixteen signed bytes; the caller keeps |a| <= 127
inline I32x16 store_s8(int8_t* p, F32x16 a) {
  const __m512i q = _mm512_cvtps_epi32(a.v);
  _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(q));
  return {q};
}

// signed bytes, widened
inline F32x16 load_s8(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
inline F32x16 load_s8_n(const int8_t* p, int n) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(n), p)))};
}

// thirty-two values; signed bytes are widened
inline S16x32 load_s16x32(const int16_t* p) { return {_mm512_loadu_si512(p)}; }
inline S16x32 load_s8x32(const int8_t* p) { return {_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p))}; }
inline S16x32 load_s8x32_n(const int8_t* p, int n) {
  return {_mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8((__mmask32)((uint64_t{1} << n) - 1), p))};
}
// acc[lane] += a[2 * lane] * b[2 * lane] + a[2 * lane + 1] * b[2 * lane + 1]
inline I32x16 dot_s16(I32x16 acc, S16x32 a, S16x32 b) {
  // not the intrinsic, see dot_u4
  __asm__("vpdpwssd %2, %1, %0" : "+v"(acc.v) : "v"(a.v), "v"(b.v));
  return acc;
}

inline U8x64 load_u8x64(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store_u8x64(uint8_t* p, U8x64 a) { _mm512_storeu_si512(p, a.v); }
inline U8x64 low_nibbles(U8x64 a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
inline U8x64 high_nibbles(U8x64 a) { return {_mm512_and_si512(_mm512_srli_epi16(a.v, 4), _mm512_set1_epi8(15))}; }
// bytes of two nibbles, the more significant one first: the low nibbles of both, or the high ones
inline U8x64 join_low(U8x64 a, U8x64 b) {
  return {_mm512_ternarylogic_epi32(_mm512_set1_epi8(15), _mm512_slli_epi16(a.v, 4), b.v, 0xac)};
}
inline U8x64 join_high(U8x64 a, U8x64 b) {
  return {_mm512_ternarylogic_epi32(_mm512_set1_epi8(15), a.v, _mm512_srli_epi16(b.v, 4), 0xac)};
}
// four signed bytes for all lanes
struct Quad {
  __m512i v;
};
inline Quad load_quad(const int8_t* p) {
  int32_t x;
  std::memcpy(&x, p, 4);
  return {_mm512_set1_epi32(x)};
}
// acc[lane] += sum over the lane's four bytes of w (unsigned) * x (signed)
inline I32x16 dot_u4(I32x16 acc, U8x64 w, Quad x) {
  // not the intrinsic: with two dozen sums GCC 12 copies and spills around it
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(w.v), "v"(x.v));
  return acc;
}
inline I32x16 dot_u8(I32x16 acc, U8x64 w, Quad x) { return dot_u4(acc, w, x); }

}  // namespace llmopt::avx512
