// cache_attention: attention of ragged rows over the preallocated cache. Rows of one sequence that follow each other are one
// causal run (a prefill chunk, or the single token of a decode step).
#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "../attention/prefill_work.h"
#include "cache_rows.h"
#include "scratch.h"

namespace llmopt {
namespace {

using tvm::ffi::Optional;

// most rows of one job, and the fewest where there are many
constexpr int64_t kMostRows = 192, kFewestRows = 48;
// fewest tokens of a run, and rows of its KV heads, for which packing its keys into pairs pays. Few tokens, as speculation
// checks them, get the numbers that they get one by one.
constexpr int64_t kLongRun = 16, kPrefillRows = 32;
// fewest keys of one job when keys are split, and jobs to cut the work into
constexpr int64_t kFewestKeys = 256, kWantedJobs = 32;

struct Given {
  const void* q;
  const void *k, *v;
  void* out;
  TokenRows rows;
  const int32_t* start;  // first slot a sequence's rows may see
  int64_t tokens, heads;
  float scale;
  CacheShape cache;
};

// A run of rows: tokens [first, first + count) of one sequence, against its keys [start, start + keys), of which the last
// row sees all.
struct Run {
  int64_t first, count, seq, start, keys;
  int64_t tile_rows, num_tiles, split_keys, num_splits;
  int64_t first_job;

  int64_t jobs(int64_t kv_heads) const { return kv_heads * num_tiles * num_splits; }
};

AttentionParams params_of(const Given& g, const Run& run) {
  AttentionParams p{};
  const auto at = [](const void* base, int64_t i, DType dtype) {
    return static_cast<const char*>(base) + i * bytes_of(dtype);
  };
  const int64_t dim = g.cache.dim, width = g.heads * dim;
  p.batch = 1, p.heads = g.heads, p.kv_heads = g.cache.kv_heads;
  p.tq = run.count, p.tk = run.keys, p.dim = p.dim_v = dim;
  p.q = at(g.q, run.first * width, g.cache.query_dtype());
  p.out = const_cast<char*>(at(g.out, run.first * width, g.cache.query_dtype()));
  const int64_t begin = run.seq * g.cache.seq_stride + run.start * dim;
  p.k = at(g.k, begin, g.cache.dtype), p.v = at(g.v, begin, g.cache.dtype);
  if (g.cache.k_scale) p.k_scale = g.cache.k_scale + begin / dim, p.v_scale = g.cache.v_scale + begin / dim;
  p.scale_stride = g.cache.capacity;
  p.q_stride = {0, dim, width};
  p.k_stride = p.v_stride = {0, g.cache.head_stride, dim};
  p.scale = g.scale, p.causal = true;
  return p;
}

// The cut follows from the shapes alone, so that any number of threads gives the same bits.
void cut(const Given& g, int64_t runs, Run& run) {
  const int64_t units = runs * g.cache.kv_heads, rows = run.count * (g.heads / g.cache.kv_heads), keys = run.keys;
  const int64_t tile = std::clamp((units * rows + kWantedJobs - 1) / kWantedJobs, kFewestRows, kMostRows);
  run.num_tiles = (rows + tile - 1) / tile;
  run.tile_rows = (rows + run.num_tiles - 1) / run.num_tiles;
  // a row's cut may depend on its own length only, not on who else is in the batch
  const int64_t wanted = std::max<int64_t>(1, kWantedJobs / (g.cache.kv_heads * run.num_tiles));
  const int64_t splits = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, keys / kFewestKeys));
  run.split_keys = round_up((keys + splits - 1) / splits, kTileKeys);
  run.num_splits = (keys + run.split_keys - 1) / run.split_keys;
}

// Runs of the rows as they are now.
void find_runs(const Given& g, std::vector<Run>& runs) {
  runs.clear();
  for (int64_t t = 0; t < g.tokens; ++t) {
    const int64_t seq = g.rows.seq[t], slot = g.rows.slot[t];
    const int64_t start = g.start ? g.start[seq] : 0;
    if (!runs.empty() && runs.back().seq == seq && start + runs.back().keys == slot) {
      ++runs.back().count;
      ++runs.back().keys;
    } else {
      runs.push_back({t, 1, seq, start, slot + 1 - start, 0, 0, 0, 0, 0});
    }
  }
}

// Moves long runs into `work`; the others are cut into jobs. Gives the number of jobs.
int64_t divide(const Given& g, bool packs, std::vector<Run>& runs, PrefillWork& work) {
  const int64_t group = g.heads / g.cache.kv_heads;
  work.clear();
  const auto is_long = [&](const Run& run) {
    return packs && run.count >= kLongRun && run.count * group >= kPrefillRows;
  };
  for (const Run& run : runs)
    if (is_long(run)) work.add(params_of(g, run));
  work.cut();
  runs.erase(std::remove_if(runs.begin(), runs.end(), is_long), runs.end());
  int64_t jobs = 0;
  for (Run& run : runs) {
    cut(g, static_cast<int64_t>(runs.size()), run);
    run.first_job = jobs;
    jobs += run.jobs(g.cache.kv_heads);
  }
  return jobs;
}

struct Partials {
  float* data;
  int64_t stride;
};

AttentionJob job_at(const Given& g, const Run& run, int64_t index, const Partials& partials) {
  const int64_t split = index % run.num_splits, rest = index / run.num_splits;
  const int64_t tile = run.num_tiles - 1 - rest / g.cache.kv_heads, head = rest % g.cache.kv_heads;
  const int64_t row = tile * run.tile_rows, key = split * run.split_keys;
  const int64_t rows = run.count * (g.heads / g.cache.kv_heads);
  float* partial = run.num_splits > 1 ? partials.data + (run.first_job + index) * partials.stride : nullptr;
  return {0, head, row, std::min(row + run.tile_rows, rows), key, std::min(key + run.split_keys, run.keys), partial};
}

// floats a thread needs, and floats between partial results
struct Sizes {
  int64_t scratch = 0, partial = 0;
};
Sizes sizes_of(const Given& g, const std::vector<Run>& runs) {
  Sizes s;
  for (const Run& run : runs) {
    const AttentionLayout layout(params_of(g, run), run.tile_rows);
    s.scratch = std::max(s.scratch, layout.total);
    s.partial = std::max(s.partial, layout.partial_size(run.tile_rows));
  }
  return s;
}

void attend(const Given& g, const std::vector<Run>& runs, float* scratch, const Partials& partials, Share mine) {
  const AttentionKernels& kernels = attention_kernels(active_isa(), static_cast<int>(g.cache.dtype));
  for (const Run& run : runs) {
    const int64_t count = run.jobs(g.cache.kv_heads);
    const int64_t begin = std::max(mine.begin, run.first_job) - run.first_job;
    const int64_t end = std::min(mine.end, run.first_job + count) - run.first_job;
    if (begin >= end) continue;
    const AttentionParams p = params_of(g, run);
    for (int64_t i = begin; i < end; ++i) {
      AttentionJob job = job_at(g, run, i, partials);
      kernels.attend(p, job, scratch);
    }
  }
}

void combine(const Given& g, const std::vector<Run>& runs, float* scratch, const Partials& partials, const Team& team) {
  const AttentionKernels& kernels = attention_kernels(active_isa(), static_cast<int>(g.cache.dtype));
  for (const Run& run : runs) {
    if (run.num_splits == 1) continue;
    const AttentionParams p = params_of(g, run);
    const Share mine = team.share(g.cache.kv_heads * run.num_tiles * run.tile_rows);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      const int64_t first = i / run.tile_rows * run.num_splits;
      const AttentionJob job = job_at(g, run, first, partials);
      const int64_t row = job.row_begin + i % run.tile_rows;
      if (row < job.row_end) kernels.combine(p, job, run.num_splits, partials.stride, row, scratch);
    }
  }
}

struct Shared {
  float* partials = nullptr;
  std::vector<Run> runs;  // short ones
  PrefillWork long_runs;
  Sizes sizes;
  int64_t jobs = 0;
  std::atomic<int64_t> next{0};
};

// The loops in bfloat16 for long runs, or null. Weights there come from the largest unscaled score, so not with a scale
// below zero.
const PrefillKernels* long_run_kernels(const Given& g) {
  return g.cache.query_dtype() == DType::kBF16 && g.scale > 0.0f ? prefill_kernels(active_isa()) : nullptr;
}

void attention_part(const Given& g, Shared& shared, const Team& team) {
  // partial results are the first thread's, and one for all ops: they are in its cache when the next op writes them
  static thread_local Scratch thread_scratch, partial_scratch;
  const PrefillKernels* prefill = long_run_kernels(g);
  if (team.rank == 0) {
    find_runs(g, shared.runs);
    shared.jobs = divide(g, prefill != nullptr, shared.runs, shared.long_runs);
    shared.sizes = sizes_of(g, shared.runs);
    shared.next = 0;
    const size_t bytes = static_cast<size_t>(shared.jobs * shared.sizes.partial) * sizeof(float);
    shared.partials = reinterpret_cast<float*>(partial_scratch.get(bytes));
  }
  team.sync();
  if (!shared.long_runs.empty()) shared.long_runs.run(*prefill, team);
  if (shared.jobs == 0) return;
  const Partials partials{shared.partials, shared.sizes.partial};
  float* scratch = reinterpret_cast<float*>(thread_scratch.get(static_cast<size_t>(shared.sizes.scratch) * 4));
  // a run of splits reads on where the one before stopped, and finds its first keys prefetched
  const int64_t chunk = std::max<int64_t>(1, shared.jobs / (4 * team.size));
  for (int64_t begin; (begin = shared.next.fetch_add(chunk)) < shared.jobs;)
    attend(g, shared.runs, scratch, partials, {begin, std::min(begin + chunk, shared.jobs)});
  team.sync();
  combine(g, shared.runs, scratch, partials, team);
}

void cache_attention(TensorView q, TensorView k, TensorView v, TensorView seq, TensorView slot,
                     Optional<TensorView> start, double scale, TensorView out, Optional<TensorView> k_scale,
                     Optional<TensorView> v_scale) {
  Given g{};
  g.cache = cache_shape(k, v);
  add_scales(g.cache, k_scale, v_scale);
  check_cpu("q", q), check_cpu("out", out);
  check_shape("q", q, {-1, -1, g.cache.dim});
  check_contiguous("q", q);
  check_query("q", q, g.cache);
  check_shape("out", out, {q.size(0), q.size(1) * g.cache.dim});
  check_contiguous("out", out);
  check_query("out", out, g.cache);
  g.tokens = q.size(0), g.heads = q.size(1);
  if (g.cache.dtype == DType::kS8 && g.cache.dim > 4096)
    TVM_FFI_THROW(ValueError) << "k: expected a head size of at most 4096 in int8, got " << g.cache.dim;
  if (g.heads < 1 || g.cache.dim < 1) TVM_FFI_THROW(ValueError) << "q: expected at least one head and one value";
  if (g.cache.kv_heads == 0 || g.heads % g.cache.kv_heads != 0)
    TVM_FFI_THROW(ValueError) << "k: expected a number of heads that divides q's " << g.heads << ", got "
                              << g.cache.kv_heads;
  g.rows = {nullptr, check_i32("seq", seq, g.tokens), check_i32("slot", slot, g.tokens)};
  g.q = q.data_ptr(), g.k = k.data_ptr(), g.v = v.data_ptr(), g.out = out.data_ptr();
  g.scale = static_cast<float>(scale);
  check_rows(g.rows, g.tokens, 0, g.cache);
  g.start = first_slots(start, g.rows, g.tokens, g.cache);
  if (g.tokens == 0) return;
  auto shared = std::make_shared<Shared>();
  run_or_record(
      "cache_attention", [g, shared](const Team& team) { attention_part(g, *shared, team); }, omp_get_max_threads());
}

}  // namespace
}  // namespace llmopt

TVM_FFI_DLL_EXPORT_TYPED_FUNC(cache_attention, llmopt::cache_attention);
