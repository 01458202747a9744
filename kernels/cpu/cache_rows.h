// The preallocated KV cache as ops see it, and the rows of tokens that write to it and read from it.
//
// Cache: [sequences, kv_heads, capacity, dim]; a head's tokens lie one after the other. In an int8 cache each head of a token
// has a scale of its own, [sequences, kv_heads, capacity], and queries and outputs are bfloat16. A row is one token: the
// sequence it belongs to, its slot in that sequence's cache, and the position its rotary embedding takes.
#pragma once
#include "program.h"
#include "tensor_check.h"

namespace llmopt {

struct CacheShape {
  int64_t sequences, kv_heads, capacity, dim;
  int64_t seq_stride, head_stride;  // elements
  DType dtype;
  float *k_scale, *v_scale;  // of an int8 cache, or null

  DType query_dtype() const { return dtype == DType::kS8 ? DType::kBF16 : dtype; }
};

inline bool is_s8(const TensorView& t) { return t.dtype().code == kDLInt && t.dtype().bits == 8; }

inline CacheShape cache_shape(const TensorView& k, const TensorView& v) {
  check_cpu("k", k), check_cpu("v", v);
  check_shape("k", k, {-1, -1, -1, -1});
  check_contiguous("k", k);
  check_shape("v", v, {k.size(0), k.size(1), k.size(2), k.size(3)});
  check_contiguous("v", v);
  const DType dtype = is_s8(k) ? DType::kS8 : float_dtype("k", k);
  if (is_s8(v) != is_s8(k)) TVM_FFI_THROW(ValueError) << "v: expected the dtype of k";
  if (!is_s8(k)) check_same_dtype("v", v, "k", dtype);
  return {k.size(0), k.size(1), k.size(2), k.size(3), k.size(1) * k.size(2) * k.size(3), k.size(2) * k.size(3),
          dtype,     nullptr,   nullptr};
}

inline const float* check_floats(const char* name, const TensorView& t, std::initializer_list<int64_t> shape) {
  check_cpu(name, t);
  check_shape(name, t, shape);
  if (float_dtype(name, t) != DType::kF32) TVM_FFI_THROW(ValueError) << name << ": expected dtype float32";
  return static_cast<const float*>(t.data_ptr());
}

// Queries and outputs beside a cache.
inline void check_query(const char* name, const TensorView& t, const CacheShape& cache, const char* beside = "k") {
  if (cache.dtype != DType::kS8) return check_same_dtype(name, t, beside, cache.dtype);
  if (float_dtype(name, t) != DType::kBF16)
    TVM_FFI_THROW(ValueError) << name << ": expected dtype bfloat16 beside an int8 cache";
}

// The scales of an int8 cache, which has to have them; no other may.
inline void add_scales(CacheShape& cache, const tvm::ffi::Optional<TensorView>& k_scale,
                       const tvm::ffi::Optional<TensorView>& v_scale) {
  const auto take = [&](const char* name, const tvm::ffi::Optional<TensorView>& t) -> float* {
    if (t.has_value() != (cache.dtype == DType::kS8))
      TVM_FFI_THROW(ValueError) << name << ": expected scales for an int8 cache, and for no other";
    if (!t.has_value()) return nullptr;
    const float* scales = check_floats(name, *t, {cache.sequences, cache.kv_heads, cache.capacity});
    check_contiguous(name, *t);
    return const_cast<float*>(scales);
  };
  cache.k_scale = take("k_scale", k_scale), cache.v_scale = take("v_scale", v_scale);
}

inline const int32_t* check_i32(const char* name, const TensorView& t, int64_t size) {
  check_cpu(name, t);
  check_shape(name, t, {size});
  if (t.dtype().code != kDLInt || t.dtype().bits != 32) TVM_FFI_THROW(ValueError) << name << ": expected dtype int32";
  return static_cast<const int32_t*>(t.data_ptr());
}

struct TokenRows {
  const int32_t *position, *seq, *slot;  // position may be null
};

// What is known now is checked now. In a program the values change from run to run, and whoever moves them on keeps them
// inside the cache.
inline void check_rows(const TokenRows& rows, int64_t count, int64_t positions, const CacheShape& cache) {
  if (recording()) return;
  const auto check = [](const char* name, int32_t got, int64_t end) {
    if (got < 0 || got >= end)
      TVM_FFI_THROW(IndexError) << name << ": expected values in [0, " << end << "), got " << got;
  };
  for (int64_t i = 0; i < count; ++i) {
    if (rows.position) check("position", rows.position[i], positions);
    check("seq", rows.seq[i], cache.sequences);
    check("slot", rows.slot[i], cache.capacity);
  }
}

// [sequences] first slot that each sequence's rows may see (what lies before it is padding), or null: all.
inline const int32_t* first_slots(const tvm::ffi::Optional<TensorView>& start, const TokenRows& rows, int64_t count,
                                  const CacheShape& cache) {
  if (!start.has_value()) return nullptr;
  const int32_t* first = check_i32("start", *start, cache.sequences);
  for (int64_t t = 0; !recording() && t < count; ++t)
    if (first[rows.seq[t]] < 0 || first[rows.seq[t]] > rows.slot[t])
      TVM_FFI_THROW(IndexError) << "start: expected values in [0, slot], got " << first[rows.seq[t]] << " for slot "
                                << rows.slot[t];
  return first;
}

}  // namespace llmopt
