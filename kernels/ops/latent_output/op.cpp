// latent_output: what attention gave in latent space, expanded to values, head by head.
#include "cache_rows.h"
#include "heads_linear.h"

namespace llmopt {
namespace {

// out[t, h * V + v] = sum over r of latent[t, h, r] * w_uv[h, v, r]
void latent_output(TensorView latent, TensorView w_uv, int64_t group, TensorView out) {
  check_cpu("latent", latent), check_cpu("out", out);
  check_shape("latent", latent, {-1, -1, -1});
  check_contiguous("latent", latent);
  const int64_t tokens = latent.size(0), heads = latent.size(1), rank = latent.size(2);
  const int dtype = static_cast<int>(float_dtype("latent", latent));
  check_floats("out", out, {tokens, -1});
  if (heads < 1 || rank < 1 || out.size(1) < heads || out.size(1) % heads != 0)
    TVM_FFI_THROW(ValueError) << "out: expected columns for each of " << heads << " heads, got " << out.size(1);
  const int64_t dim_v = out.size(1) / heads;
  const LinearWeight w = heads_weight("w_uv", w_uv, heads, dim_v, rank, group);
  const TokenSource x{latent.data_ptr(), dtype, heads * rank, rank};
  const Output y{out.data_ptr(), out.stride(0), static_cast<int>(DType::kF32), nullptr};
  if (tokens == 0) return;
  HeadsLinear jobs = heads_linear(w, x, rank, y, dim_v, heads, tokens);
  const int threads = threads_for(heads_bytes(jobs) * ((tokens + 3) / 4), kBytesPerThread);
  run_or_record(
      "latent_output", [jobs = std::move(jobs)](const Team& team) { heads_linear_part(jobs, team); }, threads);
}

}  // namespace
}  // namespace llmopt

TVM_FFI_DLL_EXPORT_TYPED_FUNC(latent_output, llmopt::latent_output);
