// Attention of many queries in bfloat16 (Dao 2023, arXiv 2307.08691), once per instruction that multiplies it.
//
// 32 rows at a time pass over stretches of packed keys: scores, weights in their place as bfloat16, product with the values.
// A row's weights are relative to a score near the largest it has seen, its base. The base follows only when it is left
// behind by more than kSlack (the threshold of FlashAttention-4): that is seldom after the first stretch, so the branch is
// predicted and sums are hardly ever scaled, while a weight up to 2^8 is as exact as one up to 1.
#pragma once

#include <cstring>

#include "attention_rows.h"
#include "prefill_math.h"

namespace llmopt::LLMOPT_ISA {

constexpr float kSlack = 8.0f;  // in units of log2
// base of a row that has seen nothing: finite, so that a hidden score, -inf, has weight zero there too
constexpr float kNoBase = -3.0e38f;

// Product has, for the life of an object, what it needs of the processor, and
//   block<kAdd>(a, lda, b, panel, step, steps, c, ldc): c[32, 32] (+)= a[32, 32 * steps] b[32 * steps, 32], where b's second
//   panel of 16 columns lies `panel` elements behind the first, and the next 32 terms `step` elements on.
template <class Product>
class Prefill : AttentionRows<1> {
 public:
  Prefill(const AttentionParams& params, const AttentionJob& job, const uint16_t* packed, float* scratch)
      : AttentionRows(params, job), layout_(params, job.row_end - job.row_begin), rows_(job.row_end - job.row_begin),
        packed_(packed), acc_(scratch), query_(reinterpret_cast<uint16_t*>(scratch + layout_.query)),
        scores_(scratch + layout_.scores), sums_(scratch + layout_.sums), base_(sums_ + 16 * round_up(rows_, kBlock)),
        scale_(params.scale * 1.44269504f), slack_(kSlack / scale_) {}

  void run() {
    start();
    const Product product;
    int64_t first = first_key(job_.row_begin), last = end_key(job_.row_end - 1);
    if (p_.key_mask) {
      while (first < last && !*key_mask_at(first)) ++first;
      while (first < last && !*key_mask_at(last - 1)) --last;
    }
    for (int64_t key = first / kBlock * kBlock; key < last; key += kStretch) {
      for (int64_t r = 0; r < rows_; r += kBlock) attend(product, r, key, std::min(key + kStretch, last));
    }
    for (int64_t r = 0; r < rows_; r += kBlock)
      if (!(begun_ >> r / kBlock & 1)) std::fill_n(acc_ + r * layout_.width, kBlock * layout_.width, 0.0f);
    for (int64_t r = 0; r < rows_; ++r) finish(r);
  }

 private:
  int64_t first_key(int64_t row) const { return low_of(row / p_.group()); }
  int64_t end_key(int64_t row) const { return high_of(row / p_.group()); }
  const uint16_t* packed_at(int64_t key) const { return packed_ + key / kBlock * layout_.packed; }

  void start() {
    for (int64_t r = 0; r < round_up(rows_, kBlock); ++r) {
      uint16_t* out = query_ + r * layout_.depth;
      if (r >= rows_ || layout_.depth > p_.dim + p_.dim_rope)
        std::memset(out, 0, static_cast<size_t>(layout_.depth) * 2);
      if (r >= rows_) continue;
      const int64_t row = job_.row_begin + r, position = row / p_.group(), head = head_of(row, position);
      const Strides &s = p_.q_stride, &t = p_.q_rope_stride;
      std::memcpy(out, element<1>(p_.q, job_.b * s.b + head * s.h + position * s.t), static_cast<size_t>(p_.dim) * 2);
      if (!p_.q_rope) continue;
      std::memcpy(out + round_up(p_.dim, kBlock), element<1>(p_.q_rope, job_.b * t.b + head * t.h + position * t.t),
                  static_cast<size_t>(p_.dim_rope) * 2);
    }
    std::memset(sums_, 0, static_cast<size_t>(rows_ * 16) * sizeof(float));
    std::fill(base_, base_ + rows_, kNoBase);
  }

  // rows [r, r + 32) against those of the keys [begin, end) that any of them may see
  void attend(const Product& product, int64_t r, int64_t begin, int64_t end) {
    const int64_t row = job_.row_begin + r, last_row = std::min(row + kBlock, job_.row_end) - 1;
    const int64_t first = std::max(begin, first_key(row) / kBlock * kBlock), last = std::min(end, end_key(last_row));
    if (first >= last) return;
    const int64_t n = round_up(last - first, kBlock), panel = layout_.depth * 16;
    for (int64_t j = 0; j < n; j += kBlock)
      product.template block<false>(query_ + r * layout_.depth, layout_.depth, packed_at(first + j), panel, kPanelStep,
                                    layout_.depth / kBlock, scores_ + j, kScoreStride);
    const bool whole = first_key(last_row) <= first && end_key(row) >= first + n;
    for (int64_t i = 0; i <= last_row - row; ++i) {
      float* s = scores_ + i * kScoreStride;
      const int64_t position = (row + i) / p_.group();
      if (p_.key_mask || p_.mask) hide(row + i, position, first, last - first, n, s);
      if (whole)
        weigh<false>(r + i, s, n, 0, n);
      else
        weigh<true>(r + i, s, n, low_of(position) - first, high_of(position) - first);
    }
    const uint64_t bit = uint64_t{1} << r / kBlock;
    if (begun_ & bit)
      add_values<true>(product, r, first, n);
    else
      add_values<false>(product, r, first, n);
    begun_ |= bit;
  }

  template <bool kAdd>
  void add_values(const Product& product, int64_t r, int64_t key, int64_t n) {
    const uint16_t* values = packed_at(key) + kBlock * layout_.depth;
    for (int64_t d = 0; d < layout_.width; d += kBlock)
      product.template block<kAdd>(reinterpret_cast<uint16_t*>(scores_), 2 * kScoreStride, values + d / 16 * kPanelStep,
                                   kPanelStep, layout_.packed, n / kBlock, acc_ + r * layout_.width + d, layout_.width);
  }

  // turns n scores of a row into weights in bfloat16, at the front of where the scores were, and adds them up; with kEdge
  // only scores [begin, end) count
  template <bool kEdge>
  void weigh(int64_t r, float* s, int64_t n, int64_t begin, int64_t end) {
    const auto score_at = [=](int64_t j) {
      return kEdge ? only_between(load(s + j), begin - j, end - j, set1(kMasked)) : load(s + j);
    };
    F32x16 top = score_at(0), more = score_at(16);
    for (int64_t j = 32; j < n; j += 32) {
      top = max(score_at(j), top);
      more = max(score_at(j + 16), more);
    }
    top = max(top, more);
    if (any_above(top, set1(base_[r] + slack_))) raise(r, reduce_max(top));
    const F32x16 base = set1(base_[r]), scale = set1(scale_);
    F32x16 total = load(sums_ + 16 * r);
    uint16_t* out = reinterpret_cast<uint16_t*>(s);
    for (int64_t j = 0; j < n; j += 32) {
      const F32x16 low = weight_of(sub(score_at(j), base), scale), high = weight_of(sub(score_at(j + 16), base), scale);
      total = add(total, add(low, high));
      store_bf16(out + j, low, high);
    }
    store(sums_ + 16 * r, total);
  }

  // makes weights relative to a new largest score
  void raise(int64_t r, float top) {
    const float before = base_[r];
    base_[r] = top;
    if (before != kNoBase) rescale(r, weight_of(set1(before - top), set1(scale_)));
  }

  [[gnu::noinline]] void rescale(int64_t r, F32x16 keep) {
    float* acc = acc_ + r * layout_.width;
    for (int64_t d = 0; d < layout_.width; d += 16) store(acc + d, mul(load(acc + d), keep));
    store(sums_ + 16 * r, mul(load(sums_ + 16 * r), keep));
  }

  void finish(int64_t r) {
    const int64_t row = job_.row_begin + r;
    float* acc = acc_ + r * layout_.width;
    normalise(row, acc, layout_.width, reduce_add(load(sums_ + 16 * r)));
    uint16_t* out = static_cast<uint16_t*>(p_.out) + out_at(row);
    int64_t d = 0;
    for (; d + 32 <= p_.dim_v; d += 32) store_bf16(out + d, load(acc + d), load(acc + d + 16));
    for (; d < p_.dim_v; d += 16)
      store_bf16_n(out + d, load(acc + d), static_cast<int>(std::min<int64_t>(16, p_.dim_v - d)));
  }

  const PrefillLayout layout_;
  const int64_t rows_;
  const uint16_t* const packed_;
  float* const acc_;
  uint16_t* const query_;
  float *const scores_, *const sums_, *const base_;
  const float scale_, slack_;  // scores to log2, and kSlack in units of scores
  uint64_t begun_ = 0;         // a bit for each 32 rows whose accumulators hold something
};

// see PrefillKernels::pack
class PrefillPacking : AttentionRows<1> {
 public:
  PrefillPacking(const AttentionParams& params, const AttentionJob& job) : AttentionRows(params, job) {}

  void run(int64_t key, uint16_t* out) const {
    const PrefillLayout layout(p_, 0);
    const uint32_t seen = seen_of(key);
    if (p_.k_scale) return run_s8(key, seen, layout, out);
    const int64_t rope = round_up(p_.dim, kBlock);
    for (int64_t i = 0; i < kBlock; i += 16) {
      uint16_t* panel = out + i * layout.depth;
      pack_panel(static_cast<const uint16_t*>(key_at(key + i)), p_.k_stride.t, seen >> i, p_.dim, panel);
      if (p_.k_rope)
        pack_panel(static_cast<const uint16_t*>(key_rope_at(key + i)), p_.k_rope_stride.t, seen >> i, p_.dim_rope,
                   panel + rope * 16);
    }
    pack_values(static_cast<const uint16_t*>(value_at(key)), p_.v_stride.t, seen, p_.dim_v,
                out + kBlock * layout.depth);
  }

 private:
  // the same of int8 keys and values, 32 dimensions at a time by way of bfloat16
  void run_s8(int64_t key, uint32_t seen, const PrefillLayout& layout, uint16_t* out) const {
    const AttentionRows<3> rows(p_, job_);
    alignas(64) uint16_t some[kBlock * kBlock];
    for (int64_t d = 0; d < p_.dim; d += kBlock) {
      const int64_t count = std::min(kBlock, p_.dim - d);
      dequantize(rows.key_at(key), rows.key_scales_at(key), p_.k_stride.t, seen, d, count, some);
      for (int64_t i = 0; i < kBlock; i += 16)
        pack_panel(some + i * kBlock, kBlock, seen >> i, count, out + i * layout.depth + d * 16);
    }
    for (int64_t d = 0; d < p_.dim_v; d += kBlock) {
      const int64_t count = std::min(kBlock, p_.dim_v - d);
      dequantize(rows.value_at(key), rows.value_scales_at(key), p_.v_stride.t, seen, d, count, some);
      pack_values(some, kBlock, seen, count, out + kBlock * layout.depth + d / 16 * kPanelStep);
    }
  }

  // dimensions [d, d + count) of the keys that are seen, [32, 32]
  static void dequantize(const void* in, const float* scales, int64_t stride, uint32_t seen, int64_t d, int64_t count,
                         uint16_t* out) {
    for (int64_t i = 0; i < kBlock; ++i) {
      if (!(seen >> i & 1)) continue;
      for (int64_t j = 0; j < count; j += 16) {
        const int n = static_cast<int>(std::min<int64_t>(16, count - j));
        store_bf16(out + i * kBlock + j, mul(load_as_n<3>(in, i * stride + d + j, n), set1(scales[i])));
      }
    }
  }

  // a bit for each of 32 keys that is there and not hidden from all
  uint32_t seen_of(int64_t key) const {
    const int64_t n = std::min(kBlock, p_.tk - key);
    uint32_t seen = static_cast<uint32_t>((uint64_t{1} << n) - 1);
    if (!p_.key_mask) return seen;
    for (int64_t i = 0; i < n; ++i)
      if (!key_mask_at(key)[i]) seen &= ~(uint32_t{1} << i);
    return seen;
  }
};

template <class Product>
const PrefillKernels& prefill_kernels_of() {
  static const PrefillKernels kernels = {[](const AttentionParams& p, const AttentionJob& job, int64_t key,
                                            uint16_t* out) { PrefillPacking(p, job).run(key, out); },
                                         [](const AttentionParams& p, const AttentionJob& job, const uint16_t* packed,
                                            float* scratch) { Prefill<Product>(p, job, packed, scratch).run(); }};
  return kernels;
}

}  // namespace llmopt::LLMOPT_ISA
