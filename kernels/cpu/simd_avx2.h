// Sixteen lanes as two 256-bit halves (AVX2, FMA, F16C). See simd_avx512.h for the contract.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define LLMOPT_ISA avx2

namespace llmopt::avx2 {

struct F32x16 {
  __m256 a, b;
};
struct I32x16 {
  __m256i a, b;
};
struct U8x64 {
  __m256i a, b;
};
struct S16x32 {
  __m256i a, b;
};

constexpr int kTiles = 1;
constexpr int kTokens = 4;

inline F32x16 zero_f32() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F32x16 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, F32x16 x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
// tails go through a buffer: a masked 16-bit load does not exist here, and tails are rare
inline F32x16 load_n(const float* p, int n) {
  float t[16] = {0};
  std::memcpy(t, p, sizeof(float) * n);
  return load(t);
}
inline void store_n(float* p, F32x16 x, int n) {
  float t[16];
  store(t, x);
  std::memcpy(p, t, sizeof(float) * n);
}

inline __m256 bf16_half(__m128i h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }
inline F32x16 load_bf16(const uint16_t* p) {
  return {bf16_half(_mm_loadu_si128((const __m128i*)p)), bf16_half(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
inline F32x16 load_bf16_n(const uint16_t* p, int n) {
  uint16_t t[16] = {0};
  std::memcpy(t, p, 2 * n);
  return load_bf16(t);
}
inline void split_bf16(F32x16 pairs, F32x16& low, F32x16& high) {
  const __m256i a = _mm256_castps_si256(pairs.a), b = _mm256_castps_si256(pairs.b);
  const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  low = {_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))};
  high = {_mm256_castsi256_ps(_mm256_and_si256(a, mask)), _mm256_castsi256_ps(_mm256_and_si256(b, mask))};
}
inline F32x16 load_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
          _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
inline F32x16 load_f16_n(const uint16_t* p, int n) {
  uint16_t t[16] = {0};
  std::memcpy(t, p, 2 * n);
  return load_f16(t);
}
inline __m256i bf16_lanes(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
}
inline void store_bf16(uint16_t* p, F32x16 x) {
  const __m256i packed = _mm256_packus_epi32(bf16_lanes(x.a), bf16_lanes(x.b));
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(packed, 0xd8));
}
inline void store_bf16_n(uint16_t* p, F32x16 x, int n) {
  uint16_t t[16];
  store_bf16(t, x);
  std::memcpy(p, t, 2 * n);
}
inline void store_f16(uint16_t* p, F32x16 x) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store_f16_n(uint16_t* p, F32x16 x, int n) {
  uint16_t t[16];
  store_f16(t, x);
  std::memcpy(p, t, 2 * n);
}

inline F32x16 add(F32x16 x, F32x16 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F32x16 sub(F32x16 x, F32x16 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F32x16 mul(F32x16 x, F32x16 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F32x16 div(F32x16 x, F32x16 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F32x16 max(F32x16 x, F32x16 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F32x16 min(F32x16 x, F32x16 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline F32x16 fmadd(F32x16 x, F32x16 y, F32x16 z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline F32x16 sqrt(F32x16 x) { return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)}; }
inline float reduce_add(F32x16 x) {
  const __m256 s = _mm256_add_ps(x.a, x.b);
  __m128 h = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  h = _mm_add_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_add_ss(h, _mm_shuffle_ps(h, h, 1)));
}
inline float first_lane(F32x16 x) { return _mm256_cvtss_f32(x.a); }
inline float reduce_max(F32x16 x) {
  const __m256 s = _mm256_max_ps(x.a, x.b);
  __m128 h = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  h = _mm_max_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_max_ss(h, _mm_shuffle_ps(h, h, 1)));
}
inline F32x16 sum_each(const F32x16 (&x)[16]) {
  alignas(32) float t[16];
  for (int i = 0; i < 16; ++i) t[i] = reduce_add(x[i]);
  return load(t);
}
inline void transpose_8x8(const __m256 (&x)[8], __m256 (&y)[8]) {
  __m256 t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    y[i] = _mm256_permute2f128_ps(u[i], u[4 + i], 0x20);
    y[4 + i] = _mm256_permute2f128_ps(u[i], u[4 + i], 0x31);
  }
}
inline void transpose(F32x16 (&x)[16]) {
  __m256 in[8], out[2][2][8];
  for (int row = 0; row < 2; ++row) {
    for (int i = 0; i < 8; ++i) in[i] = x[8 * row + i].a;
    transpose_8x8(in, out[0][row]);
    for (int i = 0; i < 8; ++i) in[i] = x[8 * row + i].b;
    transpose_8x8(in, out[1][row]);
  }
  for (int half = 0; half < 2; ++half)
    for (int i = 0; i < 8; ++i) x[8 * half + i] = {out[half][0][i], out[half][1][i]};
}
inline F32x16 round_even(F32x16 x) {
  return {_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
          _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline __m256 scale_half(__m256 x, __m256 n) {
  const __m256i e = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(x, _mm256_castsi256_ps(e));
}
inline F32x16 scale_pow2(F32x16 x, F32x16 n) { return {scale_half(x.a, n.a), scale_half(x.b, n.b)}; }

inline I32x16 zero_i32() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline I32x16 set1(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline I32x16 add(I32x16 x, I32x16 y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline I32x16 mul(I32x16 x, I32x16 y) { return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)}; }
inline F32x16 to_f32(I32x16 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline I32x16 load_s16(const int16_t* p) {
  return {_mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i*)p)),
          _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
inline I32x16 load_u8(const uint8_t* p) {
  const __m128i v = _mm_loadu_si128((const __m128i*)p);
  return {_mm256_cvtepu8_epi32(v), _mm256_cvtepu8_epi32(_mm_srli_si128(v, 8))};
}
inline I32x16 abs_bits(F32x16 x) {
  const __m256i m = _mm256_set1_epi32(0x7fffffff);
  return {_mm256_and_si256(_mm256_castps_si256(x.a), m), _mm256_and_si256(_mm256_castps_si256(x.b), m)};
}
inline I32x16 max(I32x16 x, I32x16 y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
inline int32_t reduce_max(I32x16 x) {
  alignas(32) int32_t t[8];
  _mm256_store_si256((__m256i*)t, _mm256_max_epi32(x.a, x.b));
  int32_t m = t[0];
  for (int i = 1; i < 8; ++i) m = t[i] > m ? t[i] : m;
  return m;
}
inline int32_t reduce_add(I32x16 x) {
  alignas(32) int32_t t[8];
  _mm256_store_si256((__m256i*)t, _mm256_add_epi32(x.a, x.b));
  int32_t s = 0;
  for (int i = 0; i < 8; ++i) s += t[i];
  return s;
}
inline I32x16 store_s8(int8_t* p, F32x16 x) {
  const __m256i qa = _mm256_cvtps_epi32(x.a), qb = _mm256_cvtps_epi32(x.b);
  const __m128i lo = _mm_packs_epi32(_mm256_castsi256_si128(qa), _mm256_extracti128_si256(qa, 1));
  const __m128i hi = _mm_packs_epi32(_mm256_castsi256_si128(qb), _mm256_extracti128_si256(qb, 1));
  _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(lo, hi));
  return {qa, qb};
}

inline F32x16 load_s8(const int8_t* p) {
  const __m128i v = _mm_loadu_si128((const __m128i*)p);
  return to_f32({_mm256_cvtepi8_epi32(v), _mm256_cvtepi8_epi32(_mm_srli_si128(v, 8))});
}
inline F32x16 load_s8_n(const int8_t* p, int n) {
  int8_t t[16] = {0};
  std::memcpy(t, p, n);
  return load_s8(t);
}

inline S16x32 load_s16x32(const int16_t* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 16))};
}
inline S16x32 load_s8x32(const int8_t* p) {
  return {_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)),
          _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(p + 16)))};
}
inline S16x32 load_s8x32_n(const int8_t* p, int n) {
  int8_t t[32] = {0};
  std::memcpy(t, p, n);
  return load_s8x32(t);
}
inline I32x16 dot_s16(I32x16 acc, S16x32 a, S16x32 b) {
  return {_mm256_add_epi32(acc.a, _mm256_madd_epi16(a.a, b.a)), _mm256_add_epi32(acc.b, _mm256_madd_epi16(a.b, b.b))};
}

inline U8x64 load_u8x64(const uint8_t* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))};
}
inline void store_u8x64(uint8_t* p, U8x64 x) {
  _mm256_storeu_si256((__m256i*)p, x.a);
  _mm256_storeu_si256((__m256i*)(p + 32), x.b);
}
inline U8x64 low_nibbles(U8x64 x) {
  const __m256i m = _mm256_set1_epi8(15);
  return {_mm256_and_si256(x.a, m), _mm256_and_si256(x.b, m)};
}
inline U8x64 high_nibbles(U8x64 x) {
  const __m256i m = _mm256_set1_epi8(15);
  return {_mm256_and_si256(_mm256_srli_epi16(x.a, 4), m), _mm256_and_si256(_mm256_srli_epi16(x.b, 4), m)};
}
inline __m256i select_low(__m256i a, __m256i b) {
  const __m256i m = _mm256_set1_epi8(15);
  return _mm256_or_si256(_mm256_andnot_si256(m, a), _mm256_and_si256(m, b));
}
inline U8x64 join_low(U8x64 x, U8x64 y) {
  return {select_low(_mm256_slli_epi16(x.a, 4), y.a), select_low(_mm256_slli_epi16(x.b, 4), y.b)};
}
inline U8x64 join_high(U8x64 x, U8x64 y) {
  return {select_low(x.a, _mm256_srli_epi16(y.a, 4)), select_low(x.b, _mm256_srli_epi16(y.b, 4))};
}
struct Quad {
  __m256i v;
};
inline Quad load_quad(const int8_t* p) {
  int32_t x;
  std::memcpy(&x, p, 4);
  return {_mm256_set1_epi32(x)};
}
// pairs fit int16: 2 * 15 * 127 < 2^15
inline __m256i dot_half_u4(__m256i acc, __m256i w, __m256i x) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
}
inline I32x16 dot_u4(I32x16 acc, U8x64 w, Quad x) {
  return {dot_half_u4(acc.a, w.a, x.v), dot_half_u4(acc.b, w.b, x.v)};
}
// full bytes would saturate vpmaddubsw, so they go as two nibbles
inline __m256i dot_half_u8(__m256i acc, __m256i w, __m256i x) {
  const __m256i m = _mm256_set1_epi8(15);
  const __m256i lo = _mm256_maddubs_epi16(_mm256_and_si256(w, m), x);
  const __m256i hi = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(w, 4), m), x);
  acc = _mm256_add_epi32(acc, _mm256_madd_epi16(lo, _mm256_set1_epi16(1)));
  return _mm256_add_epi32(acc, _mm256_madd_epi16(hi, _mm256_set1_epi16(16)));
}
inline I32x16 dot_u8(I32x16 acc, U8x64 w, Quad x) {
  return {dot_half_u8(acc.a, w.a, x.v), dot_half_u8(acc.b, w.b, x.v)};
}

}  // namespace llmopt::avx2
