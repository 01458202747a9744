// latent_attention: attention of ragged rows over the latent cache. Rows of one sequence that follow each other are one
// causal run; rows and keys are cut into jobs, and the results for different keys are combined.
#include "latent_attention.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "latent_rows.h"
#include "scratch.h"

namespace llmopt {
namespace {

// most rows of one job: their queries and values stay in L2
constexpr int64_t kMostRows = 128;
// most parts that the keys are cut into
constexpr int64_t kMostSplits = 16;

struct Given {
  LatentParams params;
  TokenRows rows;
  const int32_t* start;  // first slot a sequence's rows may see, or null
  int64_t tokens;
  int dtype;
};

// A run: tokens [token, token + count) of one sequence, the first at `slot`, that see its keys from `start` on.
struct Run {
  int64_t token, count, seq, slot, start;
  int64_t tile_rows, num_tiles, key_steps, num_splits;  // key_steps: of LatentKernels::tile_keys
  int64_t first_job;

  int64_t jobs() const { return num_tiles * num_splits; }
};

int64_t ceil_to(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// The cut follows from the run alone: any number of threads gives the same bits, and so does any company in the batch.
void cut(int64_t heads, const LatentKernels& kernels, Run& run) {
  const int64_t rows = run.count * heads, keys = run.slot + run.count - run.start;
  run.num_tiles = (rows + kMostRows - 1) / kMostRows;
  run.tile_rows = std::min(rows, ceil_to((rows + run.num_tiles - 1) / run.num_tiles, kLanes));
  run.num_tiles = (rows + run.tile_rows - 1) / run.tile_rows;
  // few keys are still worth several threads, where there is no other work for them
  const bool is_short = keys < 2 * kernels.fewest_keys && run.num_tiles == 1;
  run.key_steps = (keys + kernels.tile_keys - 1) / kernels.tile_keys;
  run.num_splits = is_short ? run.key_steps : std::clamp<int64_t>(keys / kernels.fewest_keys, 1, kMostSplits);
}

void find_runs(const Given& g, const LatentKernels& kernels, std::vector<Run>& runs) {
  runs.clear();
  for (int64_t t = 0; t < g.tokens; ++t) {
    const int64_t seq = g.rows.seq[t], slot = g.rows.slot[t];
    if (!runs.empty() && runs.back().seq == seq && runs.back().slot + runs.back().count == slot) {
      ++runs.back().count;
    } else {
      runs.push_back({t, 1, seq, slot, g.start ? g.start[seq] : 0, 0, 0, 0, 0, 0});
    }
  }
  int64_t jobs = 0;
  for (Run& run : runs) {
    cut(g.params.heads, kernels, run);
    run.first_job = jobs;
    jobs += run.jobs();
  }
}

struct Shared {
  const LatentKernels* kernels = nullptr;
  float* partials = nullptr;
  int64_t stride = 0;  // floats between partial results
  std::vector<Run> runs;
  int64_t jobs = 0, chunk = 1, scratch = 0;  // chunk: jobs that a thread takes at once
  std::atomic<int64_t> next{0};

  float* partial(int64_t job) { return partials + job * stride; }
};

LatentJob job_at(const Given& g, const Run& run, int64_t index, Shared& shared, bool follows) {
  const int64_t split = index % run.num_splits, row = index / run.num_splits * run.tile_rows;
  const Share steps = share_of(run.key_steps, static_cast<int>(split), static_cast<int>(run.num_splits));
  const int64_t tile = shared.kernels->tile_keys;
  return {run.token,
          run.seq,
          run.slot,
          row,
          std::min(row + run.tile_rows, run.count * g.params.heads),
          run.start + steps.begin * tile,
          std::min(run.start + steps.end * tile, run.slot + run.count),
          run.num_splits > 1 ? shared.partial(run.first_job + index) : nullptr,
          follows && split > 0};
}

// `memory`: of the thread that plans, one for all ops: their partial results are in its cache when the next ones come
void plan(const Given& g, Shared& shared, Scratch& memory, int threads) {
  shared.kernels = &latent_kernels(active_isa(), g.dtype);
  find_runs(g, *shared.kernels, shared.runs);
  shared.stride = shared.scratch = 0;
  for (const Run& run : shared.runs) {
    const LatentSizes sizes = shared.kernels->sizes(g.params, run.tile_rows);
    shared.scratch = std::max(shared.scratch, sizes.scratch);
    if (run.num_splits > 1) shared.stride = std::max(shared.stride, sizes.partial);
  }
  shared.jobs = shared.runs.back().first_job + shared.runs.back().jobs();
  shared.chunk = std::max<int64_t>(1, shared.jobs / (2 * threads));
  shared.next = 0;
  const size_t bytes = static_cast<size_t>(shared.jobs * shared.stride) * sizeof(float);
  shared.partials = reinterpret_cast<float*>(memory.get(bytes));
}

// Partial results are put together as a tree: neighbours, then neighbours among those. Whoever has made both sides of a
// node does it at once, while they are in its cache, and the rest is left to the end: the tree is always the same one, and
// so are the bits.
void attend(const Given& g, Shared& shared, float* scratch, int64_t begin, int64_t end) {
  const auto after = [](int64_t i, const Run& run) { return i < run.first_job; };
  for (int64_t index = begin; index < end; ++index) {
    const Run& run = *(std::upper_bound(shared.runs.begin(), shared.runs.end(), index, after) - 1);
    LatentJob job = job_at(g, run, index - run.first_job, shared, index > begin);
    shared.kernels->attend(g.params, job, scratch);
    const int64_t done = (index - run.first_job) % run.num_splits + 1;
    for (int64_t k = 1; done % (2 * k) == 0 && index + 1 - 2 * k >= begin; k *= 2) {
      job.partial = shared.partial(index + 1 - 2 * k);
      shared.kernels->merge(g.params, job, shared.partial(index + 1 - k), 0, job.row_end - job.row_begin);
    }
  }
}

// what attend() has left of one row's tree
void merge_rest(const Given& g, Shared& shared, const Run& run, LatentJob job, int64_t first, int64_t row) {
  for (int64_t k = 1; k < run.num_splits; k *= 2)
    for (int64_t split = 0; split + k < run.num_splits; split += 2 * k) {
      const int64_t left = first + split;
      if (split + 2 * k <= run.num_splits && left / shared.chunk == (left + 2 * k - 1) / shared.chunk) continue;
      job.partial = shared.partial(left);
      shared.kernels->merge(g.params, job, shared.partial(left + k), row, row + 1);
    }
}

void combine(const Given& g, Shared& shared, float* scratch, const Team& team) {
  for (const Run& run : shared.runs) {
    if (run.num_splits == 1) continue;
    const Share mine = team.share(run.count * g.params.heads);
    for (int64_t row = mine.begin; row < mine.end; ++row) {
      const int64_t first = row / run.tile_rows * run.num_splits;
      const LatentJob job = job_at(g, run, first, shared, false);
      merge_rest(g, shared, run, job, run.first_job + first, row - job.row_begin);
      shared.kernels->write(g.params, job, row, scratch);
    }
  }
}

void attention_part(const Given& g, Shared& shared, const Team& team) {
  static thread_local Scratch thread_scratch, partials;
  if (team.rank == 0) plan(g, shared, partials, team.size);
  team.sync();
  float* scratch = reinterpret_cast<float*>(thread_scratch.get(static_cast<size_t>(shared.scratch) * sizeof(float)));
  for (int64_t begin; (begin = shared.next.fetch_add(shared.chunk)) < shared.jobs;)
    attend(g, shared, scratch, begin, std::min(begin + shared.chunk, shared.jobs));
  team.sync();
  combine(g, shared, scratch, team);
}

void latent_attention(TensorView query, TensorView cache, tvm::ffi::Optional<TensorView> latent_scale, TensorView seq,
                      TensorView slot, tvm::ffi::Optional<TensorView> start, double scale, TensorView out) {
  check_shape("out", out, {-1, -1, -1});
  const CacheShape shape = latent_cache_shape(cache, latent_scale, latent_rope(cache, out.size(2)));
  Given g{};
  check_cpu("query", query), check_cpu("out", out);
  check_shape("query", query, {-1, -1, shape.dim});
  check_contiguous("query", query);
  check_query("query", query, shape, "cache");
  g.tokens = query.size(0);
  LatentParams& p = g.params;
  p.heads = query.size(1), p.dim = shape.dim;
  check_floats("out", out, {g.tokens, p.heads, -1});
  check_contiguous("out", out);
  p.rank = out.size(2);
  if (p.heads < 1) TVM_FFI_THROW(ValueError) << "query: expected at least one head";
  p.query = query.data_ptr(), p.cache = cache.data_ptr(), p.out = static_cast<float*>(out.data_ptr());
  p.row = cache.size(2), p.scales = shape.k_scale, p.scale_stride = shape.capacity;
  p.seq_stride = shape.seq_stride, p.scale = static_cast<float>(scale);
  g.rows = {nullptr, check_i32("seq", seq, g.tokens), check_i32("slot", slot, g.tokens)};
  g.dtype = static_cast<int>(shape.dtype);
  check_rows(g.rows, g.tokens, 0, shape);
  g.start = first_slots(start, g.rows, g.tokens, shape);
  if (g.tokens == 0) return;
  auto shared = std::make_shared<Shared>();
  run_or_record(
      "latent_attention", [g, shared](const Team& team) { attention_part(g, *shared, team); }, omp_get_max_threads());
}

}  // namespace
}  // namespace llmopt

TVM_FFI_DLL_EXPORT_TYPED_FUNC(latent_attention, llmopt::latent_attention);
