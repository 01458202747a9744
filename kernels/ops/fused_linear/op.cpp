// fused_linear: norm, quantization, up to four products that share their input, and what follows them, as one op.
#include "linear_job.h"

namespace llmopt {
namespace {

using tvm::ffi::Array;
using tvm::ffi::Optional;
using tvm::ffi::Tensor;

enum Mode : int64_t { kStore, kAdd, kSwiGLU };

struct Given {
  Array<Tensor> weights;
  Array<int64_t> rows, bits, asymmetric;
  int64_t group;
};

LinearWeight weight_of(const Given& given, int64_t i, int64_t cols) {
  const Tensor& t = given.weights[i];
  LinearWeight w{};
  w.quantized = given.bits[i] <= 8;
  if (w.quantized) {
    w.quant = quant_weight("weights", t, given.rows[i], cols, given.group, static_cast<int>(given.bits[i]),
                           given.asymmetric[i] != 0);
    check_shape("weights", t, {w.quant.num_tiles(), w.quant.tile_bytes()});
  } else {
    check_cpu("weights", t);
    check_contiguous("weights", t);
    check_shape("weights", t, {given.rows[i], cols});
    w.dense = {t.data_ptr(), static_cast<int>(float_dtype("weights", t)), given.rows[i], cols};
  }
  return w;
}

void check_weights(const Given& given, int64_t mode) {
  const size_t n = given.weights.size();
  if (n < 1 || n > 4 || given.rows.size() != n || given.bits.size() != n || given.asymmetric.size() != n)
    TVM_FFI_THROW(ValueError) << "weights: expected one to four, each with rows, bits and asymmetric, got " << n;
  if (mode < kStore || mode > kSwiGLU) TVM_FFI_THROW(ValueError) << "mode: expected 0, 1 or 2, got " << mode;
  if (mode == kSwiGLU && (n != 2 || given.rows[0] != given.rows[1] || given.bits[0] != given.bits[1]))
    TVM_FFI_THROW(ValueError) << "weights: expected gate and up of one shape and one number of bits";
  for (int64_t rows : given.rows)
    if (rows < 1) TVM_FFI_THROW(ValueError) << "rows: expected at least 1, got " << rows;
  for (size_t i = 0; i < n; ++i)
    if (given.bits[i] != 4 && given.bits[i] != 8 && given.bits[i] != 16 && given.bits[i] != 32)
      TVM_FFI_THROW(ValueError) << "bits: expected 4, 8, 16 or 32, got " << given.bits[i];
}

const float* float_vector(const char* name, const TensorView& t, int64_t size) {
  check_cpu(name, t);
  check_shape(name, t, {size});
  if (float_dtype(name, t) != DType::kF32) TVM_FFI_THROW(ValueError) << name << ": expected dtype float32";
  return static_cast<const float*>(t.data_ptr());
}

void fused_linear(TensorView x, Optional<TensorView> norm, double eps, Array<Tensor> weights, Array<int64_t> rows,
                  Array<int64_t> bits, Array<int64_t> asymmetric, int64_t group, Optional<Array<Tensor>> biases,
                  int64_t mode, TensorView y) {
  const Given given{weights, rows, bits, asymmetric, group};
  check_weights(given, mode);
  check_cpu("x", x);
  check_shape("x", x, {-1, -1});
  const int64_t tokens = x.size(0), cols = x.size(1);
  LinearJob job;
  job.x = {x.data_ptr(), static_cast<int>(float_dtype("x", x)), x.stride(0), cols};
  if (norm.has_value()) job.x.norm = float_vector("norm", *norm, cols), job.x.eps = static_cast<float>(eps);
  job.tokens = tokens;
  job.gated = mode == kSwiGLU;
  int64_t width = 0;
  check_cpu("out", y), check_shape("out", y, {tokens, -1});
  auto* out = static_cast<float*>(y.data_ptr());
  if (biases.has_value() && ((*biases).size() != weights.size() || job.gated))
    TVM_FFI_THROW(ValueError) << "biases: expected one a weight, and none with swiglu";
  for (size_t i = 0; i < weights.size(); ++i) {
    job.weights.push_back(weight_of(given, static_cast<int64_t>(i), cols));
    const float* bias = biases.has_value() ? float_vector("biases", (*biases)[i], rows[i]) : nullptr;
    if (job.outputs.empty() || !job.gated) job.outputs.push_back({out + width, y.stride(0), 0, bias, mode == kAdd});
    width += rows[i];
  }
  check_shape("out", y, {tokens, job.gated ? rows[0] : width});
  if (float_dtype("out", y) != DType::kF32) TVM_FFI_THROW(ValueError) << "out: expected dtype float32";
  const LinearWeight* dense = job.first(false);
  for (const LinearWeight& w : job.weights)
    if (!w.quantized && w.dense.dtype != dense->dense.dtype)
      TVM_FFI_THROW(ValueError) << "weights: expected one dtype for all that are not quantized";
  run_linear("fused_linear", std::move(job));
}

}  // namespace
}  // namespace llmopt

TVM_FFI_DLL_EXPORT_TYPED_FUNC(fused_linear, llmopt::fused_linear);
