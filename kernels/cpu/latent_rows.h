// The latent cache of one layer of multi-head latent attention, [sequences, capacity, rank + rope], as ops see it.
//
// In int8 a row is `rank` codes, and behind them the rotary key in bfloat16: [sequences, capacity, rank + 2 * rope] bytes. A
// token's codes have a scale of their own, [sequences, capacity]; queries are bfloat16.
#pragma once
#include "cache_rows.h"

namespace llmopt {

// Elements of the rotary key, where the rank is known.
inline int64_t latent_rope(const TensorView& cache, int64_t rank) {
  check_shape("cache", cache, {-1, -1, -1});
  const int64_t rest = cache.size(2) - rank, size = is_s8(cache) ? 2 : 1;
  if (rank < 1 || rest < 0) TVM_FFI_THROW(ValueError) << "rank: expected 1 to " << cache.size(2) << ", got " << rank;
  if (rest % size) TVM_FFI_THROW(ValueError) << "rank: expected whole bfloat16 behind it, got " << rest << " bytes";
  return rest / size;
}

// One "head" shared by all query heads: kv_heads is 1, dim is rank + rope, and the scales are the keys'.
inline CacheShape latent_cache_shape(const TensorView& cache, const tvm::ffi::Optional<TensorView>& scale,
                                     int64_t rope) {
  check_cpu("cache", cache);
  check_shape("cache", cache, {-1, -1, -1});
  check_contiguous("cache", cache);
  const bool codes = is_s8(cache);
  const int64_t sequences = cache.size(0), capacity = cache.size(1), row = cache.size(2);
  const int64_t dim = codes ? row - rope : row;
  if (dim <= rope)
    TVM_FFI_THROW(ValueError) << "cache: expected more than " << row - dim + rope << " columns, got " << row;
  if (codes && row % 2) TVM_FFI_THROW(ValueError) << "cache: expected an even number of bytes a row, got " << row;
  if (scale.has_value() != codes)
    TVM_FFI_THROW(ValueError) << "latent_scale: expected scales for an int8 cache, and for no other";
  float* scales = nullptr;
  if (codes) {
    scales = const_cast<float*>(check_floats("latent_scale", *scale, {sequences, capacity}));
    check_contiguous("latent_scale", *scale);
  }
  const DType dtype = codes ? DType::kS8 : float_dtype("cache", cache);
  return {sequences, 1, capacity, dim, capacity * row, capacity * row, dtype, scales, nullptr};
}

}  // namespace llmopt
