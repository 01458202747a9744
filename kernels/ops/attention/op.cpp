// attention: checks the tensors, cuts the work into jobs and runs them on the loops of the instruction set in force.
#include <algorithm>

#include "prefill_work.h"
#include "scratch.h"
#include "tensor_check.h"
#include "threads.h"

namespace llmopt {
namespace {

using tvm::ffi::Optional;

// multiply-adds below which a second thread is not worth waking
constexpr int64_t kSerialWork = 64 * 1024;
// most rows of one job; more spread the cost of preparing a key tile, but queries and accumulators must stay in L2
constexpr int64_t kMostRows = 192, kFewestRows = 48, kCacheFloats = 192 * 1024;
// fewest keys of one job when the keys are split
constexpr int64_t kFewestKeys = 512;
// jobs to cut the work into, where it is large enough: several for each of some ten threads, so that they end together
constexpr int64_t kWantedJobs = 32;
// fewest rows of a KV head for which packing its keys into pairs pays
constexpr int64_t kPrefillRows = 32;

Strides strides_of(const TensorView& t) { return {t.stride(0), t.stride(1), t.stride(2)}; }

const uint8_t* mask_data(const char* name, const TensorView& t) {
  check_cpu(name, t);
  const DLDataType d = t.dtype();
  if ((d.code != kDLBool && d.code != kDLUInt) || d.bits != 8)
    TVM_FFI_THROW(ValueError) << name << ": expected dtype bool or uint8";
  return static_cast<const uint8_t*>(t.data_ptr());
}

void check_tensor(const char* name, const TensorView& t, std::initializer_list<int64_t> shape, DType dtype) {
  check_cpu(name, t);
  check_shape(name, t, shape);
  check_same_dtype(name, t, "q", dtype);
}

void add_masks(AttentionParams& p, const Optional<TensorView>& key_mask, const Optional<TensorView>& mask) {
  if (key_mask.has_value()) {
    const TensorView& t = *key_mask;
    p.key_mask = mask_data("key_mask", t);
    check_shape("key_mask", t, {p.batch, p.tk});
    p.key_mask_stride = t.stride(0);
  }
  if (mask.has_value()) {
    const TensorView& t = *mask;
    p.mask = mask_data("mask", t);
    check_shape("mask", t, {-1, -1, p.tq, p.tk});
    if ((t.size(0) != 1 && t.size(0) != p.batch) || (t.size(1) != 1 && t.size(1) != p.heads))
      TVM_FFI_THROW(ValueError) << "mask: expected shape [1 or " << p.batch << ", 1 or " << p.heads << ", " << p.tq
                                << ", " << p.tk << "], got " << shape_text(t);
    p.mask_stride = {t.size(0) == 1 ? 0 : t.stride(0), t.size(1) == 1 ? 0 : t.stride(1), t.stride(2)};
  }
}

void add_rope(AttentionParams& p, const Optional<TensorView>& q_rope, const Optional<TensorView>& k_rope, DType dtype) {
  if (q_rope.has_value() != k_rope.has_value())
    TVM_FFI_THROW(ValueError) << (q_rope.has_value() ? "k_rope" : "q_rope")
                              << ": expected a tensor beside the other one";
  if (!q_rope.has_value()) return;
  p.dim_rope = (*q_rope).ndim() == 4 ? (*q_rope).size(3) : -1;
  check_tensor("q_rope", *q_rope, {p.batch, p.heads, p.tq, -1}, dtype);
  check_tensor("k_rope", *k_rope, {p.batch, -1, p.tk, p.dim_rope}, dtype);
  if ((*k_rope).size(1) != 1 && (*k_rope).size(1) != p.kv_heads)
    TVM_FFI_THROW(ValueError) << "k_rope: expected 1 or " << p.kv_heads << " heads, got " << (*k_rope).size(1);
  p.q_rope = (*q_rope).data_ptr();
  p.k_rope = (*k_rope).data_ptr();
  p.q_rope_stride = strides_of(*q_rope);
  p.k_rope_stride = strides_of(*k_rope);
  if ((*k_rope).size(1) == 1) p.k_rope_stride.h = 0;
}

// Cut of the work: row tiles of each KV head, and splits of the keys where there are few row tiles. It follows from the
// shapes alone, so that any number of threads gives the same bits.
struct Plan {
  int threads;
  int64_t tile_rows, num_tiles, num_splits, split_keys;
};

Plan plan_for(const AttentionParams& p) {
  Plan plan{};
  const int64_t units = p.batch * p.kv_heads, rows = p.rows();
  const int64_t work = units * rows * p.tk * (p.dim + p.dim_rope + p.dim_v);
  // one thread or all: libgomp ends the threads it is not asked for, and starting them again costs more than they save
  plan.threads = threads_for(work, kSerialWork) == 1 ? 1 : omp_get_max_threads();
  const int64_t floats_per_row = p.dim + p.dim_rope + p.dim_v + kTileKeys;
  const int64_t most = std::clamp(kCacheFloats / floats_per_row - kTileKeys, kFewestRows, kMostRows);
  const int64_t tile = std::clamp((units * rows + kWantedJobs - 1) / kWantedJobs, kFewestRows, most);
  plan.num_tiles = (rows + tile - 1) / tile;
  plan.tile_rows = (rows + plan.num_tiles - 1) / plan.num_tiles;
  const int64_t wanted = kWantedJobs / (units * plan.num_tiles);
  const int64_t splits = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, p.tk / kFewestKeys));
  plan.split_keys = round_up((p.tk + splits - 1) / splits, kTileKeys);
  plan.num_splits = (p.tk + plan.split_keys - 1) / plan.split_keys;
  return plan;
}

// Job of `index`: later row tiles first, since a causal mask gives them the most keys.
AttentionJob job_at(const AttentionParams& p, const Plan& plan, int64_t index) {
  const int64_t split = index % plan.num_splits, rest = index / plan.num_splits;
  const int64_t units = p.batch * p.kv_heads;
  const int64_t tile = plan.num_tiles - 1 - rest / units, unit = rest % units;
  const int64_t row = tile * plan.tile_rows, key = split * plan.split_keys;
  return {unit / p.kv_heads,
          unit % p.kv_heads,
          row,
          std::min(row + plan.tile_rows, p.rows()),
          key,
          std::min(key + plan.split_keys, p.tk),
          nullptr};
}

void run(const AttentionParams& p, const AttentionKernels& kernels) {
  static thread_local Scratch thread_scratch, partial_scratch;
  const Plan plan = plan_for(p);
  const AttentionLayout layout(p, plan.tile_rows);
  const int64_t jobs = p.batch * p.kv_heads * plan.num_tiles * plan.num_splits;
  const bool split = plan.num_splits > 1;
  // a run of splits reads on where the one before stopped, and finds its first keys prefetched
  const int64_t chunk = std::max<int64_t>(1, split ? jobs / (4 * plan.threads) : 1);
  const int64_t stride = layout.partial_size(plan.tile_rows);
  float* partials =
      split ? reinterpret_cast<float*>(partial_scratch.get(static_cast<size_t>(jobs * stride) * sizeof(float)))
            : nullptr;
#pragma omp parallel num_threads(plan.threads)
  {
    float* scratch = reinterpret_cast<float*>(thread_scratch.get(static_cast<size_t>(layout.total) * sizeof(float)));
#pragma omp for schedule(dynamic, chunk)
    for (int64_t i = 0; i < jobs; ++i) {
      AttentionJob job = job_at(p, plan, i);
      if (split) job.partial = partials + i * stride;
      kernels.attend(p, job, scratch);
    }
    if (split) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < jobs / plan.num_splits * plan.tile_rows; ++i) {
        const int64_t first = i / plan.tile_rows * plan.num_splits;
        AttentionJob job = job_at(p, plan, first);
        job.partial = partials + first * stride;
        const int64_t row = job.row_begin + i % plan.tile_rows;
        if (row < job.row_end) kernels.combine(p, job, plan.num_splits, stride, row, scratch);
      }
    }
  }
}

void run_prefill(const AttentionParams& p, const PrefillKernels& kernels) {
  static thread_local PrefillWork work;
  work.clear();
  work.add(p);
  work.cut();
  run_team(omp_in_parallel() ? 1 : omp_get_max_threads(),
           [&mine = work, &kernels](const Team& team) { mine.run(kernels, team); });
}

void attention(TensorView q, TensorView k, TensorView v, Optional<TensorView> q_rope, Optional<TensorView> k_rope,
               Optional<TensorView> key_mask, Optional<TensorView> mask, double scale, bool causal, int64_t window,
               TensorView out) {
  check_cpu("q", q);
  check_shape("q", q, {-1, -1, -1, -1});
  const DType dtype = float_dtype("q", q);
  AttentionParams p{};
  p.batch = q.size(0), p.heads = q.size(1), p.tq = q.size(2), p.dim = q.size(3);
  check_tensor("k", k, {p.batch, -1, -1, p.dim}, dtype);
  p.kv_heads = k.size(1), p.tk = k.size(2);
  check_tensor("v", v, {p.batch, p.kv_heads, p.tk, -1}, dtype);
  p.dim_v = v.size(3);
  check_tensor("out", out, {p.batch, p.tq, p.heads, p.dim_v}, dtype);
  check_contiguous("out", out);
  if (p.kv_heads == 0 || p.heads % p.kv_heads != 0)
    TVM_FFI_THROW(ValueError) << "k: expected a number of heads that divides q's " << p.heads << ", got " << p.kv_heads;
  if (p.dim == 0 || p.dim_v == 0) TVM_FFI_THROW(ValueError) << (p.dim ? "v" : "q") << ": expected a head size above 0";
  if (p.tk == 0) TVM_FFI_THROW(ValueError) << "k: expected at least one key, got none";
  if (window < 0 || (window > 0 && !causal))
    TVM_FFI_THROW(ValueError) << "window: expected a positive number of keys, with causal, got " << window;
  add_rope(p, q_rope, k_rope, dtype);
  add_masks(p, key_mask, mask);
  if (out.numel() == 0) return;
  p.q = q.data_ptr(), p.k = k.data_ptr(), p.v = v.data_ptr(), p.out = out.data_ptr();
  p.q_stride = strides_of(q), p.k_stride = strides_of(k), p.v_stride = strides_of(v);
  p.scale = static_cast<float>(scale), p.causal = causal, p.window = window;
  // weights come from the largest unscaled score: with a scale below zero that would be the smallest
  const bool many = dtype == DType::kBF16 && p.rows() >= kPrefillRows && p.scale > 0.0f;
  const PrefillKernels* prefill = many ? prefill_kernels(active_isa()) : nullptr;
  if (prefill) return run_prefill(p, *prefill);
  run(p, attention_kernels(active_isa(), static_cast<int>(dtype)));
}

}  // namespace
}  // namespace llmopt

TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention, llmopt::attention);
