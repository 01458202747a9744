// Checks and threads of the quantized linear, shared by the ops that use it.
#pragma once

#include <tvm/ffi/extra/c_env_api.h>

#include <vector>

#include "quant_linear.h"
#include "scratch.h"
#include "tensor_check.h"
#include "threads.h"

namespace llmopt {

// Tokens up to which every thread quantizes all activations for itself: it costs less than a barrier.
constexpr int64_t kOwnQuantize = 8;
// Bytes of weights below which a second thread is not worth waking.
constexpr int64_t kBytesPerThread = 16 * 1024;

inline QuantWeight quant_weight(const char* name, const TensorView& packed, int64_t rows, int64_t cols, int64_t group,
                                int bits, bool asymmetric) {
  if (group != 32 && group != 64 && group != 128)
    TVM_FFI_THROW(ValueError) << "group_size: expected 32, 64 or 128, got " << group;
  if (rows <= 0 || cols <= 0)
    TVM_FFI_THROW(ValueError) << name << ": expected positive sizes, got " << rows << " x " << cols;
  check_cpu(name, packed);
  check_bytes(name, packed);
  check_contiguous(name, packed);
  return {static_cast<const uint8_t*>(packed.data_ptr()), rows, cols, static_cast<int>(group), bits, asymmetric};
}

inline QuantTokens token_buffers(Scratch& scratch, const QuantWeight& w, int64_t tokens) {
  const size_t q_bytes = (static_cast<size_t>(tokens * w.padded_cols()) + 63) / 64 * 64;
  const size_t count = static_cast<size_t>(tokens * w.num_groups());
  unsigned char* base = scratch.get(q_bytes + count * 8);
  auto* scales = reinterpret_cast<float*>(base + q_bytes);
  return {reinterpret_cast<int8_t*>(base), scales, reinterpret_cast<int32_t*>(scales + count), w.padded_cols(),
          w.num_groups()};
}

inline void run_linear(const QuantWeight& w, const void* x, int dtype, int64_t stride, int64_t tokens,
                       const Output& y) {
  static thread_local Scratch token_scratch;
  static thread_local Scratch panel_scratch;
  if (tokens == 0) return;
  const LinearKernels& kernels = linear_kernels(active_isa());
  const int threads = threads_for(w.num_tiles() * w.tile_bytes() * ((tokens + 3) / 4), kBytesPerThread);
  const bool shared = tokens > kOwnQuantize && threads > 1;
  QuantTokens q = token_buffers(token_scratch, w, shared ? tokens : 0);
#pragma omp parallel num_threads(threads) firstprivate(q)
  {
    const int t = omp_get_thread_num(), total = omp_get_num_threads();
    const Share mine = share_of(w.num_tiles(), t, total);
    if (shared) {
      const Share rows = share_of(tokens, t, total);
      kernels.quantize(x, dtype, stride, w.cols, w.group, rows.begin, rows.end, q);
#pragma omp barrier
    } else {
      q = token_buffers(token_scratch, w, tokens);
      kernels.quantize(x, dtype, stride, w.cols, w.group, 0, tokens, q);
    }
    kernels.product(w, q, tokens, mine.begin, mine.end, y, panel_scratch.get(kernels.panel_bytes(w)));
  }
}

// Memory for `rows` values in place of x's last dimension, from the caller's own allocator (torch's, when torch calls).
inline tvm::ffi::Tensor new_rows(const TensorView& x, int64_t rows) {
  if (x.ndim() < 1) TVM_FFI_THROW(ValueError) << "x: expected shape [..., in_features], got []";
  if (rows < 1) TVM_FFI_THROW(ValueError) << "out_features: expected at least 1, got " << rows;
  check_cpu("x", x);
  float_dtype("x", x);
  std::vector<int64_t> shape(x.shape().begin(), x.shape().end());
  shape.back() = rows;
  return tvm::ffi::Tensor::FromEnvAlloc(TVMFFIEnvTensorAlloc, tvm::ffi::ShapeView(shape.data(), shape.size()),
                                        x.dtype(), x.device());
}

// y[..., rows] = x[..., cols] @ weight.T + bias
inline void linear_op(TensorView x, TensorView packed, tvm::ffi::Optional<tvm::ffi::TensorView> bias, TensorView y,
                      int64_t group, int bits, bool asymmetric) {
  if (x.ndim() < 1 || y.ndim() < 1) TVM_FFI_THROW(ValueError) << "x: expected shape [..., in_features]";
  const int64_t rows = y.size(y.ndim() - 1), cols = x.size(x.ndim() - 1);
  const QuantWeight w = quant_weight("packed", packed, rows, cols, group, bits, asymmetric);
  const Rows in = rows_of("x", x), to = rows_of("y", y);
  check_shape("packed", packed, {w.num_tiles(), w.tile_bytes()});
  if (in.count != to.count)
    TVM_FFI_THROW(ValueError) << "y: expected as many rows as x, " << in.count << ", got " << to.count;
  const DType dtype = float_dtype("x", x);
  check_same_dtype("y", y, "x", dtype);
  if (bias.has_value()) {
    check_cpu("bias", *bias);
    check_shape("bias", *bias, {rows});
    check_same_dtype("bias", *bias, "x", dtype);
  }
  const Output out{y.data_ptr(), to.stride, static_cast<int>(dtype), bias.has_value() ? (*bias).data_ptr() : nullptr};
  run_linear(w, x.data_ptr(), static_cast<int>(dtype), in.stride, in.count, out);
}

}  // namespace llmopt
