// Attention over latents in bfloat16, whose products take pairs of terms.
//
// Sixteen queries (rows) make a group, and 128 keys a stretch, read from memory once and from L2 after that:
//   scores [keys, 16 rows] = keys x queries: keys as they lie, pairs of dimensions; queries copied or packed once
//   values [16 rows, rank] += weights x keys
// While a stretch is worked on, the next one is asked for, a few lines with every step: reading takes longer than the products.
#pragma once

#include "../../cpu/simd_bf16.h"
#include "latent_rows_kernel.h"

namespace llmopt::LLMOPT_ISA {

constexpr int64_t kStepKeys = 64;   // keys of one call of Product::scores
constexpr int64_t kPairKeys = 128;  // keys weighed at once: a stretch
constexpr int64_t kStretchSteps = kPairKeys / kStepKeys;
constexpr int64_t kAhead = 4;            // lines asked for at a time
constexpr int64_t kPanel = 16 * 16 * 2;  // elements of 16 pairs x 16 lanes

// Elements from the start of the scratch: floats first, then bfloat16.
struct PairsLayout {
  int64_t groups, depth, width;  // of queries and keys, of values: whole pairs of sixteens
  int64_t acc, stats, order, query, weights, copies, packed;
  int64_t total;  // floats

  PairsLayout(const LatentParams& p, int64_t rows, int64_t packed_width)
      : groups((rows + kLanes - 1) / kLanes), depth((p.dim + 31) / 32 * 32), width((p.rank + 31) / 32 * 32) {
    acc = kPairKeys * kLanes;  // scores come first
    stats = acc + groups * kLanes * width;
    order = stats + 3 * groups * kLanes;
    query = 2 * (order + width);
    weights = query + groups * kLanes * depth;
    copies = weights + kPairKeys / 16 * 4 * kPanel;  // the most that any Product needs
    packed = copies + kPairKeys * depth;
    total = (packed + kPairKeys * packed_width + 1) / 2;
  }
};

// Where the keys of a step lie, `stride` elements apart.
struct StepKeys {
  const uint16_t* at;
  int64_t stride;
};

// Product has, for the life of an object, what it needs of the processor, and
//   kQueryRows: whether scores() takes queries row by row rather than packed in pairs of neighbours, rows in lanes
//   kPacks: whether values() takes keys packed in pairs of neighbours rather than where they lie
//   kWeights: elements of 16 x 16 weights
//   scores(keys, query, steps, out, between): out[64 keys, 16] over 32 * steps dimensions
//   put_weights(x, y, out): two times 16 keys' weights, x[row] lane key
//   values<kAdd>(weights, keys or packed, count, width, acc, between): acc[16, width] (+)= weights x count keys
// and both products call between() now and then, to ask for what comes next.
template <class Product>
class LatentPairs : LatentRows<1> {
 public:
  LatentPairs(const LatentParams& params, const LatentJob& job, float* scratch)
      : LatentRows(params, job), layout_(sizes(params, rows_)), scores_(scratch), acc_(scratch + layout_.acc),
        max_(scratch + layout_.stats), sum_(max_ + layout_.groups * kLanes), keep_(sum_ + layout_.groups * kLanes),
        order_(scratch + layout_.order) {
    auto* halves = reinterpret_cast<uint16_t*>(scratch);
    query_ = halves + layout_.query, weights_ = halves + layout_.weights;
    copies_ = halves + layout_.copies, packed_ = halves + layout_.packed;
  }

  static PairsLayout sizes(const LatentParams& p, int64_t rows) {
    return {p, rows, Product::kPacks ? (p.rank + 31) / 32 * 32 : 0};
  }

  void run() {
    const int64_t last = std::min(job_.key_end, high_of(rows_ - 1));
    // the first stretch at once: the products would wait for every sixteen lines
    const void* second = key_at(std::min(last, job_.key_begin + kPairKeys));
    for (next_ = static_cast<const char*>(job_.follows ? second : key_at(job_.key_begin)); next_ < second;) ask();
    for (int64_t g = 0; g < layout_.groups; ++g) start(g);
    const Product product;
    for (int64_t key = job_.key_begin; key < last; key += kPairKeys)
      for (int64_t g = 0; g < layout_.groups; ++g) attend(product, g, key, std::min(kPairKeys, last - key));
    for (int64_t r = 0; r < rows_; ++r) finish(r, job_.key_begin < last);
  }

  // see LatentKernels
  void merge(const float* from, int64_t begin, int64_t end) const { add_part(from, begin, end, layout_.width); }
  void write_part(int64_t row) {
    const int64_t r = row - job_.row_begin;
    write(row, job_.partial + 2 * rows_ + r * layout_.width, job_.partial[rows_ + r]);
  }

 private:
  // sixteen queries, as they come or into lanes as pairs of dimensions; what is missing is zero
  void start(int64_t g) {
    const int64_t first = g * kLanes, n = std::min(kLanes, rows_ - first);
    store(max_ + first, set1(kMasked));
    store(sum_ + first, zero_f32());
    if (job_.follows) return;
    const auto* in = static_cast<const uint16_t*>(p_.query) + (job_.token * p_.heads + job_.row_begin + first) * p_.dim;
    uint16_t* out = query_ + first * layout_.depth;
    if constexpr (Product::kQueryRows) {
      std::fill(out, out + kLanes * layout_.depth, uint16_t{0});
      for (int64_t r = 0; r < n; ++r)
        std::memcpy(out + r * layout_.depth, in + r * p_.dim, static_cast<size_t>(p_.dim) * 2);
      return;
    }
    for (int64_t d = 0; d < layout_.depth; d += 32, out += kPanel) {
      const int count = static_cast<int>(std::min<int64_t>(32, p_.dim - d));
      F32x16 x[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) x[i] = i < n ? load_pairs_n(in + i * p_.dim + d, count) : zero_f32();
      transpose(x);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) store(reinterpret_cast<float*>(out) + 16 * i, x[i]);
    }
  }

  void attend(const Product& product, int64_t g, int64_t key, int64_t n) {
    const int64_t first = g * kLanes, padded = (n + 31) / 32 * 32;
    const auto ask_next = [&] {
      if (g == 0) ask();
    };
    if (g == 0) find(key, n);
    for (int64_t i = 0; i * kStepKeys < n; ++i)
      product.scores(keys_[i], query_ + first * layout_.depth, layout_.depth / 32, scores_ + i * kStepKeys * kLanes,
                     ask_next);
    if (n < padded || high_of(first) < key + n) mask(scores_, first, key, n, padded);
    soften(first, padded);
    float* acc = acc_ + first * layout_.width;
    if (key > job_.key_begin) rescale(first, acc);
    const auto values = [&](const auto& from) {
      if (key > job_.key_begin)
        return product.template values<true>(weights_, from, padded, layout_.width, acc, ask_next);
      product.template values<false>(weights_, from, padded, layout_.width, acc, ask_next);
    };
    if constexpr (Product::kPacks) {
      if (g == 0) pack(padded);
      values(packed_);
    } else {
      values(keys_);
    }
  }

  // the steps of a stretch of n keys; where rows are too few or too short, from copies with zeros around them
  void find(int64_t key, int64_t n) {
    for (int64_t i = 0; i * kStepKeys < n; ++i) {
      const int64_t left = n - i * kStepKeys;
      keys_[i] = {static_cast<const uint16_t*>(key_at(key + i * kStepKeys)), p_.dim};
      if (left < kStepKeys || layout_.depth != p_.dim) keys_[i] = copied(i, keys_[i].at, std::min(left, kStepKeys));
    }
    next_ = static_cast<const char*>(key_at(key + n));
  }

  StepKeys copied(int64_t step, const uint16_t* in, int64_t n) {
    uint16_t* out = copies_ + step * kStepKeys * layout_.depth;
    for (int64_t j = 0; j < kStepKeys; ++j)
      for (int64_t d = 0; d < layout_.depth; d += 32) {
        const int count = j < n ? static_cast<int>(std::min<int64_t>(32, p_.dim - d)) : 0;
        store(reinterpret_cast<float*>(out + j * layout_.depth + d), load_pairs_n(in + j * p_.dim + d, count));
      }
    return {out, layout_.depth};
  }

  void ask() {
    for (int64_t i = 0; i < kAhead; ++i) __builtin_prefetch(next_ + 64 * i, 0, 2);
    next_ += 64 * kAhead;
  }

  // panels of 16 dimensions, the even ones of 32 and then the odd ones: packed[key / 32][panel][key / 2 % 16][16][2]
  void pack(int64_t n) {
    for (int64_t j = 0; j < n; j += 2) {
      const StepKeys& keys = keys_[j / kStepKeys];
      const uint16_t* in = keys.at + j % kStepKeys * keys.stride;
      uint16_t* out = packed_ + j / 32 * 32 * layout_.width + j % 32 * 16;
      for (int64_t d = 0; d < layout_.width; d += 32, out += 2 * kPanel) {
        F32x16 even, odd;
        pair_up(load_bits<1>(in, d), load_bits<1>(in, d + keys.stride), even, odd);
        store(reinterpret_cast<float*>(out), even);
        store(reinterpret_cast<float*>(out + kPanel), odd);
      }
    }
  }

  // turns the scores of n keys into weights; updates maximum, sum and what to keep of acc
  [[gnu::noinline]] void soften(int64_t first, int64_t n) {
    const F32x16 scale = set1(p_.scale * 1.44269504f), before = load(max_ + first);
    F32x16 now = before, total = zero_f32();
    for (int64_t j = 0; j < n; ++j) now = max(mul(load(scores_ + j * kLanes), scale), now);
    // with nothing visible yet every weight is 2^-inf = 0, whatever the base
    const F32x16 base = max(now, set1(-3.0e38f)), keep = exp2_weight(sub(before, base));
    uint16_t* out = weights_;
    for (int64_t j = 0; j < n; j += 32) {
      F32x16 x[2][16];
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          x[h][i] = exp2_weight(sub(mul(load(scores_ + (j + 16 * h + i) * kLanes), scale), base));
          total = add(total, x[h][i]);
        }
        transpose(x[h]);
      }
      Product::put_weights(x[0], x[1], out);
      out += 2 * Product::kWeights;
    }
    store(max_ + first, now);
    store(keep_ + first, keep);
    store(sum_ + first, fmadd(load(sum_ + first), keep, total));
  }

  void rescale(int64_t first, float* acc) const {
    for (int64_t r = 0; r < kLanes; ++r, acc += layout_.width) {
      if (keep_[first + r] == 1.0f) continue;
      const F32x16 keep = set1(keep_[first + r]);
      for (int64_t d = 0; d < layout_.width; d += 16) store(acc + d, mul(load(acc + d), keep));
    }
  }

  void finish(int64_t r, bool any) {
    float* acc = acc_ + r * layout_.width;
    if (!any) std::fill(acc, acc + layout_.width, 0.0f);
    if (!job_.partial) return write(job_.row_begin + r, acc, sum_[r]);
    keep_part(r, max_[r], sum_[r], acc, layout_.width);
  }

  void write(int64_t row, const float* o, float sum) {
    restore_order(o, layout_.width, order_);
    I32x16 bits = abs_bits(set1(sum));
    for (int64_t d = 0; d < p_.rank; d += 16)
      bits = max(bits, abs_bits(load_n(order_ + d, static_cast<int>(std::min<int64_t>(16, p_.rank - d)))));
    // 0 * NaN: what the row may not see has leaked in, or what it may see is not finite; the slow way tells
    if (reduce_max(bits) >= 0x7f800000) sum = exact_row(row, order_);
    write_row(row, order_, sum);
  }

  // a row again, from the keys it may see alone
  float exact_row(int64_t row, float* o) const {
    const auto* q = static_cast<const uint16_t*>(p_.query) + (job_.token * p_.heads + row) * p_.dim;
    const int64_t end = high_of(row - job_.row_begin);
    const auto score = [&](int64_t key) {
      F32x16 sum = zero_f32();
      for (int64_t d = 0; d < p_.dim; d += 16) {
        const int n = static_cast<int>(std::min<int64_t>(16, p_.dim - d));
        sum = fmadd(load_as_n<1>(q, d, n), load_as_n<1>(key_at(key), d, n), sum);
      }
      return reduce_add(sum) * p_.scale * 1.44269504f;
    };
    float top = kMasked, sum = 0.0f;
    for (int64_t key = job_.key_begin; key < end; ++key) top = std::max(top, score(key));
    std::fill(o, o + layout_.width, 0.0f);
    for (int64_t key = job_.key_begin; key < end; ++key) {
      const float weight = exp2_weight(score(key) - (top == kMasked ? 0.0f : top));
      sum += weight;
      for (int64_t d = 0; d < p_.rank; d += 16) {
        const int n = static_cast<int>(std::min<int64_t>(16, p_.rank - d));
        store_n(o + d, fmadd(set1(weight), load_as_n<1>(key_at(key), d, n), load_n(o + d, n)), n);
      }
    }
    return sum;
  }

  const PairsLayout layout_;
  float *const scores_, *const acc_, *const max_, *const sum_, *const keep_, *const order_;
  uint16_t *query_, *weights_, *copies_, *packed_;
  StepKeys keys_[kStretchSteps];
  const char* next_ = nullptr;  // what to ask for
};

template <class Product>
const LatentKernels& latent_pairs_kernels() {
  static const LatentKernels kernels = {
      kStepKeys,
      kPairKeys,
      [](const LatentParams& p, int64_t rows) {
        const PairsLayout layout = LatentPairs<Product>::sizes(p, rows);
        return LatentSizes{layout.total, rows * (layout.width + 2)};
      },
      [](const LatentParams& p, const LatentJob& job, float* scratch) { LatentPairs<Product>(p, job, scratch).run(); },
      [](const LatentParams& p, const LatentJob& job, const float* from, int64_t begin, int64_t end) {
        LatentPairs<Product>(p, job, nullptr).merge(from, begin, end);
      },
      [](const LatentParams& p, const LatentJob& job, int64_t row, float* scratch) {
        LatentPairs<Product>(p, job, scratch).write_part(row);
      }};
  return kernels;
}

}  // namespace llmopt::LLMOPT_ISA
