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

  const void* key_at(int64_t key) const { return element<kDType>(p_.cache, job_.seq * p_.seq_stride + key * p_.dim); }
  // one past the last key that row r of the job may see
  int64_t high_of(int64_t r) const { return job_.slot + (job_.row_begin + r) / p_.heads + 1; }

  void keep_part(int64_t r, float top, float sum, const float* acc, int64_t width) const {
    job_.partial[r] = top;
    job_.partial[rows_ + r] = sum;
    std::memcpy(job_.partial + 2 * rows_ + r * width, acc, static_cast<size_t>(width) * sizeof(float));
  }

  // output row `row` of the run from `count` parts: its values, times the sum that is returned
  float add_parts(int64_t count, int64_t stride, int64_t row, int64_t width, float* acc) const {
    const int64_t r = row - job_.row_begin;
    const auto part = [&](int64_t i) { return job_.partial + i * stride; };
    float top = kMasked, sum = 0.0f;
    for (int64_t i = 0; i < count; ++i) top = std::max(top, part(i)[r]);
    const float base = top == kMasked ? 0.0f : top;
    for (int64_t d = 0; d < width; d += 16) store(acc + d, zero_f32());
    for (int64_t i = 0; i < count; ++i) {
      // a part in which the row saw nothing
      if (part(i)[r] == kMasked) continue;
      const float weight = exp2_weight(part(i)[r] - base);
      sum += weight * part(i)[rows_ + r];
      const float* in = part(i) + 2 * rows_ + r * width;
      for (int64_t d = 0; d < width; d += 16) store(acc + d, fmadd(set1(weight), load(in + d), load(acc + d)));
    }
    return sum;
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
