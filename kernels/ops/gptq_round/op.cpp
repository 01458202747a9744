#include "gptq_round.h"
#include "tensor_check.h"
#include "threads.h"

namespace llmopt {
namespace {

float* floats(const char* name, const TensorView& t) {
  check_cpu(name, t);
  check_contiguous(name, t);
  if (float_dtype(name, t) != DType::kF32) TVM_FFI_THROW(ValueError) << name << ": expected dtype float32";
  return static_cast<float*>(t.data_ptr());
}

void check_bits(int64_t bits) {
  if (bits < 2 || bits > 8) TVM_FFI_THROW(ValueError) << "bits: expected 2 to 8, got " << bits;
}

// w [b, N, columns], weight [b, columns] -> scale, zero [b, N]
void search(TensorView w, TensorView weight, TensorView scale, TensorView zero, int64_t bits, bool symmetric) {
  check_shape("w", w, {-1, -1, -1});
  check_bits(bits);
  const int64_t batch = w.size(0), n = w.size(1), columns = w.size(2);
  check_shape("weight", weight, {batch, columns});
  check_shape("scale", scale, {batch, n});
  check_shape("zero", zero, {batch, n});
  const float *x = floats("w", w), *importance = floats("weight", weight);
  float *s = floats("scale", scale), *z = floats("zero", zero);
  const RoundKernels& kernels = round_kernels(active_isa());
  const int64_t blocks = (n + 15) / 16;
  const int threads = threads_for(batch * blocks, 1);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < batch * blocks; ++i) {
    const int64_t b = i / blocks, row = i % blocks * 16;
    const int rows = n - row < 16 ? static_cast<int>(n - row) : 16;
    kernels.search(x + (b * n + row) * columns, columns, rows, columns, importance + b * columns,
                   static_cast<int>(bits), symmetric, s + b * n + row, z + b * n + row);
  }
}

// w [b, N, columns], u [b, columns, columns], scale and zero [b, N] -> q, error [b, N, columns]
void round_span(TensorView w, TensorView u, TensorView scale, TensorView zero, TensorView q, TensorView error,
                int64_t bits) {
  check_shape("w", w, {-1, -1, -1});
  check_bits(bits);
  const int64_t batch = w.size(0), n = w.size(1), columns = w.size(2);
  if (columns > 128) TVM_FFI_THROW(ValueError) << "w: expected at most 128 columns, got " << columns;
  check_shape("u", u, {batch, columns, columns});
  check_shape("scale", scale, {batch, n});
  check_shape("zero", zero, {batch, n});
  check_shape("q", q, {batch, n, columns});
  check_shape("error", error, {batch, n, columns});
  const float *x = floats("w", w), *factor = floats("u", u), *s = floats("scale", scale), *z = floats("zero", zero);
  float *codes = floats("q", q), *errors = floats("error", error);
  const RoundKernels& kernels = round_kernels(active_isa());
  const int64_t blocks = (n + 15) / 16;
  const int threads = threads_for(batch * blocks, 1);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < batch * blocks; ++i) {
    const int64_t b = i / blocks, row = i % blocks * 16, at = b * n + row;
    const int rows = n - row < 16 ? static_cast<int>(n - row) : 16;
    kernels.round(x + at * columns, columns, rows, columns, factor + b * columns * columns, columns, s + at, z + at,
                  (1 << bits) - 1, codes + at * columns, errors + at * columns);
  }
}

}  // namespace
}  // namespace llmopt

TVM_FFI_DLL_EXPORT_TYPED_FUNC(gptq_search_scales, llmopt::search);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gptq_round_span, llmopt::round_span);
