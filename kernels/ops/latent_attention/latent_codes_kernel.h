// Attention over int8 latents, whose products are of bytes (vpdpbusd); that of the rotary parts is of bfloat16.
//
// Sixteen queries (rows) make a group, and 128 keys a stretch, as in latent_pairs_kernel.h:
//   scores [keys, 16 rows]: queries become int8 too, with a scale a row; a sum of products of codes is exact
//   values [16 rows, rank] += weights x keys: a weight times its key's scale becomes one of 255 parts of the largest of its row
//     in the stretch (SageAttention, arXiv 2410.02367, keeps weights of 8 bits likewise); keys are packed in fours
// Sums of products are of a stretch, and then go into float32.
#pragma once

#include "../../cpu/simd_bf16.h"
#include "latent_rows_kernel.h"

namespace llmopt::avx512 {

constexpr int64_t kStretch = 128;

// Offsets in the scratch, bytes.
struct CodesLayout {
  int64_t groups, depth, rope;  // groups of queries; dimensions up to whole vectors of codes and of bfloat16
  int64_t scores, acc, stats, query, query_rope, weights, packed, keys, keys_rope, order, total;

  CodesLayout(const LatentParams& p, int64_t rows)
      : groups((rows + kLanes - 1) / kLanes), depth((p.rank + 63) / 64 * 64), rope((p.dim - p.rank + 31) / 32 * 32) {
    const int64_t all = groups * kLanes;
    scores = 0;
    acc = scores + kStretch * kLanes * 4;
    stats = acc + all * depth * 4;
    query = stats + (4 * all + 2 * kLanes + kStretch) * 4;
    query_rope = query + all * depth;
    weights = query_rope + all * rope * 2;
    packed = weights + kLanes * kStretch;
    keys = packed + kStretch * depth;
    keys_rope = keys + kStretch * depth;
    order = keys_rope + kStretch * rope * 2;
    total = order + depth * 4;
  }
};

// acc[lane] += sum over the lane's four bytes of a (unsigned) * b (signed); not the intrinsic, see dot_u4
inline void dot_bytes(__m512i& acc, __m512i a, __m512i b) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
}
// of four vectors: lane 4 * q + i is the sum of x[i]'s q-th quarter
inline __m512i sum_quarters(const __m512i* x) {
  const auto pairs = [](__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  };
  const __m512i a = pairs(x[0], x[1]), b = pairs(x[2], x[3]);
  return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}
inline F32x16 sum_quarters(const F32x16* x) {
  const auto pairs = [](__m512 a, __m512 b) {
    return _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
  };
  const __m512d a = pairs(x[0].v, x[1].v), b = pairs(x[2].v, x[3].v);
  return {_mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)))};
}
inline __m512i load_sixteen(const void* p) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
inline __m512i load_bytes(const void* p) { return _mm512_loadu_si512(p); }

class LatentCodes : LatentRows<3> {
 public:
  LatentCodes(const LatentParams& params, const LatentJob& job, float* scratch)
      : LatentRows(params, job), layout_(params, rows_), base_(reinterpret_cast<char*>(scratch)) {
    const int64_t all = layout_.groups * kLanes;
    scores_ = at<float>(layout_.scores), acc_ = at<float>(layout_.acc), max_ = at<float>(layout_.stats);
    sum_ = max_ + all, query_scale_ = sum_ + all, offset_ = reinterpret_cast<int32_t*>(query_scale_ + all);
    keep_ = query_scale_ + 2 * all, unit_ = keep_ + kLanes, key_scale_ = unit_ + kLanes;
    query_ = at<int8_t>(layout_.query), query_rope_ = at<int8_t>(layout_.query_rope);
    weights_ = at<uint8_t>(layout_.weights), packed_ = at<int8_t>(layout_.packed);
  }

  void run() {
    const int64_t last = std::min(job_.key_end, high_of(rows_ - 1));
    // the first stretch at once: the products would wait for every few lines
    const void* second = key_at(std::min(last, job_.key_begin + kStretch));
    for (next_ = static_cast<const char*>(job_.follows ? second : key_at(job_.key_begin)); next_ < second;) ask(1);
    for (int64_t g = 0; g < layout_.groups; ++g) start(g);
    for (int64_t key = job_.key_begin; key < last; key += kStretch)
      for (int64_t g = 0; g < layout_.groups; ++g) attend(g, key, std::min(kStretch, last - key));
    for (int64_t r = 0; r < rows_; ++r) finish(r, job_.key_begin < last);
  }

  // see LatentKernels
  void merge(const float* from, int64_t begin, int64_t end) const { add_part(from, begin, end, layout_.depth); }
  void write_part(int64_t row) {
    const int64_t r = row - job_.row_begin;
    write(row, job_.partial + 2 * rows_ + r * layout_.depth, job_.partial[rows_ + r]);
  }

 private:
  template <class T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(base_ + offset);
  }

  void start(int64_t g) {
    const int64_t first = g * kLanes;
    store(max_ + first, set1(kMasked));
    store(sum_ + first, zero_f32());
    if (job_.follows) return;
    const auto* in = static_cast<const uint16_t*>(p_.query) + (job_.token * p_.heads + job_.row_begin + first) * p_.dim;
    for (int64_t r = first; r < first + kLanes; ++r, in += p_.dim) start_row(r, r < rows_ ? in : nullptr);
  }

  // One query, or zeros: codes, and the rotary part in units of their scale. Sixteen bytes of four rows, four apart, make a
  // vector, so that a sum over a quarter of it is of one row. Keys go into the products as code + 128, and what that adds is the
  // same for all of them.
  void start_row(int64_t r, const uint16_t* in) {
    const int64_t group = r / kLanes * kLanes, place = r % 4 * 64 + r % kLanes / 4 * 16;
    int8_t* codes = query_ + group * layout_.depth + place;
    int8_t* rope = query_rope_ + group * layout_.rope * 2 + place;
    query_scale_[r] = 1.0f, offset_[r] = 0;
    const auto load_n_of = [&](int64_t d, int64_t end) {
      return d < end && in ? load_bf16_n(in + d, static_cast<int>(std::min<int64_t>(16, end - d))) : zero_f32();
    };
    I32x16 bits = zero_i32(), sum = zero_i32();
    for (int64_t d = 0; d < p_.rank; d += 16) bits = max(bits, abs_bits(load_n_of(d, p_.rank)));
    const int32_t top_bits = reduce_max(bits);
    float top;
    std::memcpy(&top, &top_bits, 4);
    if (!(top < 1e-30f)) query_scale_[r] = top / 127.0f + (top - top);  // NaN of infinity
    const F32x16 inverse = set1(1.0f / query_scale_[r]);
    for (int64_t d = 0; d < layout_.depth; d += 16)
      sum = add(sum, store_s8(codes + d * kLanes, mul(load_n_of(d, p_.rank), inverse)));
    for (int64_t d = 0; d < layout_.rope; d += 16) {
      uint16_t pair[16];
      store_bf16_n(pair, mul(load_n_of(p_.rank + d, p_.dim), inverse), 16);
      std::memcpy(rope + d * 2 * kLanes, pair, 16), std::memcpy(rope + d * 2 * kLanes + 256, pair + 8, 16);
    }
    offset_[r] = static_cast<int32_t>(-128u * static_cast<uint32_t>(reduce_add(sum)));
  }

  void attend(int64_t g, int64_t key, int64_t n) {
    const int64_t first = g * kLanes, padded = (n + 31) / 32 * 32;
    if (g == 0) find(key, n, padded);
    for (int64_t k = 0; k < padded; k += 4) {
      score(g == 0, first, k);
      if (g == 0) pack(k);
    }
    if (n < padded || high_of(first) < key + n) mask(scores_, first, key, n, padded);
    soften(first, padded);
    put_weights(padded);
    for (int64_t d = 0; d < layout_.depth; d += 64)
      for (int64_t r = 0; r < kLanes; r += 4) add_values(g == 0, key == job_.key_begin, first + r, r, d, padded);
  }

  // where the keys of a stretch lie: a copy with zeros around it where they are too few or their rows too short
  void find(int64_t key, int64_t n, int64_t padded) {
    codes_ = static_cast<const int8_t*>(key_at(key)), rope_ = codes_ + p_.rank;
    stride_ = rope_stride_ = p_.row;
    next_ = reinterpret_cast<const char*>(codes_ + n * p_.row);
    const float* scales = scale_at(key);
    for (int64_t k = 0; k < padded; k += 16) {
      const F32x16 scale = load_n(scales + k, static_cast<int>(std::clamp<int64_t>(n - k, 0, 16)));
      store(key_scale_ + k, add(scale, sub(scale, scale)));  // infinity becomes NaN: times 0 it would not tell
    }
    if (n < padded || layout_.depth != p_.rank || layout_.rope != p_.dim - p_.rank) copy(n, padded);
  }

  void copy(int64_t n, int64_t padded) {
    auto *codes = at<int8_t>(layout_.keys), *rope = at<int8_t>(layout_.keys_rope);
    const int64_t rope_bytes = 2 * layout_.rope, in_bytes = 2 * (p_.dim - p_.rank);
    std::memset(codes, 0, static_cast<size_t>(padded * layout_.depth));
    std::memset(rope, 0, static_cast<size_t>(padded * rope_bytes));
    for (int64_t k = 0; k < n; ++k) {
      std::memcpy(codes + k * layout_.depth, codes_ + k * p_.row, static_cast<size_t>(p_.rank));
      std::memcpy(rope + k * rope_bytes, rope_ + k * p_.row, static_cast<size_t>(in_bytes));
    }
    codes_ = codes, stride_ = layout_.depth, rope_ = rope, rope_stride_ = rope_bytes;
  }

  void ask(int64_t lines) {
    for (int64_t i = 0; i < lines; ++i, next_ += 64) __builtin_prefetch(next_, 0, 2);
  }

  // scores_[key][row] of four keys and the rows of a group
  [[gnu::always_inline]] void score(bool asks, int64_t first, int64_t key) {
    const int8_t *x = query_ + first * layout_.depth, *y = codes_ + key * stride_;
    const __m512i flip = _mm512_set1_epi8(-128);
    __m512i dots[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) dots[i] = _mm512_setzero_si512();
    for (int64_t d = 0; d < layout_.depth; d += 16, x += 256) {
      if (asks) {
        ask(1);
        __builtin_prefetch(y + 4 * (stride_ + d), 0, 3);  // most of the next four keys, which are in L2
      }
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const __m512i k = _mm512_xor_si512(load_sixteen(y + j * stride_ + d), flip);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) dot_bytes(dots[4 * j + i], k, load_bytes(x + 64 * i));
      }
    }
    F32x16 sum[16];
    float* out = scores_ + key * kLanes;
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512i all = _mm512_add_epi32(sum_quarters(dots + 4 * j), load_bytes(offset_ + first));
      store(out + j * kLanes, mul(to_f32({all}), set1(key_scale_[key + j])));
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) sum[i] = zero_f32();
    x = query_rope_ + first * layout_.rope * 2, y = rope_ + key * rope_stride_;
    for (int64_t d = 0; d < layout_.rope * 2; d += 16, x += 256) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const F32x16 k = {_mm512_castsi512_ps(load_sixteen(y + j * rope_stride_ + d))};
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
          sum[4 * j + i] = dot_bf16(sum[4 * j + i], k, {_mm512_castsi512_ps(load_bytes(x + 64 * i))});
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) store(out + j * kLanes, add(load(out + j * kLanes), sum_quarters(sum + 4 * j)));
  }

  // Turns the scores of n keys into weights times the keys' scales; updates maximum and sum, and finds what to keep of acc and
  // the unit of the weights to come. A key that a row does not see counts as 0, whatever its scale.
  [[gnu::noinline]] void soften(int64_t first, int64_t n) {
    const F32x16 scale = mul(load(query_scale_ + first), set1(p_.scale * 1.44269504f)), before = load(max_ + first);
    F32x16 now = before, total = zero_f32(), top = zero_f32();
    for (int64_t j = 0; j < n; ++j) now = max(mul(load(scores_ + j * kLanes), scale), now);
    // with nothing visible yet every weight is 2^-inf = 0, whatever the base
    const F32x16 base = max(now, set1(-3.0e38f)), keep = exp2_weight(sub(before, base));
    for (int64_t j = 0; j < n; ++j) {
      const F32x16 w = exp2_weight(sub(mul(load(scores_ + j * kLanes), scale), base));
      total = add(total, w);
      const __mmask16 seen = _mm512_cmp_ps_mask(w.v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
      const F32x16 scaled = {_mm512_maskz_mul_ps(seen, w.v, set1(key_scale_[j]).v)};
      store(scores_ + j * kLanes, scaled);
      top = max(scaled, top);
    }
    store(max_ + first, now);
    store(keep_, keep);
    store(unit_, mul(top, set1(1.0f / 255.0f)));
    store(sum_ + first, fmadd(load(sum_ + first), keep, total));
  }

  // [16 rows][keys], unsigned bytes
  [[gnu::noinline]] void put_weights(int64_t n) {
    const __m512 unit = load(unit_).v;
    const F32x16 inverse = {
        _mm512_maskz_div_ps(_mm512_cmp_ps_mask(unit, _mm512_setzero_ps(), _CMP_GT_OQ), _mm512_set1_ps(1.0f), unit)};
    for (int64_t j = 0; j < n; j += 16) {
      F32x16 x[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) x[i] = mul(load(scores_ + (j + i) * kLanes), inverse);
      transpose(x);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(weights_ + i * kStretch + j),
                         _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(x[i].v)));
    }
  }

  // Keys in fours, a byte of each in a lane: packed[dimension / 64][key / 4][4][16 lanes][4]. Of 64 dimensions the vectors have
  // those that write() expects.
  [[gnu::always_inline]] void pack(int64_t key) {
    const int8_t* in = codes_ + key * stride_;
    int8_t* out = packed_ + key * 64;
    for (int64_t d = 0; d < layout_.depth; d += 64, out += 64 * kStretch) {
      const __m512i a = load_bytes(in + d), b = load_bytes(in + stride_ + d);
      const __m512i c = load_bytes(in + 2 * stride_ + d), e = load_bytes(in + 3 * stride_ + d);
      const __m512i ab_low = _mm512_unpacklo_epi8(a, b), ab_high = _mm512_unpackhi_epi8(a, b);
      const __m512i ce_low = _mm512_unpacklo_epi8(c, e), ce_high = _mm512_unpackhi_epi8(c, e);
      _mm512_storeu_si512(out, _mm512_unpacklo_epi16(ab_low, ce_low));
      _mm512_storeu_si512(out + 64, _mm512_unpackhi_epi16(ab_low, ce_low));
      _mm512_storeu_si512(out + 128, _mm512_unpacklo_epi16(ab_high, ce_high));
      _mm512_storeu_si512(out + 192, _mm512_unpackhi_epi16(ab_high, ce_high));
    }
  }

  // acc of four rows and 64 dimensions
  [[gnu::always_inline]] void add_values(bool asks, bool fresh, int64_t row, int64_t lane, int64_t d, int64_t n) {
    const int8_t* in = packed_ + d * kStretch;
    __m512i dots[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) dots[i] = _mm512_setzero_si512();
    if (asks) ask(8);
    for (int64_t j = 0; j < n; j += 4, in += 256) {
      __m512i x[4];
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) x[v] = load_bytes(in + 64 * v);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        int32_t four;
        std::memcpy(&four, weights_ + (lane + i) * kStretch + j, 4);
        const __m512i w = _mm512_set1_epi32(four);
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) dot_bytes(dots[4 * i + v], w, x[v]);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      float* out = acc_ + (row + i) * layout_.depth + d;
      const F32x16 unit = set1(unit_[lane + i]), keep = set1(keep_[lane + i]);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const F32x16 before = fresh ? zero_f32() : mul(keep, load(out + 16 * v));
        store(out + 16 * v, fmadd(unit, to_f32({dots[4 * i + v]}), before));
      }
    }
  }

  void finish(int64_t r, bool any) {
    float* acc = acc_ + r * layout_.depth;
    if (!any) std::fill(acc, acc + layout_.depth, 0.0f);
    if (!job_.partial) return write(job_.row_begin + r, acc, sum_[r]);
    keep_part(r, max_[r], sum_[r], acc, layout_.depth);
  }

  // vector v of 64 dimensions has four of every sixteen
  void write(int64_t row, const float* o, float sum) const {
    float* order = at<float>(layout_.order);
    for (int64_t d = 0; d < layout_.depth; d += 64)
      for (int64_t v = 0; v < 4; ++v)
        for (int64_t q = 0; q < 4; ++q) std::memcpy(order + d + 16 * q + 4 * v, o + d + 16 * v + 4 * q, 16);
    write_row(row, order, sum);
  }

  const CodesLayout layout_;
  char* const base_;
  float *scores_, *acc_, *max_, *sum_, *query_scale_, *keep_, *unit_, *key_scale_;
  int32_t* offset_;
  int8_t *query_, *query_rope_;
  uint8_t* weights_;
  int8_t* packed_;
  // keys of the stretch at hand
  const int8_t *codes_ = nullptr, *rope_ = nullptr;
  int64_t stride_ = 0, rope_stride_ = 0;  // bytes
  const char* next_ = nullptr;            // what to ask for
};

}  // namespace llmopt::avx512
