// Ceilings of AVX2 with FMA.
#include "ceilings.h"

#include <immintrin.h>

#include <initializer_list>

namespace llmopt {
namespace {

uint64_t read(const uint8_t* data, int64_t bytes) {
  __m256i sum[4];
  for (__m256i& s : sum) s = _mm256_setzero_si256();
  const int64_t half = bytes / 2;
  for (int64_t i = 0; i < half; i += 128) {
    for (const uint8_t* stream : {data + i, data + half + i}) {
      _mm_prefetch(reinterpret_cast<const char*>(stream + 2048), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(stream + 2048 + 64), _MM_HINT_T0);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        sum[j] = _mm256_add_epi64(sum[j], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(stream + 32 * j)));
      }
    }
  }
  alignas(32) uint64_t lanes[4];
  const __m256i all = _mm256_add_epi64(_mm256_add_epi64(sum[0], sum[1]), _mm256_add_epi64(sum[2], sum[3]));
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), all);
  return lanes[0] + lanes[1] + lanes[2] + lanes[3];
}

// vpmaddubsw, summed in int16 as long as 4-bit weights allow it (8 products), then widened by vpmaddwd: the cheapest
// chain the instruction set has for int4 x int8
double dot_int8(int64_t steps) {
  constexpr int kChains = 4, kDepth = 8;
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i x = _mm256_set1_epi8(3), y[kChains], acc[kChains];
  for (int c = 0; c < kChains; ++c) {
    y[c] = _mm256_set1_epi8(static_cast<char>(c + 1));
    acc[c] = _mm256_setzero_si256();
  }
  for (int64_t s = 0; s < steps; ++s) {
    __m256i low[kChains];
#pragma GCC unroll 8
    for (int d = 0; d < kDepth; ++d) {
      __asm__ volatile("" : "+x"(x));  // an opaque operand: equal products must not be computed once only
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) {
        const __m256i product = _mm256_maddubs_epi16(x, y[c]);
        low[c] = d == 0 ? product : _mm256_add_epi16(low[c], product);
      }
    }
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) acc[c] = _mm256_add_epi32(acc[c], _mm256_madd_epi16(low[c], ones));
  }
  for (__m256i& a : acc) __asm__ volatile("" : : "x"(a));
  return 2.0 * 32 * kChains * kDepth * static_cast<double>(steps);
}

double fma_fp32(int64_t steps) {
  constexpr int kChains = 12, kUnroll = 4;
  const __m256 x = _mm256_set1_ps(0.5f), y = _mm256_set1_ps(0.25f);
  __m256 acc[kChains];
  for (int c = 0; c < kChains; ++c) acc[c] = _mm256_set1_ps(static_cast<float>(c));
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
#pragma GCC unroll 12
      for (int c = 0; c < kChains; ++c) acc[c] = _mm256_fmadd_ps(x, y, acc[c]);
    }
    // keeps x * y and repeated sums from being folded
    for (int c = 0; c < kChains; ++c) __asm__ volatile("" : "+x"(acc[c]));
  }
  return 2.0 * 8 * kChains * kUnroll * static_cast<double>(steps);
}

}  // namespace

CeilingLoops avx2_ceilings() { return {read, dot_int8, nullptr, fma_fp32}; }

}  // namespace llmopt
