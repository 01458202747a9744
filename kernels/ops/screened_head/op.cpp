// screened_head: the greedy token of an 8-bit head, its rows looked at in 4 bits, and exactly only where one of them may win.
#include "screened_head.h"

#include <cmath>

#include "cache_rows.h"
#include "linear_job.h"

namespace llmopt {
namespace {

using tvm::ffi::Optional;

// Tiles whose products are held between the product and their bounds: their scales, read twice, stay in the caches, and
// streams through so few lie close together, which memory is faster at.
constexpr int64_t kHeldTiles = 32;

// what a call needs between its steps; a recorded one keeps it
struct Buffers {
  Scratch tokens;                            // quantized, where threads prepare them together
  std::vector<float> shift, energy, offset;  // [tokens][groups], likewise
  std::vector<float> upper;                  // [tokens][tiles]
  std::vector<Candidate> coarse, exact;      // [tokens][threads]
  std::vector<Candidate> guess;              // [tokens]
};

struct ScreenJob {
  LinearJob product;  // with the high plane
  QuantWeight whole;
  float margin;
  int64_t* ids;
  int32_t* scored;  // [tokens], or null
  int64_t most_threads;
  std::shared_ptr<Buffers> buffers;

  int64_t tokens() const { return product.tokens; }
  int64_t tiles() const { return whole.num_tiles(); }
  int64_t groups() const { return whole.num_groups(); }
  float* upper(int64_t token) const { return buffers->upper.data() + token * tiles(); }
  Candidate* coarse(int64_t token) const { return buffers->coarse.data() + token * most_threads; }
  Candidate* exact(int64_t token) const { return buffers->exact.data() + token * most_threads; }
};

// argmax's order, as torch has it: a NaN is the largest, and the first of equals wins
bool wins(const Candidate& a, const Candidate& b) {
  if (std::isnan(a.value) || std::isnan(b.value)) {
    if (std::isnan(a.value) != std::isnan(b.value)) return std::isnan(a.value);
    return a.index < b.index;
  }
  return a.value > b.value || (a.value == b.value && a.index < b.index);
}

Candidate best_of(const float* logits, int64_t first, int64_t count) {
  Candidate best{logits[0], first};
  for (int64_t i = 1; i < count; ++i) {
    const Candidate other{logits[i], first + i};
    if (wins(other, best)) best = other;
  }
  return best;
}

// the head's own logits of one tile, and the best of them
Candidate score_tile(const ScreenJob& job, const QuantTokens& x, int64_t token, int64_t tile) {
  alignas(64) float logits[16];
  tiles_product({true, job.whole, {}}, {x.from(token), nullptr}, 1, {tile, tile + 1},
                {logits - 16 * tile, 16, 0, nullptr});
  return best_of(logits, 16 * tile, std::min<int64_t>(16, job.whole.rows - 16 * tile));
}

ScreenTerms terms_of(const ScreenTerms& all, int64_t token, int64_t groups) {
  return {all.shift + token * groups, all.energy + token * groups, all.offset + token * groups};
}

// quantized tokens and their terms
struct Screened {
  PreparedTokens tokens;
  ScreenTerms terms;
};

Screened prepare(const ScreenJob& job, const Team& team) {
  static thread_local Scratch own, own_terms;
  const int64_t tokens = job.tokens(), groups = job.groups();
  const bool shared = tokens > kOwnTokens && team.size > 1;
  Screened x{job.product.shared, {job.buffers->shift.data(), job.buffers->energy.data(), job.buffers->offset.data()}};
  if (!shared) {
    x.tokens = token_buffers(own, job.product, tokens);
    auto* values = reinterpret_cast<float*>(own_terms.get(static_cast<size_t>(tokens * groups) * 12));
    x.terms = {values, values + tokens * groups, values + 2 * tokens * groups};
  }
  const Share mine = shared ? team.share(tokens) : Share{0, tokens};
  prepare_tokens(job.product, mine, x.tokens);
  for (int64_t m = mine.begin; m < mine.end; ++m)
    screen_kernels(active_isa()).terms(x.tokens.quant, m, job.whole, job.margin, terms_of(x.terms, m, groups));
  if (shared) team.sync();
  return x;
}

// Bounds of this thread's tiles, for all tokens.
void screen_tiles(const ScreenJob& job, const Screened& x, const Team& team) {
  static thread_local Scratch scratch;
  const ScreenKernels& kernels = screen_kernels(active_isa());
  const LinearWeight& plane = job.product.weights[0];
  const int64_t tokens = job.tokens();
  PreparedTokens seen = x.tokens;
  seen.quant.offsets = x.terms.offset;
  const Share mine = team.share(job.tiles());
  auto* products = reinterpret_cast<float*>(scratch.get(static_cast<size_t>(tokens * kHeldTiles * 16) * 4));
  for (int64_t m = 0; m < tokens; ++m) job.coarse(m)[team.rank] = {-INFINITY, mine.begin};
  for (int64_t t = mine.begin; t < mine.end; t += kHeldTiles) {
    const int64_t end = std::min(t + kHeldTiles, mine.end);
    tiles_product(plane, seen, tokens, {t, end}, {products - 16 * t, 16 * kHeldTiles, 0, nullptr});
    for (int64_t m = 0; m < tokens; ++m) {
      float* product = products + m * 16 * kHeldTiles;
      for (int64_t row = job.whole.rows; row < 16 * end; ++row) product[row - 16 * t] = -INFINITY;
      kernels.bounds(plane.quant, t, end, product, terms_of(x.terms, m, job.groups()), job.upper(m),
                     job.coarse(m)[team.rank]);
    }
  }
}

// Exact logits of the tile that looks best: what every other row has to reach.
Candidate first_guess(const ScreenJob& job, const QuantTokens& x, int64_t token, const Team& team) {
  const Candidate* parts = job.coarse(token);
  int best = 0;
  for (int i = 1; i < team.size; ++i) best = parts[i].value > parts[best].value ? i : best;
  // a thread without tiles has none to offer
  return score_tile(job, x, token, std::min(parts[best].index, job.tiles() - 1));
}

// Scores this thread's part of the tiles that may hold a row as good as the guess: every team.size-th, since neighbours
// in a vocabulary tend to come up together.
Candidate score_candidates(const ScreenJob& job, const QuantTokens& x, int64_t token, const Team& team) {
  const ScreenKernels& kernels = screen_kernels(active_isa());
  Candidate best = job.buffers->guess[static_cast<size_t>(token)];
  const float least = best.value;
  int32_t count = 0;
  for (int64_t t = 0; (t = kernels.find(job.upper(token), t, job.tiles(), least)) < job.tiles(); ++t) {
    if (count++ % team.size != team.rank) continue;
    const Candidate other = score_tile(job, x, token, t);
    if (wins(other, best)) best = other;
  }
  if (job.scored && team.rank == 0) job.scored[token] = count;
  return best;
}

void screen_part(const ScreenJob& job, const Team& team) {
  const Screened x = prepare(job, team);
  screen_tiles(job, x, team);
  team.sync();
  const int64_t tokens = job.tokens();
  const Share mine = team.share(tokens);
  for (int64_t m = mine.begin; m < mine.end; ++m)
    job.buffers->guess[static_cast<size_t>(m)] = first_guess(job, x.tokens.quant, m, team);
  team.sync();
  for (int64_t m = 0; m < tokens; ++m) job.exact(m)[team.rank] = score_candidates(job, x.tokens.quant, m, team);
  team.sync();
  for (int64_t m = mine.begin; m < mine.end; ++m) {
    Candidate best = job.exact(m)[0];
    for (int i = 1; i < team.size; ++i)
      if (wins(job.exact(m)[i], best)) best = job.exact(m)[i];
    job.ids[m] = best.index;
  }
}

void screened_head(TensorView x, Optional<TensorView> norm, double eps, TensorView packed, int64_t rows, int64_t group,
                   double margin, TensorView ids, Optional<TensorView> scored) {
  check_cpu("x", x), check_shape("x", x, {-1, -1});
  const int64_t tokens = x.size(0), cols = x.size(1);
  ScreenJob job{};
  job.whole = quant_weight("packed", packed, rows, cols, group, 8, false);
  check_shape("packed", packed, {job.whole.num_tiles(), job.whole.tile_bytes()});
  QuantWeight plane = job.whole;
  plane.bits = 4;
  job.product.x = {x.data_ptr(), static_cast<int>(float_dtype("x", x)), x.stride(0), cols};
  if (norm.has_value()) {
    check_cpu("norm", *norm), check_shape("norm", *norm, {cols});
    if (float_dtype("norm", *norm) != DType::kF32) TVM_FFI_THROW(ValueError) << "norm: expected dtype float32";
    job.product.x.norm = static_cast<const float*>((*norm).data_ptr()), job.product.x.eps = static_cast<float>(eps);
  }
  job.product.tokens = tokens;
  job.product.weights = {{true, plane, {}}};
  if (!(margin >= 0)) TVM_FFI_THROW(ValueError) << "margin: expected at least 0, got " << margin;
  job.margin = static_cast<float>(margin);
  check_cpu("ids", ids), check_i64("ids", ids), check_shape("ids", ids, {tokens});
  job.ids = static_cast<int64_t*>(ids.data_ptr());
  if (scored.has_value()) job.scored = const_cast<int32_t*>(check_i32("scored", *scored, tokens));
  if (tokens == 0) return;
  job.most_threads = omp_get_max_threads();
  job.buffers = std::make_shared<Buffers>();
  job.product.shared = token_buffers(job.buffers->tokens, job.product, tokens);
  job.buffers->shift.resize(static_cast<size_t>(tokens * job.groups()));
  job.buffers->energy.resize(static_cast<size_t>(tokens * job.groups()));
  job.buffers->offset.resize(static_cast<size_t>(tokens * job.groups()));
  job.buffers->upper.resize(static_cast<size_t>(tokens * job.tiles()));
  job.buffers->coarse.resize(static_cast<size_t>(tokens * job.most_threads));
  job.buffers->exact.resize(static_cast<size_t>(tokens * job.most_threads));
  job.buffers->guess.resize(static_cast<size_t>(tokens));
  const int threads = threads_for(job.tiles() * plane.plane_bytes() * ((tokens + 3) / 4), kBytesPerThread);
  run_or_record("screened_head", [job = std::move(job)](const Team& team) { screen_part(job, team); }, threads);
}

}  // namespace
}  // namespace llmopt

TVM_FFI_DLL_EXPORT_TYPED_FUNC(screened_head, llmopt::screened_head);
