// Sixteen lanes in plain C++, for any processor. See simd_avx512.h for the contract.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#define LLMOPT_ISA portable

namespace llmopt::portable {

struct F32x16 {
  float v[16];
};
struct I32x16 {
  int32_t v[16];
};
struct U8x64 {
  uint8_t v[64];
};
struct S16x32 {
  int16_t v[32];
};

constexpr int kTiles = 1;
constexpr int kTokens = 2;

template <typename T, typename F>
inline T each(F f) {
  T r;
  for (int i = 0; i < 16; ++i) r.v[i] = f(i);
  return r;
}

inline float bits_to_f32(uint32_t b) {
  float f;
  std::memcpy(&f, &b, 4);
  return f;
}
inline uint32_t f32_to_bits(float f) {
  uint32_t b;
  std::memcpy(&b, &f, 4);
  return b;
}
inline float f16_to_f32(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 1023u;
  if (exponent == 31) return bits_to_f32(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * (1.0f / 16777216.0f);
    return sign ? -magnitude : magnitude;
  }
  return bits_to_f32(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}
inline uint16_t f32_to_f16(float f) {
  const uint32_t bits = f32_to_bits(f), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {
    // subnormal: adding 0.5 lines the mantissa up with the half's, rounding to nearest even on the way
    const float shifted = bits_to_f32(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (f32_to_bits(shifted) - 0x3f000000u));
  }
  const uint32_t odd = (magnitude >> 13) & 1u;
  return static_cast<uint16_t>(sign | ((magnitude + 0xc8000fffu + odd) >> 13));
}
inline uint16_t f32_to_bf16(float f) {
  if (f != f) return 0x7fc0;
  const uint32_t b = f32_to_bits(f);
  return static_cast<uint16_t>((b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
}

inline F32x16 set1(float x) {
  return each<F32x16>([&](int) { return x; });
}
inline F32x16 zero_f32() { return set1(0.0f); }
inline F32x16 load(const float* p) {
  F32x16 r;
  std::memcpy(r.v, p, 64);
  return r;
}
inline void store(float* p, F32x16 a) { std::memcpy(p, a.v, 64); }
inline F32x16 load_n(const float* p, int n) {
  return each<F32x16>([&](int i) { return i < n ? p[i] : 0.0f; });
}
inline void store_n(float* p, F32x16 a, int n) { std::memcpy(p, a.v, sizeof(float) * n); }
inline F32x16 load_bf16_n(const uint16_t* p, int n) {
  return each<F32x16>([&](int i) { return i < n ? bits_to_f32(static_cast<uint32_t>(p[i]) << 16) : 0.0f; });
}
inline F32x16 load_bf16(const uint16_t* p) { return load_bf16_n(p, 16); }
inline void split_bf16(F32x16 pairs, F32x16& low, F32x16& high) {
  // by bits: on some processors a float that is moved as a number does not keep the bits of a NaN
  uint32_t bits[16];
  std::memcpy(bits, pairs.v, 64);
  for (int i = 0; i < 16; ++i) {
    low.v[i] = bits_to_f32(bits[i] << 16);
    high.v[i] = bits_to_f32(bits[i] & 0xffff0000u);
  }
}
inline F32x16 load_f16_n(const uint16_t* p, int n) {
  return each<F32x16>([&](int i) { return i < n ? f16_to_f32(p[i]) : 0.0f; });
}
inline F32x16 load_f16(const uint16_t* p) { return load_f16_n(p, 16); }
inline void store_bf16_n(uint16_t* p, F32x16 a, int n) {
  for (int i = 0; i < n; ++i) p[i] = f32_to_bf16(a.v[i]);
}
inline void store_bf16(uint16_t* p, F32x16 a) { store_bf16_n(p, a, 16); }
inline void store_f16_n(uint16_t* p, F32x16 a, int n) {
  for (int i = 0; i < n; ++i) p[i] = f32_to_f16(a.v[i]);
}
inline void store_f16(uint16_t* p, F32x16 a) { store_f16_n(p, a, 16); }

inline F32x16 add(F32x16 a, F32x16 b) {
  return each<F32x16>([&](int i) { return a.v[i] + b.v[i]; });
}
inline F32x16 sub(F32x16 a, F32x16 b) {
  return each<F32x16>([&](int i) { return a.v[i] - b.v[i]; });
}
inline F32x16 mul(F32x16 a, F32x16 b) {
  return each<F32x16>([&](int i) { return a.v[i] * b.v[i]; });
}
inline F32x16 div(F32x16 a, F32x16 b) {
  return each<F32x16>([&](int i) { return a.v[i] / b.v[i]; });
}
inline F32x16 max(F32x16 a, F32x16 b) {
  return each<F32x16>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline F32x16 min(F32x16 a, F32x16 b) {
  return each<F32x16>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline F32x16 fmadd(F32x16 a, F32x16 b, F32x16 c) {
  return each<F32x16>([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline F32x16 sqrt(F32x16 a) {
  return each<F32x16>([&](int i) { return std::sqrt(a.v[i]); });
}
inline float reduce_add(F32x16 a) {
  float s = 0.0f;
  for (float x : a.v) s += x;
  return s;
}
inline float first_lane(F32x16 a) { return a.v[0]; }
inline float reduce_max(F32x16 a) {
  float m = a.v[0];
  for (float x : a.v) m = x > m ? x : m;
  return m;
}
inline F32x16 sum_each(const F32x16 (&x)[16]) {
  return each<F32x16>([&](int i) { return reduce_add(x[i]); });
}
inline void transpose(F32x16 (&x)[16]) {
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < i; ++j) {
      const float t = x[i].v[j];
      x[i].v[j] = x[j].v[i];
      x[j].v[i] = t;
    }
  }
}
inline F32x16 round_even(F32x16 a) {
  return each<F32x16>([&](int i) { return std::nearbyint(a.v[i]); });
}
inline F32x16 scale_pow2(F32x16 a, F32x16 n) {
  return each<F32x16>([&](int i) { return std::ldexp(a.v[i], static_cast<int>(n.v[i])); });
}

inline I32x16 set1(int32_t x) {
  return each<I32x16>([&](int) { return x; });
}
inline I32x16 zero_i32() { return set1(int32_t{0}); }
inline I32x16 add(I32x16 a, I32x16 b) {
  return each<I32x16>([&](int i) { return a.v[i] + b.v[i]; });
}
inline I32x16 mul(I32x16 a, I32x16 b) {
  return each<I32x16>([&](int i) { return a.v[i] * b.v[i]; });
}
inline F32x16 to_f32(I32x16 a) {
  return each<F32x16>([&](int i) { return static_cast<float>(a.v[i]); });
}
inline I32x16 load_s16(const int16_t* p) {
  int16_t t[16];
  std::memcpy(t, p, 32);
  return each<I32x16>([&](int i) { return t[i]; });
}
inline I32x16 load_u8(const uint8_t* p) {
  return each<I32x16>([&](int i) { return static_cast<int32_t>(p[i]); });
}
inline I32x16 abs_bits(F32x16 a) {
  return each<I32x16>([&](int i) { return static_cast<int32_t>(f32_to_bits(a.v[i]) & 0x7fffffffu); });
}
inline I32x16 max(I32x16 a, I32x16 b) {
  return each<I32x16>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline int32_t reduce_max(I32x16 a) {
  int32_t m = a.v[0];
  for (int32_t x : a.v) m = x > m ? x : m;
  return m;
}
inline int32_t reduce_add(I32x16 a) {
  int32_t s = 0;
  for (int32_t x : a.v) s += x;
  return s;
}
inline I32x16 store_s8(int8_t* p, F32x16 a) {
  I32x16 q;
  for (int i = 0; i < 16; ++i) {
    // a NaN has no integer; its scale is NaN as well, so any value will do
    q.v[i] = a.v[i] == a.v[i] ? static_cast<int32_t>(std::nearbyint(a.v[i])) : 0;
    p[i] = static_cast<int8_t>(q.v[i]);
  }
  return q;
}

inline F32x16 load_s8_n(const int8_t* p, int n) {
  return each<F32x16>([&](int i) { return i < n ? static_cast<float>(p[i]) : 0.0f; });
}
inline F32x16 load_s8(const int8_t* p) { return load_s8_n(p, 16); }

inline S16x32 load_s16x32(const int16_t* p) {
  S16x32 r;
  std::memcpy(r.v, p, 64);
  return r;
}
inline S16x32 load_s8x32_n(const int8_t* p, int n) {
  S16x32 r;
  for (int i = 0; i < 32; ++i) r.v[i] = i < n ? p[i] : int8_t{0};
  return r;
}
inline S16x32 load_s8x32(const int8_t* p) { return load_s8x32_n(p, 32); }
inline I32x16 dot_s16(I32x16 acc, S16x32 a, S16x32 b) {
  for (int i = 0; i < 16; ++i) acc.v[i] += a.v[2 * i] * b.v[2 * i] + a.v[2 * i + 1] * b.v[2 * i + 1];
  return acc;
}

inline U8x64 load_u8x64(const uint8_t* p) {
  U8x64 r;
  std::memcpy(r.v, p, 64);
  return r;
}
inline void store_u8x64(uint8_t* p, U8x64 a) { std::memcpy(p, a.v, 64); }
inline U8x64 low_nibbles(U8x64 a) {
  for (auto& x : a.v) x &= 15;
  return a;
}
inline U8x64 high_nibbles(U8x64 a) {
  for (auto& x : a.v) x >>= 4;
  return a;
}
inline U8x64 join_low(U8x64 a, U8x64 b) {
  for (int i = 0; i < 64; ++i) a.v[i] = static_cast<uint8_t>(a.v[i] << 4 | (b.v[i] & 15));
  return a;
}
inline U8x64 join_high(U8x64 a, U8x64 b) {
  for (int i = 0; i < 64; ++i) a.v[i] = static_cast<uint8_t>((a.v[i] & 0xf0) | b.v[i] >> 4);
  return a;
}
struct Quad {
  int32_t x[4];
};
inline Quad load_quad(const int8_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
inline I32x16 dot_u8(I32x16 acc, U8x64 w, Quad q) {
  for (int i = 0; i < 16; ++i) {
    const uint8_t* b = w.v + 4 * i;
    acc.v[i] += b[0] * q.x[0] + b[1] * q.x[1] + b[2] * q.x[2] + b[3] * q.x[3];
  }
  return acc;
}
inline I32x16 dot_u4(I32x16 acc, U8x64 w, Quad q) { return dot_u8(acc, w, q); }

}  // namespace llmopt::portable
