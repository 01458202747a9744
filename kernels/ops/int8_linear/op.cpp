#include "linear_job.h"

namespace {

using tvm::ffi::Optional;
using tvm::ffi::Tensor;
using tvm::ffi::TensorView;

void int8_linear_into(TensorView x, TensorView packed, Optional<TensorView> bias, TensorView y, int64_t group) {
  llmopt::linear_op(x, packed, bias, y, group, 8, false);
}

Tensor int8_linear(TensorView x, TensorView packed, Optional<TensorView> bias, int64_t out_features, int64_t group) {
  Tensor y = llmopt::new_rows(x, out_features);
  llmopt::linear_op(x, packed, bias, y, group, 8, false);
  return y;
}

// y[T, cols] = rows `ids` of the weight, dequantized: the embedding lookup on the head's own bytes
void quant_rows(TensorView ids, TensorView packed, TensorView y, int64_t rows, int64_t group, int64_t bits,
                bool asymmetric) {
  using namespace llmopt;
  if (bits != 4 && bits != 8) TVM_FFI_THROW(ValueError) << "bits: expected 4 or 8, got " << bits;
  const int64_t tokens = ids.size(0), cols = y.size(1);
  const QuantWeight w = quant_weight("packed", packed, rows, cols, group, static_cast<int>(bits), asymmetric);
  check_cpu("ids", ids);
  check_i64("ids", ids);
  check_shape("ids", ids, {-1});
  check_shape("packed", packed, {w.num_tiles(), w.tile_bytes()});
  check_shape("y", y, {tokens, cols});
  check_contiguous("y", y);
  if (float_dtype("y", y) != DType::kF32) TVM_FFI_THROW(ValueError) << "y: expected dtype float32";
  const auto* index = static_cast<const int64_t*>(ids.data_ptr());
  for (int64_t t = 0; t < tokens; ++t) {
    if (index[t] < 0 || index[t] >= rows)
      TVM_FFI_THROW(IndexError) << "ids: expected values in [0, " << rows << "), got " << index[t];
  }
  const LinearKernels& kernels = linear_kernels(active_isa());
  auto* out = static_cast<float*>(y.data_ptr());
  const int threads = threads_for(tokens * cols, 16384);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t t = 0; t < tokens; ++t) kernels.dequantize_row(w, index[t], out + t * cols);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(int8_linear, int8_linear);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(int8_linear_into, int8_linear_into);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(quant_rows, quant_rows);
