#include "linear_job.h"

namespace {

using tvm::ffi::Optional;
using tvm::ffi::Tensor;
using tvm::ffi::TensorView;

void int4_linear_into(TensorView x, TensorView packed, Optional<TensorView> bias, TensorView y, int64_t group,
                      bool asymmetric) {
  llmopt::linear_op(x, packed, bias, y, group, 4, asymmetric);
}

Tensor int4_linear(TensorView x, TensorView packed, Optional<TensorView> bias, int64_t out_features, int64_t group,
                   bool asymmetric) {
  Tensor y = llmopt::new_rows(x, out_features);
  llmopt::linear_op(x, packed, bias, y, group, 4, asymmetric);
  return y;
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(int4_linear, int4_linear);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(int4_linear_into, int4_linear_into);
