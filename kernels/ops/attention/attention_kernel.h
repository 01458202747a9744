// Tiled attention with online softmax (Dao 2023, arXiv 2307.08691), once per instruction set.
//
// Scores are kept in units of log2, so that a weight is 2^(score - maximum). Few rows (decode) read keys and values as they
// lie; many rows (prefill) first turn each tile of keys into float32, transposed, and multiply by blocks of rows.
#pragma once

#include <cstring>

#include "attention_math.h"

namespace llmopt::LLMOPT_ISA {

// rows from which turning a tile into float32 pays
constexpr int64_t kPackRows = 24;
// rows whose scores and weights stay in L1 between the two products; a multiple of 16 and of kBlockRows
constexpr int64_t kChunkRows = 48;

// Few rows multiply in float32, where a processor has nothing better.
struct NoDots {
  static constexpr bool kOn = false;
};

template <int kDType, class Dots = NoDots>
class Attention : AttentionRows<kDType> {
 public:
  Attention(const AttentionParams& params, const AttentionJob& job, float* scratch)
      : Rows(params, job), layout_(params, job.row_end - job.row_begin), rows_(job.row_end - job.row_begin),
        packed_(rows_ >= kPackRows) {
    query_ = scratch + layout_.query;
    scores_ = scratch + layout_.scores;
    acc_ = scratch + layout_.acc;
    keys_ = scratch + layout_.keys;
    values_ = scratch + layout_.values;
    const int64_t padded = round_up(rows_, 16);
    max_ = scratch + layout_.stats;
    sum_ = max_ + padded;
    keep_ = sum_ + padded;
    tile_ = keep_ + padded;
    base_ = tile_ + padded;
    low_ = reinterpret_cast<int32_t*>(base_ + padded);
    high_ = low_ + padded;
    position_ = high_ + padded;
    query_scale_ = reinterpret_cast<float*>(position_ + padded);
  }

  void run() {
    if (!packed_) ask_for_keys();
    start();
    const int64_t first = std::max<int64_t>(job_.key_begin, low_[0]);
    const int64_t last = std::min<int64_t>(job_.key_end, high_[rows_ - 1]);
    for (int64_t key = first; key < last; key += kTileKeys) {
      const int64_t n = std::min(kTileKeys, last - key);
      if (!any_visible(key, n)) continue;
      if (packed_) {
        pack(key, n);
        // few enough rows at a time that their scores stay in L1
        for (int64_t r = 0; r < rows_; r += kChunkRows) {
          const int64_t end = std::min(rows_, r + kChunkRows);
          scores_packed(r, end, key, n);
          soften(r, end, key, n);
          values_packed(r, end, key, n);
        }
      } else {
        scores_direct(key, n);
        soften(0, rows_, key, n);
        values_direct(key, n);
      }
    }
    for (int64_t r = 0; r < rows_; ++r) finish(r);
  }

  // see AttentionKernels::combine
  void combine(int64_t count, int64_t stride, int64_t row) {
    const int64_t width = layout_.value_stride, r = row - job_.row_begin;
    const auto part = [&](int64_t i) { return job_.partial + i * stride; };
    float top = kMasked, sum = 0.0f;
    for (int64_t i = 0; i < count; ++i) top = std::max(top, part(i)[r]);
    const float base = top == kMasked ? 0.0f : top;
    for (int64_t d = 0; d < width; d += 16) store(acc_ + d, zero_f32());
    for (int64_t i = 0; i < count; ++i) {
      const float weight = exp2_weight(part(i)[r] - base);
      sum += weight * part(i)[rows_ + r];
      const float* in = part(i) + 2 * rows_ + r * width;
      for (int64_t d = 0; d < width; d += 16) store(acc_ + d, fmadd(set1(weight), load(in + d), load(acc_ + d)));
    }
    write(row, acc_, width, sum);
  }

 private:
  using Rows = AttentionRows<kDType>;
  using Rows::head_of, Rows::low_of, Rows::high_of, Rows::hide, Rows::write;
  using Rows::p_, Rows::job_, Rows::key_at, Rows::key_rope_at, Rows::value_at, Rows::key_scales_at,
      Rows::value_scales_at, Rows::mask_at, Rows::key_mask_at;

  void start() {
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t row = job_.row_begin + r, position = row / p_.group(), head = head_of(row, position);
      position_[r] = static_cast<int32_t>(position);
      low_[r] = static_cast<int32_t>(low_of(position));
      high_[r] = static_cast<int32_t>(high_of(position));
      max_[r] = kMasked;
      sum_[r] = 0.0f;
      float* out = query_ + r * layout_.query_stride;
      load_query(p_.q, p_.q_stride, p_.dim, head, position, out);
      if (p_.q_rope) load_query(p_.q_rope, p_.q_rope_stride, p_.dim_rope, head, position, out + round_up(p_.dim, 16));
      query_scale_[r] = kDType == 3 && !packed_ ? quantize_query(out) : 1.0f;
    }
    for (int64_t i = 0; i < rows_ * layout_.value_stride; i += 16) store(acc_ + i, zero_f32());
  }

  // the first tile's; for the others the products ask
  void ask_for_keys() const {
    const int64_t first = std::max(job_.key_begin, low_of(job_.row_begin / p_.group()));
    const int64_t end = std::min(first + kTileKeys, job_.key_end);
    for (int64_t key = first; key < end; ++key)
      for (int64_t d = 0; d < p_.dim; d += 16 * kLineVecs<kDType>) prefetch<kDType>(key_at(key), d);
  }

  void load_query(const void* q, const Strides& s, int64_t dim, int64_t head, int64_t position, float* out) {
    const void* in = element<kQueryType<kDType>>(q, job_.b * s.b + head * s.h + position * s.t);
    if (Dots::kOn) return void(std::memcpy(out, in, static_cast<size_t>(dim) * 2));
    const F32x16 scale = set1(p_.scale * 1.44269504f);
    int64_t d = 0;
    if (kPairs<kDType> && !packed_) {
      for (; d + 32 <= dim; d += 32) {
        F32x16 even, odd;
        split_bf16(load_bits<kDType>(in, d), even, odd);
        store(out + d, mul(scale, even));
        store(out + d + 16, mul(scale, odd));
      }
    }
    for (; d < dim; d += 16)
      store(out + d,
            mul(scale, load_as_n<kQueryType<kDType>>(in, d, static_cast<int>(std::min<int64_t>(16, dim - d)))));
  }

  // Turns a query into int16, in its place, and gives the scale. What is not finite makes the scale so.
  float quantize_query(float* q) const {
    const int64_t padded = round_up(p_.dim, 16);
    I32x16 bits = zero_i32();
    for (int64_t d = 0; d < padded; d += 16) bits = max(bits, abs_bits(load(q + d)));
    const int32_t top_bits = reduce_max(bits);
    float top;
    std::memcpy(&top, &top_bits, 4);
    const float inverse = top >= 1e-30f && std::isfinite(top) ? 32767.0f / top : 0.0f;
    for (int64_t d = 0; d < round_up(p_.dim, 32); ++d) {
      const int16_t code = d < padded && inverse != 0.0f ? static_cast<int16_t>(std::lrint(q[d] * inverse)) : 0;
      std::memcpy(reinterpret_cast<char*>(q) + 2 * d, &code, 2);
    }
    return top / 32767.0f;
  }

  bool any_visible(int64_t key, int64_t n) const {
    const auto any = [n](const uint8_t* m) {
      uint8_t seen = 0;
      for (int64_t j = 0; j < n; ++j) seen |= m[j];
      return seen != 0;
    };
    if (p_.key_mask && !any(key_mask_at(key))) return false;
    if (!p_.mask) return true;
    for (int64_t r = 0; r < rows_; ++r)
      if (any(mask_at(job_.row_begin + r, position_[r], key))) return true;
    return false;
  }

  void pack(int64_t key, int64_t n) {
    pack_transposed<kDType>(key_at(key), p_.k_stride.t, n, p_.dim, keys_);
    const int64_t rope = round_up(p_.dim, 16);
    // query padding is zero, so rows of the tile between dim and rope only have to be finite
    std::memset(keys_ + p_.dim * kTileKeys, 0, static_cast<size_t>((rope - p_.dim) * kTileKeys) * sizeof(float));
    if (p_.k_rope)
      pack_transposed<kDType>(key_rope_at(key), p_.k_rope_stride.t, n, p_.dim_rope, keys_ + rope * kTileKeys);
    pack_rows<kDType>(value_at(key), p_.v_stride.t, n, p_.dim_v, values_, layout_.value_stride);
  }

  void scores_packed(int64_t begin, int64_t end, int64_t key, int64_t n) {
    const int64_t dim = p_.k_rope ? round_up(p_.dim, 16) + p_.dim_rope : p_.dim;
    for (int64_t r = begin; r < end; r += kBlockRows) {
      const int count = static_cast<int>(std::min<int64_t>(kBlockRows, end - r));
      if (low_[r] >= key + n || high_[r + count - 1] <= key) continue;
      const int64_t seen = round_up(std::min<int64_t>(n, high_[r + count - 1] - key), 16);
      product_rows<kBlockRows>(count, query_ + r * layout_.query_stride, layout_.query_stride, keys_, kTileKeys,
                               scores_ + r * kTileKeys, kTileKeys, dim, nullptr, seen);
    }
  }

  void values_packed(int64_t begin, int64_t end, int64_t key, int64_t n) {
    const int64_t width = layout_.value_stride;
    for (int64_t r = begin; r < end; r += kBlockRows) {
      const int count = static_cast<int>(std::min<int64_t>(kBlockRows, end - r));
      const int64_t first = std::max<int64_t>(0, low_[r] - key);
      const int64_t last = std::min<int64_t>(n, high_[r + count - 1] - key);
      if (first >= last) continue;
      product_rows<kBlockRows>(count, scores_ + r * kTileKeys + first, kTileKeys, values_ + first * width, width,
                               acc_ + r * width, width, last - first, keep_ + r, width);
    }
  }

  // sixteen keys at a time, all rows: the keys stay in L1, and the prefetches spread evenly over the work
  void scores_direct(int64_t key, int64_t n) {
    for (int64_t j = 0; j < n; j += 16) {
      int64_t r = 0;
      for (; r + 4 <= rows_; r += 4) score_rows<4, kBlockVecs == 4 ? 4 : 1>(r, key, j, n);
      for (; r + 2 <= rows_; r += 2) score_rows<2, 2>(r, key, j, n);
      for (; r < rows_; ++r) score_rows<1, kBlockVecs == 4 ? 8 : 4>(r, key, j, n);
    }
  }

  // Elements from a key of a tile to the value in its place. While keys are multiplied their values are asked for, and with
  // those the keys of the next tile; of all of them where keys and values are laid out alike, as in a cache.
  int64_t values_ahead(int64_t key) const {
    constexpr int64_t kBytes = kDType == 0 ? 4 : kDType == 3 ? 1 : 2;
    return (reinterpret_cast<intptr_t>(value_at(key)) - reinterpret_cast<intptr_t>(key_at(key))) / kBytes;
  }

  // scores of R rows and keys [j, j + 16) of the tile, 16 sums at a time: C keys together, as often as gives 16
  template <int R, int C>
  [[gnu::noinline]] void score_rows(int64_t r, int64_t key, int64_t j, int64_t n) {
    constexpr int kGroups = 16 / (R * C);
    const float* q = query_ + r * layout_.query_stride;
    const int64_t ahead = values_ahead(key);
    for (int64_t end = j + 16; j < end; j += C * kGroups) {
      F32x16 acc[16];
#pragma GCC unroll 16
      for (int g = 0; g < kGroups; ++g) {
        const void* k[C];
#pragma GCC unroll 16
        for (int i = 0; i < R * C; ++i) acc[g * R * C + i] = zero_f32();
        // past the end the last key is read again; its scores are masked
        for (int c = 0; c < C; ++c) k[c] = key_at(key + std::min<int64_t>(n - 1, j + g * C + c));
        dots_of<R, C>(q, k, p_.dim, ahead, acc + g * R * C);
        if (p_.k_rope) {
          for (int c = 0; c < C; ++c) k[c] = key_rope_at(key + std::min<int64_t>(n - 1, j + g * C + c));
          dots_of<R, C>(q + round_up(p_.dim, 16), k, p_.dim_rope, kAheadKeys * p_.k_rope_stride.t, acc + g * R * C);
        }
      }
      float sums[16];
      store(sums, sum_each(acc));
      for (int g = 0; g < kGroups; ++g)
        for (int i = 0; i < R; ++i)
          std::memcpy(scores_ + (r + i) * kTileKeys + j + g * C, sums + (g * R + i) * C, C * sizeof(float));
    }
  }

  template <int R, int C>
  void dots_of(const float* q, const void* const (&k)[C], int64_t dim, int64_t ahead, F32x16* acc) {
    const int64_t stride = layout_.query_stride;
    if constexpr (kDType == 3)
      dots_s8<R, C>(reinterpret_cast<const int16_t*>(q), 2 * stride, k, dim, ahead, acc);
    else if constexpr (Dots::kOn)
      Dots::template scores<R, C>(reinterpret_cast<const uint16_t*>(q), 2 * stride, k, dim, ahead, acc);
    else
      dots<R, C, kDType>(q, stride, k, dim, ahead, acc);
  }

  void values_direct(int64_t key, int64_t n) {
    int64_t r = 0;
    if constexpr (kBlockVecs == 4) {
      for (; r + 8 <= rows_; r += 8) add_values<8, 2>(r, key, n);
      for (; r + 4 <= rows_; r += 4) add_values<4, 4>(r, key, n);
    }
    for (; r + 2 <= rows_; r += 2) add_values<2, kBlockVecs == 4 ? 8 : 2>(r, key, n);
    for (; r < rows_; ++r) add_values<1, kBlockVecs == 4 ? 8 : 4>(r, key, n);
  }
  template <int R, int V>
  void add_values(int64_t r, int64_t key, int64_t n) {
    const int64_t ahead = kTileKeys * p_.k_stride.t - values_ahead(key), width = layout_.value_stride;
    const float* weights = scores_ + r * kTileKeys;
    float* acc = acc_ + r * width;
    if constexpr (Dots::kOn)
      Dots::template values<R, V>(reinterpret_cast<const uint16_t*>(weights), 2 * kTileKeys,
                                  static_cast<const uint16_t*>(value_at(key)), p_.v_stride.t, acc, width, n, keep_ + r,
                                  p_.dim_v, ahead);
    else
      product<R, V, kDType, true>(weights, kTileKeys, value_at(key), p_.v_stride.t, acc, width, n, keep_ + r, p_.dim_v,
                                  ahead);
  }

  // turns the scores of rows [begin, end) into weights; updates maximum, sum and what to keep of acc. `begin` is a
  // multiple of 16, and what is done for sixteen rows at once may run over `end`, up to the padding.
  [[gnu::noinline]] void soften(int64_t begin, int64_t end, int64_t key, int64_t n) {
    for (int64_t r = begin; r < end; ++r) tile_[r] = mask_row(r, key, n);
    for (int64_t r = begin; r < end; r += 16) {
      const F32x16 before = load(max_ + r), now = max(load(tile_ + r), before);
      // with nothing visible yet every weight is 2^-inf = 0, whatever the base
      const F32x16 base = max(now, set1(-3.0e38f));
      store(max_ + r, now);
      store(base_ + r, base);
      store(keep_ + r, exp2_weight(sub(before, base)));
    }
    for (int64_t r = begin; r < end; ++r) {
      float* s = scores_ + r * kTileKeys;
      const F32x16 base = set1(base_[r]);
      F32x16 total = zero_f32();
#pragma GCC unroll 4
      for (int64_t j = 0; j < kTileKeys; j += 16) {
        const F32x16 w = exp2_weight(sub(load(s + j), base));
        total = add(total, w);
        store(s + j, kDType == 3 ? scaled(w, key + j, n - j) : w);
      }
      tile_[r] = reduce_add(total);
      if constexpr (Dots::kOn) Dots::store_weights(s, load(s), load(s + 16));
    }
    for (int64_t r = begin; r < end; r += 16) store(sum_ + r, fmadd(load(sum_ + r), load(keep_ + r), load(tile_ + r)));
  }

  // masks a row's scores of this tile and gives their maximum
  float mask_row(int64_t r, int64_t key, int64_t n) {
    float* s = scores_ + r * kTileKeys;
    if constexpr (kDType == 3) {
      const F32x16 scale = set1(query_scale_[r]);
      for (int64_t j = 0; j < n; j += 16) {
        const int count = static_cast<int>(std::min<int64_t>(16, n - j));
        store(s + j, mul(load(s + j), mul(scale, load_n(key_scales_at(key + j), count))));
      }
    }
    if (Dots::kOn) {
      const F32x16 scale = set1(p_.scale * 1.44269504f);
      for (int64_t j = 0; j < kTileKeys; j += 16) store(s + j, mul(load(s + j), scale));
    }
    hide(job_.row_begin + r, position_[r], key, n, kTileKeys, s);
    F32x16 top = load(s);
#pragma GCC unroll 4
    for (int64_t j = 16; j < kTileKeys; j += 16) top = max(top, load(s + j));
    return reduce_max(top);
  }

  // weights of keys [key, key + 16), of which there are n, as factors of int8 values
  F32x16 scaled(F32x16 w, int64_t key, int64_t n) const {
    if (n <= 0) return w;
    return mul(w, load_n(value_scales_at(key), static_cast<int>(std::min<int64_t>(16, n))));
  }

  void finish(int64_t r) {
    const int64_t width = layout_.value_stride;
    if (kPairs<kDType> && !packed_) {
      std::copy(acc_ + r * width, acc_ + (r + 1) * width, values_);
      restore_order(values_, p_.dim_v, acc_ + r * width);
    }
    if (!job_.partial) return write(job_.row_begin + r, acc_ + r * width, width, sum_[r]);
    job_.partial[r] = max_[r];
    job_.partial[rows_ + r] = sum_[r];
    std::memcpy(job_.partial + 2 * rows_ + r * width, acc_ + r * width, static_cast<size_t>(width) * sizeof(float));
  }

  const AttentionLayout layout_;
  const int64_t rows_;
  const bool packed_;
  float *query_, *scores_, *acc_, *keys_, *values_, *max_, *sum_, *keep_, *tile_, *base_, *query_scale_;
  int32_t *low_, *high_, *position_;
};

template <int kDType, class Dots = NoDots>
const AttentionKernels& kernels_of() {
  static const AttentionKernels kernels = {
      [](const AttentionParams& p, const AttentionJob& job, float* scratch) {
        if constexpr (Dots::kOn) {
          if (Dots::takes(p) && job.row_end - job.row_begin < kPackRows)
            return Attention<kDType, Dots>(p, job, scratch).run();
        }
        Attention<kDType>(p, job, scratch).run();
      },
      [](const AttentionParams& p, const AttentionJob& job, int64_t count, int64_t stride, int64_t row,
         float* scratch) { Attention<kDType>(p, job, scratch).combine(count, stride, row); }};
  return kernels;
}

inline const AttentionKernels& kernels_for(int dtype) {
  if (dtype == 0) return kernels_of<0>();
  if (dtype == 1) return kernels_of<1>();
  return dtype == 2 ? kernels_of<2>() : kernels_of<3>();
}

}  // namespace llmopt::LLMOPT_ISA
