// The latent cache of one layer of multi-head latent attention, [sequences, capacity, rank + rope], as ops see it.
#pragma once
#include "cache_rows.h"

namespace llmopt {

// One "head" shared by all query heads: kv_heads is 1.
inline CacheShape latent_cache_shape(const TensorView& cache) {
  check_cpu("cache", cache);
  check_shape("cache", cache, {-1, -1, -1});
  check_contiguous("cache", cache);
  const int64_t stride = cache.size(1) * cache.size(2);
  return {cache.size(0), 1,      cache.size(1), cache.size(2), stride, stride, float_dtype("cache", cache),
          nullptr,       nullptr};
}

}  // namespace llmopt
