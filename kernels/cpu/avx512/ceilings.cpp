// Ceilings of AVX-512 with VNNI, and of AVX512_BF16 where the processor has it.
#include "ceilings.h"

#include <immintrin.h>

#include <initializer_list>

namespace llmopt {
namespace {

constexpr int kChains = 16, kUnroll = 4;

uint64_t read(const uint8_t* data, int64_t bytes) {
  __m512i sum[4];
  for (__m512i& s : sum) s = _mm512_setzero_si512();
  const int64_t half = bytes / 2;
  for (int64_t i = 0; i < half; i += 256) {
    for (const uint8_t* stream : {data + i, data + half + i}) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        _mm_prefetch(reinterpret_cast<const char*>(stream + 2048 + 64 * j), _MM_HINT_T0);
        sum[j] = _mm512_add_epi64(sum[j], _mm512_loadu_si512(stream + 64 * j));
      }
    }
  }
  alignas(64) uint64_t lanes[8];
  _mm512_store_si512(lanes, _mm512_add_epi64(_mm512_add_epi64(sum[0], sum[1]), _mm512_add_epi64(sum[2], sum[3])));
  return lanes[0] + lanes[1] + lanes[2] + lanes[3] + lanes[4] + lanes[5] + lanes[6] + lanes[7];
}

double dot_int8(int64_t steps) {
  const __m512i x = _mm512_set1_epi8(3), y = _mm512_set1_epi8(2);
  __m512i acc[kChains];
  for (int c = 0; c < kChains; ++c) acc[c] = _mm512_set1_epi32(c);
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
#pragma GCC unroll 16
      for (int c = 0; c < kChains; ++c) acc[c] = _mm512_dpbusd_epi32(acc[c], x, y);
    }
    for (int c = 0; c < kChains; ++c) __asm__ volatile("" : "+v"(acc[c]));
  }
  return 2.0 * 64 * kChains * kUnroll * static_cast<double>(steps);
}

// called only after a check of the processor: the rest of this file must not use these instructions
__attribute__((target("avx512bf16"))) double dot_bf16(int64_t steps) {
  const __m512bh x = (__m512bh)_mm512_set1_epi16(0x3f80), y = (__m512bh)_mm512_set1_epi16(0x3f00);
  __m512 acc[kChains];
  for (int c = 0; c < kChains; ++c) acc[c] = _mm512_set1_ps(static_cast<float>(c));
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
#pragma GCC unroll 16
      for (int c = 0; c < kChains; ++c) acc[c] = _mm512_dpbf16_ps(acc[c], x, y);
    }
    for (int c = 0; c < kChains; ++c) __asm__ volatile("" : "+v"(acc[c]));
  }
  return 2.0 * 32 * kChains * kUnroll * static_cast<double>(steps);
}

double fma_fp32(int64_t steps) {
  const __m512 x = _mm512_set1_ps(0.5f), y = _mm512_set1_ps(0.25f);
  __m512 acc[kChains];
  for (int c = 0; c < kChains; ++c) acc[c] = _mm512_set1_ps(static_cast<float>(c));
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
#pragma GCC unroll 16
      for (int c = 0; c < kChains; ++c) acc[c] = _mm512_fmadd_ps(x, y, acc[c]);
    }
    for (int c = 0; c < kChains; ++c) __asm__ volatile("" : "+v"(acc[c]));
  }
  return 2.0 * 16 * kChains * kUnroll * static_cast<double>(steps);
}

}  // namespace

CeilingLoops avx512_ceilings() {
  return {read, dot_int8, __builtin_cpu_supports("avx512bf16") ? dot_bf16 : nullptr, fma_fp32};
}

}  // namespace llmopt
