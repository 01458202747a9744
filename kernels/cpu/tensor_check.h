// Checks of tensors that arrive over the ABI. A failed check raises ValueError naming the tensor, what was expected and
// what came, so that a bad call never becomes a bad memory access.
#pragma once
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/tvm_ffi.h>

#include <cstdint>
#include <initializer_list>
#include <string>

namespace llmopt {

using tvm::ffi::TensorView;

enum class DType : int { kF32, kBF16, kF16, kS8 };

inline int64_t bytes_of(DType dtype) { return dtype == DType::kF32 ? 4 : dtype == DType::kS8 ? 1 : 2; }

inline std::string shape_text(const TensorView& t) {
  std::string s = "[";
  for (int i = 0; i < t.ndim(); ++i) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + "]";
}

inline void check_cpu(const char* name, const TensorView& t) {
  if (t.device().device_type != kDLCPU) TVM_FFI_THROW(ValueError) << name << ": expected a CPU tensor";
}

// Shape check; -1 accepts any extent. The last dimension must be dense.
inline void check_shape(const char* name, const TensorView& t, std::initializer_list<int64_t> want) {
  bool ok = t.ndim() == static_cast<int>(want.size());
  int i = 0;
  if (ok) {
    for (int64_t w : want) {
      ok = ok && (w < 0 || t.size(i) == w);
      ++i;
    }
  }
  if (!ok) {
    std::string s = "[";
    i = 0;
    for (int64_t w : want) s += (i++ ? ", " : "") + (w < 0 ? std::string("*") : std::to_string(w));
    TVM_FFI_THROW(ValueError) << name << ": expected shape " << s << "], got " << shape_text(t);
  }
  if (t.numel() > 0 && t.ndim() > 0 && t.size(t.ndim() - 1) > 1 && t.stride(t.ndim() - 1) != 1) {
    TVM_FFI_THROW(ValueError) << name << ": expected a dense last dimension, got stride " << t.stride(t.ndim() - 1);
  }
}

inline void check_contiguous(const char* name, const TensorView& t) {
  if (!t.IsContiguous()) TVM_FFI_THROW(ValueError) << name << ": expected a contiguous tensor";
}

// A CPU tensor [..., n] as rows of n: two dimensions may have gaps between the rows, more (or one) have to be dense.
struct Rows {
  int64_t count, stride;
};
inline Rows rows_of(const char* name, const TensorView& t) {
  check_cpu(name, t);
  if (t.ndim() == 2) {
    check_shape(name, t, {-1, -1});
    return {t.size(0), t.stride(0)};
  }
  check_contiguous(name, t);
  int64_t count = 1;
  for (int i = 0; i + 1 < t.ndim(); ++i) count *= t.size(i);
  return {count, t.size(t.ndim() - 1)};
}

inline void check_bytes(const char* name, const TensorView& t) {
  if (t.dtype().code != kDLUInt || t.dtype().bits != 8) TVM_FFI_THROW(ValueError) << name << ": expected dtype uint8";
}

inline void check_i64(const char* name, const TensorView& t) {
  if (t.dtype().code != kDLInt || t.dtype().bits != 64) TVM_FFI_THROW(ValueError) << name << ": expected dtype int64";
}

inline DType float_dtype(const char* name, const TensorView& t) {
  const DLDataType d = t.dtype();
  if (d.code == kDLFloat && d.bits == 32) return DType::kF32;
  if (d.code == kDLBfloat && d.bits == 16) return DType::kBF16;
  if (d.code == kDLFloat && d.bits == 16) return DType::kF16;
  TVM_FFI_THROW(ValueError) << name << ": expected dtype float32, bfloat16 or float16";
  __builtin_unreachable();  // the throw sits in a temporary's destructor, which the compiler does not see through
}

inline void check_same_dtype(const char* name, const TensorView& t, const char* other_name, DType other) {
  if (float_dtype(name, t) != other) TVM_FFI_THROW(ValueError) << name << ": expected the dtype of " << other_name;
}

}  // namespace llmopt
