#include "rope_cache.h"

#include "cache_rows.h"
#include "program.h"
#include "tensor_check.h"

namespace llmopt {
namespace {

using tvm::ffi::Optional;

// floats below which a second thread is not worth waking
constexpr int64_t kGrain = 16384;

const float* head_norm(const char* name, const Optional<TensorView>& t, int64_t dim) {
  if (!t.has_value()) return nullptr;
  return check_floats(name, *t, {dim});
}

// Fills in the tables and the tokens' rows in them; returns the number of rows.
int64_t take_tables(RopeCacheParams& p, const Optional<TensorView>& cos, const Optional<TensorView>& sin,
                    const Optional<TensorView>& position) {
  if (cos.has_value() != sin.has_value() || cos.has_value() != position.has_value())
    TVM_FFI_THROW(ValueError) << "cos: expected sin and position beside it, or none of the three";
  if (!cos.has_value()) return 0;
  const TensorView table = *cos;
  p.cos = check_floats("cos", table, {-1, -1}), p.sin = check_floats("sin", *sin, {table.size(0), table.size(1)});
  check_contiguous("cos", table), check_contiguous("sin", *sin);
  p.rotary = 2 * table.size(1);
  if (p.rotary > p.dim) TVM_FFI_THROW(ValueError) << "cos: expected at most " << p.dim / 2 << " columns";
  p.position = check_i32("position", *position, p.tokens);
  return table.size(0);
}

void rope_cache(TensorView qkv, Optional<TensorView> q_norm, Optional<TensorView> k_norm, double eps,
                Optional<TensorView> cos, Optional<TensorView> sin, Optional<TensorView> position, TensorView seq,
                TensorView slot, bool interleaved, TensorView q, TensorView k, TensorView v,
                Optional<TensorView> k_scale, Optional<TensorView> v_scale) {
  RopeCacheParams p{};
  CacheShape cache = cache_shape(k, v);
  add_scales(cache, k_scale, v_scale);
  check_cpu("q", q);
  check_shape("q", q, {-1, -1, cache.dim});
  check_contiguous("q", q);
  check_query("q", q, cache);
  p.tokens = q.size(0), p.heads = q.size(1), p.dim = cache.dim, p.kv_heads = cache.kv_heads;
  if (p.dim > 512) TVM_FFI_THROW(ValueError) << "q: expected a head size of at most 512, got " << p.dim;
  p.qkv = check_floats("qkv", qkv, {p.tokens, (p.heads + 2 * p.kv_heads) * p.dim});
  p.qkv_stride = qkv.stride(0);
  p.q_norm = head_norm("q_norm", q_norm, p.dim), p.k_norm = head_norm("k_norm", k_norm, p.dim);
  p.eps = static_cast<float>(eps);
  const int64_t positions = take_tables(p, cos, sin, position);
  p.seq = check_i32("seq", seq, p.tokens), p.slot = check_i32("slot", slot, p.tokens);
  p.q = q.data_ptr(), p.k = k.data_ptr(), p.v = v.data_ptr();
  p.k_scale = cache.k_scale, p.v_scale = cache.v_scale;
  p.seq_stride = cache.seq_stride, p.head_stride = cache.head_stride;
  p.interleaved = interleaved, p.dtype = static_cast<int>(cache.dtype);
  check_rows({p.position, p.seq, p.slot}, p.tokens, positions, cache);
  const int64_t units = p.tokens * (p.heads + 2 * p.kv_heads);
  run_or_record(
      "rope_cache",
      [p, units](const Team& team) {
        const Share mine = team.share(units);
        rope_cache_kernels(active_isa()).run(p, mine.begin, mine.end);
      },
      threads_for(units * p.dim, kGrain));
}

}  // namespace
}  // namespace llmopt

TVM_FFI_DLL_EXPORT_TYPED_FUNC(rope_cache, llmopt::rope_cache);
