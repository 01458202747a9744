// Loops that the compiler vectorizes, once per instruction set.
#pragma once
#include <cstring>

#include "exponential_noise.h"

namespace llmopt::LLMOPT_ISA {

inline uint32_t mixed(uint32_t a, uint32_t b) {
  const uint32_t joined = (a & 0x80000000u) | (b & 0x7fffffffu);
  return (joined >> 1) ^ (-(b & 1u) & 0x9908b0dfu);
}

inline void twist(const uint32_t* __restrict state, uint32_t* __restrict next) {
  constexpr int kAhead = 397, kBehind = kTwisterWords - kAhead;
  for (int i = 0; i < kBehind; ++i) next[i] = state[i + kAhead] ^ mixed(state[i], state[i + 1]);
  // in two pieces: neither reads what it writes
  for (int i = kBehind; i < 2 * kBehind; ++i) next[i] = next[i - kBehind] ^ mixed(state[i], state[i + 1]);
  for (int i = 2 * kBehind; i < kTwisterWords - 1; ++i) next[i] = next[i - kBehind] ^ mixed(state[i], state[i + 1]);
  next[kTwisterWords - 1] = next[kAhead - 1] ^ mixed(state[kTwisterWords - 1], next[0]);
}

inline uint32_t tempered(uint32_t y) {
  y ^= y >> 11;
  y ^= (y << 7) & 0x9d2c5680u;
  y ^= (y << 15) & 0xefc60000u;
  return y ^ (y >> 18);
}

// -log(1 - u) of u = 53 bits * 2^-53, in float32: small u are as precise as others
inline float exponential(uint32_t high, uint32_t low) {
  constexpr float kHigh = 0x1p-21f, kLow = 0x1p-53f;
  const auto top = static_cast<int32_t>(high & 0x1fffffu);
  const float rest_of_u = (static_cast<float>(static_cast<int32_t>(low ^ 0x80000000u)) + 0x1p31f) * kLow;
  const float u = static_cast<float>(top) * kHigh + rest_of_u;
  const float rest = static_cast<float>(0x200000 - top) * kHigh - rest_of_u;
  // rest = m * 2^e, m between sqrt(1/2) and sqrt(2)
  uint32_t bits;
  std::memcpy(&bits, &rest, 4);
  const uint32_t moved = bits + (0x3f800000u - 0x3f3504f3u);
  const int32_t e = static_cast<int32_t>(moved >> 23) - 127;
  const uint32_t mantissa = (moved & 0x7fffffu) + 0x3f3504f3u;
  float m;
  std::memcpy(&m, &mantissa, 4);
  const float f = e == 0 ? -u : m - 1.0f;
  const float s = f / (2.0f + f), z = s * s;
  const float series = 1.0f + z * (1.0f / 3 + z * (1.0f / 5 + z * (1.0f / 7 + z * (1.0f / 9))));
  return -(static_cast<float>(e) * 0.69314718f + 2.0f * s * series);
}

inline void values(const uint32_t* __restrict words, int64_t n, float* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = exponential(tempered(words[2 * i]), tempered(words[2 * i + 1]));
}

inline NoiseKernels make_noise_kernels() { return {twist, values}; }

}  // namespace llmopt::LLMOPT_ISA
