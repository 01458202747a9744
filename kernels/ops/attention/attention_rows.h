// The rows of one job, whatever loops they go through: where their keys lie, what they may see, and how a result is written.
#pragma once

#include <algorithm>
#include <cmath>

#include "attention.h"
#include "simd_math.h"

namespace llmopt::LLMOPT_ISA {

constexpr float kMasked = -INFINITY;

template <int kDType>
inline const void* element(const void* base, int64_t i) {
  return static_cast<const char*>(base) + i * (kDType == 0 ? 4 : kDType == 3 ? 1 : 2);
}
// of queries and outputs: beside int8 keys and values they are bfloat16
template <int kDType>
constexpr int kQueryType = kDType == 3 ? 1 : kDType;

template <int kDType>
class AttentionRows {
 public:
  AttentionRows(const AttentionParams& params, const AttentionJob& job) : p_(params), job_(job) {}

  const void* key_at(int64_t key) const {
    return element<kDType>(p_.k, job_.b * p_.k_stride.b + job_.kv_head * p_.k_stride.h + key * p_.k_stride.t);
  }
  const void* key_rope_at(int64_t key) const {
    const Strides& s = p_.k_rope_stride;
    return element<kDType>(p_.k_rope, job_.b * s.b + job_.kv_head * s.h + key * s.t);
  }
  const void* value_at(int64_t key) const {
    return element<kDType>(p_.v, job_.b * p_.v_stride.b + job_.kv_head * p_.v_stride.h + key * p_.v_stride.t);
  }
  const float* key_scales_at(int64_t key) const { return p_.k_scale + job_.kv_head * p_.scale_stride + key; }
  const float* value_scales_at(int64_t key) const { return p_.v_scale + job_.kv_head * p_.scale_stride + key; }

 protected:
  int64_t head_of(int64_t row, int64_t position) const {
    return job_.kv_head * p_.group() + row - position * p_.group();
  }
  // first and one past the last key that a position may see, masks aside
  int64_t low_of(int64_t position) const {
    return p_.window > 0 ? std::max<int64_t>(0, p_.tk - p_.tq + position - p_.window + 1) : 0;
  }
  int64_t high_of(int64_t position) const {
    return p_.causal ? std::max<int64_t>(0, p_.tk - p_.tq + position + 1) : p_.tk;
  }
  const uint8_t* mask_at(int64_t row, int64_t position, int64_t key) const {
    const Strides& s = p_.mask_stride;
    return p_.mask + job_.b * s.b + head_of(row, position) * s.h + position * s.t + key;
  }
  const uint8_t* key_mask_at(int64_t key) const { return p_.key_mask + job_.b * p_.key_mask_stride + key; }

  // hides the scores of keys [key, key + n) that a row may not see; `s` has room for `room` of them
  void hide(int64_t row, int64_t position, int64_t key, int64_t n, int64_t room, float* s) const {
    const int64_t begin = std::clamp<int64_t>(low_of(position) - key, 0, n);
    const int64_t end = std::clamp<int64_t>(high_of(position) - key, begin, n);
    std::fill(s, s + begin, kMasked);
    std::fill(s + end, s + room, kMasked);
    if (p_.key_mask) {
      const uint8_t* visible = key_mask_at(key);
      for (int64_t j = begin; j < end; ++j) s[j] = visible[j] ? s[j] : kMasked;
    }
    if (p_.mask) {
      const uint8_t* visible = mask_at(row, position, key);
      for (int64_t j = begin; j < end; ++j) s[j] = visible[j] ? s[j] : kMasked;
    }
  }

  // divides a row by the sum of its weights; a row that saw no key is zero
  void normalise(int64_t row, float* o, int64_t width, float sum) const {
    const F32x16 inverse = set1(sum == 0.0f ? 0.0f : 1.0f / sum);
    I32x16 bits = zero_i32();
    for (int64_t d = 0; d < width; d += 16) {
      const F32x16 x = mul(load(o + d), inverse);
      bits = max(bits, abs_bits(x));
      store(o + d, x);
    }
    // 0 * NaN: a value the row may not see has leaked in, or what it may see is not finite; the slow way tells
    if (reduce_max(bits) >= 0x7f800000) exact_row(row, o, width);
  }

  // where in the output a row begins
  int64_t out_at(int64_t row) const {
    const int64_t position = row / p_.group();
    return ((job_.b * p_.tq + position) * p_.heads + head_of(row, position)) * p_.dim_v;
  }

  // normalises a row in place and stores it
  void write(int64_t row, float* o, int64_t width, float sum) const {
    normalise(row, o, width, sum);
    const int64_t at = out_at(row);
    int64_t d = 0;
    for (; d + 16 <= p_.dim_v; d += 16) store_as<kQueryType<kDType>>(p_.out, at + d, load(o + d));
    if (d < p_.dim_v) store_as_n<kQueryType<kDType>>(p_.out, at + d, load(o + d), static_cast<int>(p_.dim_v - d));
  }

  const AttentionParams& p_;
  const AttentionJob& job_;

 private:
  template <int>
  friend class AttentionRows;

  // the row again, key by key, touching visible keys only
  void exact_row(int64_t row, float* o, int64_t width) const {
    // the loops in bfloat16 take int8 keys and values as well
    if constexpr (kDType == 1) {
      if (p_.k_scale) return AttentionRows<3>(p_, job_).exact_row(row, o, width);
    }
    const int64_t position = row / p_.group(), head = head_of(row, position);
    const int64_t first = low_of(position), last = high_of(position);
    const auto visible = [&](int64_t key) {
      return (!p_.key_mask || *key_mask_at(key)) && (!p_.mask || *mask_at(row, position, key));
    };
    float top = kMasked, sum = 0.0f;
    for (int64_t key = first; key < last; ++key) {
      if (!visible(key)) continue;
      const float s = score(head, position, key);
      if (s > top || s != s) top = s;
    }
    for (int64_t d = 0; d < width; d += 16) store(o + d, zero_f32());
    for (int64_t key = first; key < last; ++key) {
      if (!visible(key)) continue;
      float w = std::exp(score(head, position, key) - top);
      sum += w;
      if (kDType == 3) w *= *value_scales_at(key);
      for (int64_t d = 0; d < p_.dim_v; d += 16) {
        const int lanes = static_cast<int>(std::min<int64_t>(16, p_.dim_v - d));
        store(o + d, fmadd(set1(w), load_as_n<kDType>(value_at(key), d, lanes), load(o + d)));
      }
    }
    const F32x16 inverse = set1(sum == 0.0f ? 0.0f : 1.0f / sum);
    for (int64_t d = 0; d < width; d += 16) store(o + d, mul(load(o + d), inverse));
  }

  float score(int64_t head, int64_t position, int64_t key) const {
    const Strides &s = p_.q_stride, &t = p_.q_rope_stride;
    float sum = dot(element<kQueryType<kDType>>(p_.q, job_.b * s.b + head * s.h + position * s.t), key_at(key), p_.dim);
    if (p_.k_rope)
      sum += dot(element<kQueryType<kDType>>(p_.q_rope, job_.b * t.b + head * t.h + position * t.t), key_rope_at(key),
                 p_.dim_rope);
    if (kDType == 3) sum *= *key_scales_at(key);
    return sum * p_.scale;
  }
  static float dot(const void* a, const void* b, int64_t dim) {
    F32x16 sum = zero_f32();
    for (int64_t d = 0; d < dim; d += 16) {
      const int lanes = static_cast<int>(std::min<int64_t>(16, dim - d));
      sum = fmadd(load_as_n<kQueryType<kDType>>(a, d, lanes), load_as_n<kDType>(b, d, lanes), sum);
    }
    return reduce_add(sum);
  }
};

}  // namespace llmopt::LLMOPT_ISA
