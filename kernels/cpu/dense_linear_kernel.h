// Loops of dense_linear.h, once per instruction set.
#pragma once
#include "dense_linear.h"
#include "quant_linear_kernel.h"

namespace llmopt::LLMOPT_ISA {

// bfloat16 weights come 32 at a time, as even and odd ones (split_bf16), and so must what they are multiplied with
constexpr int kBf16 = 1;

template <int kDType>
void prepare_tokens(const TokenSource& x, bool pairs, int64_t begin, int64_t end, float* out) {
  const int64_t padded = padded_cols(x.cols);
  for (int64_t t = begin; t < end; ++t) {
    const F32x16 inverse = set1(x.norm ? inverse_rms<kDType>(x, t) : 1.0f);
    float* to = out + t * padded;
    for (int64_t k = 0; k < padded; k += 16) {
      const int64_t left = x.cols - k;
      const int n = left >= 16 ? 16 : (left > 0 ? static_cast<int>(left) : 0);
      store(to + k, n > 0 ? source_values<kDType>(x, t, k, n, inverse) : zero_f32());
    }
    for (int64_t k = 0; pairs && k + 32 <= x.cols; k += 32) {
      float mixed[32];
      for (int i = 0; i < 16; ++i) mixed[i] = to[k + 2 * i], mixed[16 + i] = to[k + 2 * i + 1];
      for (int i = 0; i < 32; ++i) to[k + i] = mixed[i];
    }
  }
}

inline void prepare(const TokenSource& x, int weight_dtype, int64_t begin, int64_t end, float* out) {
  const bool pairs = weight_dtype == kBf16;
  if (x.dtype == 0) prepare_tokens<0>(x, pairs, begin, end, out);
  if (x.dtype == 1) prepare_tokens<1>(x, pairs, begin, end, out);
  if (x.dtype == 2) prepare_tokens<2>(x, pairs, begin, end, out);
}

// sums[m * kR + r]: kM tokens times kR rows of the weight, still spread over sixteen lanes
template <int kDType, int kM, int kR>
[[gnu::always_inline]] inline void dense_sums(const DenseWeight& w, const float* x, int64_t row, F32x16* sums) {
  const int64_t padded = padded_cols(w.cols);
  F32x16 sum[kM * kR];
#pragma GCC unroll 16
  for (int i = 0; i < kM * kR; ++i) sum[i] = zero_f32();
  int64_t k = 0;
  if constexpr (kDType == kBf16) {
    for (; k + 32 <= w.cols; k += 32) {
      // what follows a row's end is read already: ask for the row that takes its place
      const int64_t ahead = kPrefetch / 2 + (k + kPrefetch / 2 < w.cols ? 0 : (kR - 1) * w.cols);
#pragma GCC unroll 8
      for (int r = 0; r < kR; ++r) {
        const auto* at = static_cast<const uint16_t*>(w.data) + (row + r) * w.cols + k;
        F32x16 even, odd;
        split_bf16(load(reinterpret_cast<const float*>(at)), even, odd);
        prefetch(at + ahead);
#pragma GCC unroll 4
        for (int m = 0; m < kM; ++m) {
          F32x16& s = sum[m * kR + r];
          s = fmadd(odd, load(x + m * padded + k + 16), fmadd(even, load(x + m * padded + k), s));
        }
      }
    }
  }
  for (; k < w.cols; k += 16) {
    const int n = w.cols - k < 16 ? static_cast<int>(w.cols - k) : 16;
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) {
      const F32x16 v = load_as_n<kDType>(w.data, (row + r) * w.cols + k, n);
#pragma GCC unroll 4
      for (int m = 0; m < kM; ++m) sum[m * kR + r] = fmadd(v, load(x + m * padded + k), sum[m * kR + r]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kM * kR; ++i) sums[i] = sum[i];
}

// 16 rows (fewer at the end: the last one is read again) times kM tokens, kR rows at a time. One row at a time is one stream of
// bytes, which an AMD core reads fastest (docs/engine.md); of several tokens the multiplications are what takes time.
template <int kDType, int kM>
void dense_tile(const DenseWeight& w, const float* x, int64_t token, int64_t row, const Output& y) {
  constexpr int kR = kM == 1 ? 1 : 4;
  F32x16 sums[kM][16];
  const float* from = x + token * padded_cols(w.cols);
  for (int r = 0; r < 16; r += kR) {
    F32x16 part[kM * kR];
    if (row + r + kR <= w.rows) {
      dense_sums<kDType, kM, kR>(w, from, row + r, part);
    } else {
      for (int i = 0; i < kR; ++i) {
        F32x16 one[kM];
        dense_sums<kDType, kM, 1>(w, from, row + r + i < w.rows ? row + r + i : w.rows - 1, one);
        for (int m = 0; m < kM; ++m) part[m * kR + i] = one[m];
      }
    }
    for (int m = 0; m < kM; ++m)
      for (int i = 0; i < kR; ++i) sums[m][r + i] = part[m * kR + i];
  }
  for (int m = 0; m < kM; ++m) store_rows(y, token + m, row, w.rows, sum_each(sums[m]));
}

template <int kDType>
void dense_product_as(const DenseWeight& w, const float* x, int64_t tokens, int64_t begin, int64_t end,
                      const Output& y) {
  for (int64_t row = begin; row < end; row += 16) {
    int64_t token = 0;
    for (; token + 4 <= tokens; token += 4) dense_tile<kDType, 4>(w, x, token, row, y);
    for (; token < tokens; ++token) dense_tile<kDType, 1>(w, x, token, row, y);
  }
}

inline void dense_product(const DenseWeight& w, const float* x, int64_t tokens, int64_t begin, int64_t end,
                          const Output& y) {
  if (w.dtype == 0) dense_product_as<0>(w, x, tokens, begin, end, y);
  if (w.dtype == 1) dense_product_as<1>(w, x, tokens, begin, end, y);
  if (w.dtype == 2) dense_product_as<2>(w, x, tokens, begin, end, y);
}

inline DenseKernels make_dense_kernels() { return {prepare, dense_product}; }

}  // namespace llmopt::LLMOPT_ISA
