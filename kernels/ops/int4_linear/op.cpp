#include "quant_linear_run.h"

namespace {

void int4_linear(tvm::ffi::TensorView x, tvm::ffi::TensorView packed, tvm::ffi::Optional<tvm::ffi::TensorView> bias,
                 tvm::ffi::TensorView y, int64_t group, bool asymmetric) {
  llmopt::linear_op(x, packed, bias, y, group, 4, asymmetric);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(int4_linear, int4_linear);
