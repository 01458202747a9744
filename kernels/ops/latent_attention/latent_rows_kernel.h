// The rows of one job, whatever loops they go through: where keys lie, what a row may see, how results are put together.
#pragma once

#include <algorithm>
#include <cstring>

#include "../attention/attention_math.h"
#include "latent_attention.h"

namespace llmopt::LLMOPT_ISA {

template <int kDType>
class LatentRows {
 protected:
  LatentRows(const LatentParams& params, const LatentJob& job)
      : p_(params), job_(job), rows_(job.row_end - job.row_begin) {}

  const void* key_at(int64_t key) const { return element<kDType>(p_.cache, job_.seq * p_.seq_stride + key * p_.row); }
  // of an int8 cache
  const float* scale_at(int64_t key) const { return p_.scales + job_.seq * p_.scale_stride + key; }
  // one past the last key that row r of the job may see
  int64_t high_of(int64_t r) const { return job_.slot + (job_.row_begin + r) / p_.heads + 1; }

  // scores [n keys, 16 rows] from row `first` on: of keys that a row may not see, and of those up to `padded`
  void mask(float* scores, int64_t first, int64_t key, int64_t n, int64_t padded) const {
    for (int64_t j = n; j < padded; ++j) store(scores + j * kLanes, set1(kMasked));
    for (int64_t r = 0; r < std::min(kLanes, rows_ - first); ++r)
      for (int64_t j = std::max<int64_t>(0, high_of(first + r) - key); j < n; ++j) scores[j * kLanes + r] = kMasked;
  }

  void keep_part(int64_t r, float top, float sum, const float* acc, int64_t width) const {
    job_.partial[r] = top;
    job_.partial[rows_ + r] = sum;
    std::memcpy(job_.partial + 2 * rows_ + r * width, acc, static_cast<size_t>(width) * sizeof(float));
  }

  // the job's part takes in another one, of the same rows
  void add_part(const float* from, int64_t begin, int64_t end, int64_t width) const {
    float* into = job_.partial;
    for (int64_t r = begin; r < end; ++r) {
      // a part in which the row saw nothing; one that saw NaN has no largest score either, but a sum
      if (from[r] == kMasked && from[rows_ + r] == 0.0f) continue;
      const float top = std::max(into[r], from[r]);
      const float kept = into[r] == kMasked ? 0.0f : exp2_weight(into[r] - top), added = exp2_weight(from[r] - top);
      into[r] = top;
      into[rows_ + r] = kept * into[rows_ + r] + added * from[rows_ + r];
      float* acc = into + 2 * rows_ + r * width;
      const float* more = from + 2 * rows_ + r * width;
      for (int64_t d = 0; d < width; d += 16)
        store(acc + d, fmadd(set1(added), load(more + d), mul(set1(kept), load(acc + d))));
    }
  }

  void write_row(int64_t row, const float* o, float sum) const {
    const F32x16 inverse = set1(sum == 0.0f ? 0.0f : 1.0f / sum);
    float* out = p_.out + (job_.token * p_.heads + row) * p_.rank;
    for (int64_t d = 0; d < p_.rank; d += 16)
      store_n(out + d, mul(load(o + d), inverse), static_cast<int>(std::min<int64_t>(16, p_.rank - d)));
  }

  const LatentParams& p_;
  const LatentJob& job_;
  const int64_t rows_;
};

}  // namespace llmopt::LLMOPT_ISA
