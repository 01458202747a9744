// GPTQ's column loop and scale search. Rows do not depend on each other, so sixteen of them are the lanes of a vector and
// a whole group stays in L1.
#pragma once
#include "gptq_round.h"
#include "simd_math.h"

namespace llmopt::LLMOPT_ISA {

constexpr int kMaxColumns = 128;
// candidate scales, as shares of the one that just covers the largest weight: 1.00 down to 0.45
constexpr int kShrinks = 45;

// rows [rows][stride] -> lanes [columns][16]
inline void to_lanes(const float* w, int64_t stride, int rows, int64_t begin, int64_t columns, float* lanes) {
  for (int64_t k = 0; k < columns; ++k)
    for (int r = 0; r < 16; ++r) lanes[16 * k + r] = r < rows ? w[r * stride + begin + k] : 0.0f;
}

inline F32x16 nearest_code(F32x16 w, F32x16 inverse, F32x16 zero, F32x16 top) {
  return min(max(round_even(add(mul(w, inverse), zero)), zero_f32()), top);
}

// what the checkpoint can store: float16, never zero
inline F32x16 storable(F32x16 scale) {
  alignas(64) uint16_t half[16];
  alignas(64) float value[16];
  store_f16(half, scale);
  store(value, load_f16(half));
  for (float& v : value)
    if (v == 0.0f) v = 5.9604645e-8f;
  return load(value);
}

inline F32x16 grid_error(const float* w, int64_t stride, int rows, int64_t columns, const float* weight, F32x16 scale,
                         F32x16 zero, F32x16 top, float* lanes) {
  const F32x16 inverse = div(set1(1.0f), scale), minus_scale = sub(zero_f32(), scale);
  F32x16 error = zero_f32();
  for (int64_t begin = 0; begin < columns; begin += kMaxColumns) {
    const int64_t count = columns - begin < kMaxColumns ? columns - begin : kMaxColumns;
    // one chunk (the usual case) is transposed once, by the caller
    if (columns > kMaxColumns) to_lanes(w, stride, rows, begin, count, lanes);
    for (int64_t k = 0; k < count; ++k) {
      const F32x16 x = load(lanes + 16 * k);
      const F32x16 d = fmadd(sub(nearest_code(x, inverse, zero, top), zero), minus_scale, x);
      error = fmadd(mul(d, d), set1(weight[begin + k]), error);
    }
  }
  return error;
}

inline void search(const float* w, int64_t stride, int rows, int64_t columns, const float* weight, int bits,
                   bool symmetric, float* scale_out, float* zero_out) {
  alignas(64) float lanes[16 * kMaxColumns];
  alignas(64) float best_error[16], best_scale[16], now[16], candidate[16];
  F32x16 low = zero_f32(), high = zero_f32();
  for (int64_t begin = 0; begin < columns; begin += kMaxColumns) {
    const int64_t count = columns - begin < kMaxColumns ? columns - begin : kMaxColumns;
    to_lanes(w, stride, rows, begin, count, lanes);
    for (int64_t k = 0; k < count; ++k) {
      low = min(low, load(lanes + 16 * k));
      high = max(high, load(lanes + 16 * k));
    }
  }
  const F32x16 top = set1(static_cast<float>((1 << bits) - 1));
  const F32x16 reach = symmetric ? mul(max(sub(zero_f32(), low), high), set1(2.0f)) : sub(high, low);
  const F32x16 cover = div(reach, top);
  F32x16 zero = set1(static_cast<float>(1 << (bits - 1)));
  if (!symmetric) {
    const F32x16 safe = max(cover, set1(1e-30f));
    zero = min(max(round_even(div(sub(zero_f32(), low), safe)), zero_f32()), top);
  }
  for (float& e : best_error) e = __builtin_inff();
  for (float& s : best_scale) s = 1.0f;
  for (int i = 0; i < kShrinks * (symmetric ? 2 : 1); ++i) {
    // a symmetric grid reaches one step further down than up, so the sign of the scale is a choice too
    const int step = symmetric ? i / 2 : i;
    const float share =
        (1.0f - 0.55f * static_cast<float>(step) / (kShrinks - 1)) * (symmetric && i % 2 ? -1.0f : 1.0f);
    const F32x16 scale = storable(mul(cover, set1(share)));
    store(now, grid_error(w, stride, rows, columns, weight, scale, zero, top, lanes));
    store(candidate, scale);
    for (int r = 0; r < 16; ++r) {
      if (now[r] < best_error[r]) {
        best_error[r] = now[r];
        best_scale[r] = candidate[r];
      }
    }
  }
  store_n(scale_out, load(best_scale), rows);
  store_n(zero_out, zero, rows);
}

inline void round(const float* w, int64_t stride, int rows, int64_t columns, const float* u, int64_t u_stride,
                  const float* scale_in, const float* zero_in, int top_code, float* q, float* error) {
  alignas(64) float lanes[16 * kMaxColumns], codes[16 * kMaxColumns], errors[16 * kMaxColumns];
  to_lanes(w, stride, rows, 0, columns, lanes);
  const F32x16 scale = load_n(scale_in, rows), zero = load_n(zero_in, rows), top = set1(static_cast<float>(top_code));
  const F32x16 inverse = div(set1(1.0f), scale);
  for (int64_t i = 0; i < columns; ++i) {
    const F32x16 x = load(lanes + 16 * i);
    const F32x16 code = nearest_code(x, inverse, zero, top);
    const F32x16 e = div(sub(x, mul(sub(code, zero), scale)), set1(u[i * u_stride + i]));
    store(codes + 16 * i, code);
    store(errors + 16 * i, e);
    const F32x16 minus = sub(zero_f32(), e);
    for (int64_t j = i + 1; j < columns; ++j)
      store(lanes + 16 * j, fmadd(minus, set1(u[i * u_stride + j]), load(lanes + 16 * j)));
  }
  for (int r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < columns; ++k) {
      q[r * columns + k] = codes[16 * k + r];
      error[r * columns + k] = errors[16 * k + r];
    }
  }
}

}  // namespace llmopt::LLMOPT_ISA
