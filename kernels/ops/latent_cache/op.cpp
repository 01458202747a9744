// latent_cache: from the projections of new tokens to the latent cache and to queries that attention reads.
#include "latent_cache.h"

#include "heads_linear.h"
#include "latent_rows.h"

namespace llmopt {
namespace {

using tvm::ffi::Optional;

// floats below which a second thread is not worth waking
constexpr int64_t kGrain = 16384;

void add_rope(LatentCacheParams& p, const TensorView& cos, const TensorView& sin) {
  p.cos = check_floats("cos", cos, {-1, -1}), p.sin = check_floats("sin", sin, {cos.size(0), cos.size(1)});
  check_contiguous("cos", cos), check_contiguous("sin", sin);
  p.rope = 2 * cos.size(1);
  if (p.rope < 2 || p.rope > kMostRope)
    TVM_FFI_THROW(ValueError) << "cos: expected 1 to " << kMostRope / 2 << " columns, got " << cos.size(1);
}

void add_tokens(LatentCacheParams& p, const TensorView& q, const TensorView& kv_a, const TensorView& norm) {
  p.norm = check_floats("norm", norm, {p.rank});
  p.kv_a = check_floats("kv_a", kv_a, {p.tokens, p.rank + p.rope});
  p.q = check_floats("q", q, {p.tokens, -1});
  p.nope = p.heads > 0 ? q.size(1) / p.heads - p.rope : 0;
  if (p.nope < 1 || q.size(1) != p.heads * (p.nope + p.rope))
    TVM_FFI_THROW(ValueError) << "q: expected " << p.heads << " heads of more than " << p.rope << " values, got "
                              << q.size(1) << " columns";
  p.q_stride = q.stride(0), p.kv_stride = kv_a.stride(0);
}

HeadsLinear absorb(const LatentCacheParams& p, const TensorView& w_uk, int64_t group) {
  const LinearWeight w = heads_weight("w_uk", w_uk, p.heads, p.rank, p.nope, group);
  const TokenSource x{p.q, static_cast<int>(DType::kF32), p.q_stride, p.nope};
  const Output y{p.query, p.heads * p.query_dim(), p.query_dtype(), nullptr};
  return heads_linear(w, x, p.nope + p.rope, y, p.query_dim(), p.heads, p.tokens);
}

void latent_cache(TensorView q, TensorView kv_a, TensorView norm, double eps, TensorView cos, TensorView sin,
                  TensorView position, TensorView seq, TensorView slot, bool interleaved, Optional<TensorView> w_uk,
                  int64_t group, TensorView cache, Optional<TensorView> latent_scale, TensorView query) {
  LatentCacheParams p{};
  add_rope(p, cos, sin);
  const CacheShape shape = latent_cache_shape(cache, latent_scale, p.rope);
  p.rank = shape.dim - p.rope;
  check_cpu("query", query);
  check_shape("query", query, {-1, -1, -1});
  check_contiguous("query", query);
  check_query("query", query, shape, "cache");
  p.tokens = query.size(0), p.heads = query.size(1);
  add_tokens(p, q, kv_a, norm);
  p.absorbed = w_uk.has_value(), p.interleaved = interleaved, p.eps = static_cast<float>(eps);
  check_shape("query", query, {p.tokens, p.heads, p.query_dim()});
  p.position = check_i32("position", position, p.tokens);
  p.seq = check_i32("seq", seq, p.tokens), p.slot = check_i32("slot", slot, p.tokens);
  p.query = query.data_ptr(), p.cache = cache.data_ptr();
  p.row = cache.size(2), p.scales = shape.k_scale, p.scale_stride = shape.capacity;
  p.seq_stride = shape.seq_stride, p.dtype = static_cast<int>(shape.dtype);
  check_rows({p.position, p.seq, p.slot}, p.tokens, cos.size(0), shape);
  HeadsLinear jobs;
  if (p.absorbed) jobs = absorb(p, *w_uk, group);
  if (p.tokens == 0) return;
  const int64_t floats = p.tokens * (shape.dim + p.heads * p.query_dim());
  const int threads = std::max(threads_for(floats, kGrain), threads_for(heads_bytes(jobs), kBytesPerThread));
  run_or_record(
      "latent_cache",
      [p, jobs = std::move(jobs)](const Team& team) {
        const LatentCacheKernels& kernels = latent_cache_kernels(active_isa());
        const Share rows = team.share(p.tokens), heads = team.share(p.tokens * p.heads);
        kernels.write_rows(p, rows.begin, rows.end);
        kernels.write_queries(p, heads.begin, heads.end);
        heads_linear_part(jobs, team);
      },
      threads);
}

}  // namespace
}  // namespace llmopt

TVM_FFI_DLL_EXPORT_TYPED_FUNC(latent_cache, llmopt::latent_cache);
