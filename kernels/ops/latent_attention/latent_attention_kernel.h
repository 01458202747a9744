// Attention over latents (DeepSeek-V2, arXiv 2405.04434, absorbed form) with online softmax, once per instruction set.
//
// Sixteen queries lie side by side in the lanes: a score is a broadcast value of a key times a vector of queries, so
// nothing is transposed but the queries, once, and softmax has no sum across lanes. A tile of the cache is read and turned
// into float32 once for all queries, and serves as keys and as values.
#pragma once

#include <algorithm>
#include <cstring>

#include "../attention/attention_math.h"
#include "latent_rows_kernel.h"

namespace llmopt::LLMOPT_ISA {

static_assert(kLatentTile % kKeyBlock == 0 && kLanes % kRowBlock == 0);

// Up to kKeyBlock rows of 16 dimensions from block b on, as a tile has them: [block][row][16]. With kPair bfloat16 comes 32 at
// a time, as even and odd ones, as far as the values go; the rest comes in order. Rows from n on are zero: what they score is
// thrown away, but has to be a number. Gives the blocks done. Asks for what lies a tile further on.
template <int kDType, bool kPair>
[[gnu::always_inline]] inline int64_t load_blocks(const void* in, int64_t n, int64_t b, const LatentParams& p,
                                                  float* tile) {
  float* to = tile + b * 16 * kLatentTile;
  const int64_t d = 16 * b;
  const bool pair = kPair && d + 32 <= p.rank;
  for (int64_t row = 0; row < kKeyBlock; ++row, to += 16) {
    const int64_t at = row * p.dim + d;
    F32x16 first = zero_f32(), second = first;
    if (row < n) {
      prefetch<kDType>(in, at + kLatentTile * p.dim);
      if (pair) {
        split_bf16(load_bits<kDType>(in, at), first, second);
      } else {
        first = d + 16 <= p.dim ? load_as<kDType>(in, at) : load_as_n<kDType>(in, at, static_cast<int>(p.dim - d));
      }
    }
    store(to, first);
    if (pair) store(to + 16 * kLatentTile, second);
  }
  return pair ? 2 : 1;
}

// dimensions [d, d + 16) of one row of an int8 cache, zeros past the last
inline F32x16 load_from_codes(const int8_t* row, float scale, int64_t d, const LatentParams& p) {
  const int8_t* rope = row + p.rank;
  if (d + 16 <= p.rank) return mul(set1(scale), load_s8(row + d));
  if (d >= p.rank && d + 16 <= p.dim) return load_bf16(reinterpret_cast<const uint16_t*>(rope) + d - p.rank);
  alignas(64) float x[16] = {};
  for (int64_t i = 0; i < 16 && d + i < p.dim; ++i) {
    uint32_t bits = 0;
    if (d + i >= p.rank) std::memcpy(reinterpret_cast<char*>(&bits) + 2, rope + 2 * (d + i - p.rank), 2);
    std::memcpy(x + i, &bits, 4);
    if (d + i < p.rank) x[i] = scale * static_cast<float>(row[d + i]);
  }
  return load(x);
}

// load_blocks() of one block of an int8 cache
[[gnu::always_inline]] inline int64_t load_code_blocks(const int8_t* in, const float* scales, int64_t n, int64_t b,
                                                       const LatentParams& p, float* tile) {
  float* to = tile + b * 16 * kLatentTile;
  for (int64_t row = 0; row < kKeyBlock; ++row, to += 16, in += p.row) {
    store(to, row < n ? load_from_codes(in, scales[row], 16 * b, p) : zero_f32());
    if (row < n && b % 4 == 0) prefetch<3>(in, 16 * b + kLatentTile * p.row);
  }
  return 1;
}

// scores[key, lane] of kKeyBlock keys, which come from the tile, or from `in` into the tile first: bit by bit, so that
// turning them into float32 hides behind the products
template <int kDType>
[[gnu::noinline]] void score_keys(const LatentParams& p, const float* query, const void* in, const float* scales,
                                  int64_t n, float* tile, float* scores) {
  const auto load_next = [&](int64_t b) {
    if constexpr (kDType == 3) return load_code_blocks(static_cast<const int8_t*>(in), scales, n, b, p, tile);
    return load_blocks<kDType, kPairs<kDType>>(in, n, b, p, tile);
  };
  const int64_t blocks = (p.dim + 15) / 16;
  F32x16 acc[kKeyBlock];
#pragma GCC unroll 24
  for (int k = 0; k < kKeyBlock; ++k) acc[k] = zero_f32();
  for (int64_t b = 0; b < blocks;) {
    const int64_t end = in ? b + load_next(b) : blocks;
    for (; b < end; ++b) {
      const float* x = tile + b * 16 * kLatentTile;
      for (int d = 0; d < 16; ++d, query += kLanes) {
        const F32x16 q = load(query);
#pragma GCC unroll 24
        for (int k = 0; k < kKeyBlock; ++k) acc[k] = fmadd(set1(x[16 * k + d]), q, acc[k]);
      }
    }
  }
#pragma GCC unroll 24
  for (int k = 0; k < kKeyBlock; ++k) store(scores + k * kLanes, acc[k]);
}

// acc[r] = keep[r] * acc[r] + sum over n keys of weights[key, r] * value[key], for R rows and V vectors
template <int R, int V>
[[gnu::noinline]] void add_latents(const float* weights, const float* tile, int64_t n, const float* keep, float* acc,
                                   int64_t acc_stride) {
  F32x16 sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sum[r][v] = mul(load(acc + r * acc_stride + 16 * v), set1(keep[r]));
  for (int64_t j = 0; j < n; ++j) {
    F32x16 x[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) x[v] = load(tile + (v * kLatentTile + j) * 16);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const F32x16 w = set1(weights[j * kLanes + r]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[r][v] = fmadd(w, x[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(acc + r * acc_stride + 16 * v, sum[r][v]);
}

template <int kDType>
class LatentAttention : LatentRows<kDType> {
 public:
  LatentAttention(const LatentParams& params, const LatentJob& job, float* scratch)
      : Rows(params, job), layout_(params, rows_), width_(layout_.value_blocks * 16) {
    query_ = scratch + layout_.query;
    tile_ = scratch + layout_.tile;
    scores_ = scratch + layout_.scores;
    acc_ = scratch + layout_.acc;
    max_ = scratch + layout_.stats;
    sum_ = max_ + layout_.groups * kLanes;
    keep_ = sum_ + layout_.groups * kLanes;
  }

  void run() {
    for (int64_t g = 0; g < layout_.groups; ++g) start(g);
    for (int64_t i = 0; i < layout_.groups * kLanes * width_; i += 16) store(acc_ + i, zero_f32());
    const int64_t last = std::min(job_.key_end, high_of(rows_ - 1));
    for (int64_t key = job_.key_begin; key < last; key += kLatentTile) {
      const int64_t n = std::min(kLatentTile, last - key);
      for (int64_t g = 0; g < layout_.groups; ++g) tile_of_group(g, key, n);
    }
    for (int64_t r = 0; r < rows_; ++r) finish(r);
  }

  // see LatentKernels
  void merge(const float* from, int64_t begin, int64_t end) const { this->add_part(from, begin, end, width_); }
  void write_part(int64_t row) {
    const int64_t r = row - job_.row_begin;
    write(row, job_.partial + 2 * rows_ + r * width_, job_.partial[rows_ + r]);
  }

 private:
  using Rows = LatentRows<kDType>;
  using Rows::p_, Rows::job_, Rows::rows_, Rows::key_at, Rows::scale_at, Rows::high_of;
  static constexpr int kQuery = kQueryType<kDType>;

  // sixteen queries into the lanes, in units of log2
  void start(int64_t g) {
    const int64_t first = g * kLanes, n = std::min(kLanes, rows_ - first);
    store(max_ + first, set1(kMasked));
    store(sum_ + first, zero_f32());
    if (job_.follows) return;
    const int64_t at = (job_.token * p_.heads + job_.row_begin + first) * p_.dim;
    for (int64_t r = 0; r < n; r += kKeyBlock)
      for (int64_t b = 0; b < layout_.blocks;)
        b += load_blocks<kQuery, kPairs<kDType>>(element<kQuery>(p_.query, at + r * p_.dim), n - r, b, p_,
                                                 tile_ + r * 16);
    const F32x16 scale = set1(p_.scale * 1.44269504f);
    for (int64_t b = 0; b < layout_.blocks; ++b) {
      F32x16 x[16];
      for (int64_t i = 0; i < 16; ++i) x[i] = i < n ? mul(scale, load(tile_ + (b * kLatentTile + i) * 16)) : zero_f32();
      transpose(x);
      for (int64_t i = 0; i < 16; ++i) store(query_ + ((g * layout_.blocks + b) * 16 + i) * kLanes, x[i]);
    }
  }

  void tile_of_group(int64_t g, int64_t key, int64_t n) {
    const int64_t first = g * kLanes, rows = std::min(kLanes, rows_ - first);
    const float* query = query_ + g * layout_.blocks * 16 * kLanes;
    for (int64_t k = 0; k < n; k += kKeyBlock)
      score_keys<kDType>(p_, query, g == 0 ? key_at(key + k) : nullptr, kDType == 3 ? scale_at(key + k) : nullptr,
                         n - k, tile_ + k * 16, scores_ + k * kLanes);
    const bool all = high_of(first) >= key + n;
    if (!all) this->mask(scores_, first, key, n, n);
    soften(first, n);
    if (all) {
      for (int64_t r = first; r < first + rows; r += kRowBlock) values<kRowBlock>(r, r - first, n);
    } else {
      // row by row: a key that a row may not see might hold a NaN, and zero times that is one
      for (int64_t r = 0; r < rows; ++r) values<1>(first + r, r, std::clamp<int64_t>(high_of(first + r) - key, 0, n));
    }
  }

  // turns scores into weights; updates maximum, sum and what to keep of acc
  [[gnu::noinline]] void soften(int64_t first, int64_t n) {
    const F32x16 before = load(max_ + first);
    F32x16 now = before, total = zero_f32();
    for (int64_t j = 0; j < n; ++j) now = max(load(scores_ + j * kLanes), now);
    // with nothing visible yet every weight is 2^-inf = 0, whatever the base
    const F32x16 base = max(now, set1(-3.0e38f)), keep = exp2_weight(sub(before, base));
    for (int64_t j = 0; j < n; ++j) {
      const F32x16 w = exp2_weight(sub(load(scores_ + j * kLanes), base));
      store(scores_ + j * kLanes, w);
      total = add(total, w);
    }
    store(max_ + first, now);
    store(keep_ + first, keep);
    store(sum_ + first, fmadd(load(sum_ + first), keep, total));
  }

  template <int R>
  void values(int64_t r, int64_t lane, int64_t n) {
    float* acc = acc_ + r * width_;
    int64_t b = 0;
    for (; b + kVecBlock <= layout_.value_blocks; b += kVecBlock)
      add_latents<R, kVecBlock>(scores_ + lane, tile_ + b * 16 * kLatentTile, n, keep_ + r, acc + 16 * b, width_);
    for (; b < layout_.value_blocks; ++b)
      add_latents<R, 1>(scores_ + lane, tile_ + b * 16 * kLatentTile, n, keep_ + r, acc + 16 * b, width_);
  }

  void finish(int64_t r) {
    if (!job_.partial) return write(job_.row_begin + r, acc_ + r * width_, sum_[r]);
    this->keep_part(r, max_[r], sum_[r], acc_ + r * width_, width_);
  }

  void write(int64_t row, float* o, float sum) {
    if constexpr (kPairs<kDType>) {
      restore_order(o, p_.rank, tile_);
      o = tile_;
    }
    this->write_row(row, o, sum);
  }

  const LatentLayout layout_;
  const int64_t width_;
  float *query_, *tile_, *scores_, *acc_, *max_, *sum_, *keep_;
};

template <int kDType>
const LatentKernels& latent_kernels_of() {
  static const LatentKernels kernels = {
      kLatentTile,
      64,
      [](const LatentParams& p, int64_t rows) {
        const LatentLayout layout(p, rows);
        return LatentSizes{layout.total, rows * (layout.value_blocks * 16 + 2)};
      },
      [](const LatentParams& p, const LatentJob& job, float* scratch) {
        LatentAttention<kDType>(p, job, scratch).run();
      },
      [](const LatentParams& p, const LatentJob& job, const float* from, int64_t begin, int64_t end) {
        LatentAttention<kDType>(p, job, nullptr).merge(from, begin, end);
      },
      [](const LatentParams& p, const LatentJob& job, int64_t row, float* scratch) {
        LatentAttention<kDType>(p, job, scratch).write_part(row);
      }};
  return kernels;
}

inline const LatentKernels& latent_kernels_for(int dtype) {
  if (dtype == 0) return latent_kernels_of<0>();
  if (dtype == 1) return latent_kernels_of<1>();
  return dtype == 2 ? latent_kernels_of<2>() : latent_kernels_of<3>();
}

}  // namespace llmopt::LLMOPT_ISA
