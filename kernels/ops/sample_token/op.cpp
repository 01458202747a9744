// sample_token: temperature, top-k, top-p and min-p as one threshold on the logits, and a draw among what is above it.
//
// Logits are read once for the largest of each block. The k-th largest of those is a bound that k logits reach at least, so
// only blocks that reach it are read again, and only what reaches it is looked at for the threshold. Without top-k the bound
// comes from the mass that top-p drops, or from min-p. Blocks that reach the threshold are read for the draw.
#include "sample_token.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <functional>
#include <memory>
#include <vector>

#include "cache_rows.h"

namespace llmopt {
namespace {

// bounds are lowered by so much of a weight's logarithm: weights themselves decide
constexpr float kSlack = 1e-3f;

struct Settings {
  float scale;  // 1 / temperature
  int64_t top_k;
  float top_p, min_p;  // 1 and 0: no filter

  Settings(const float* given, int64_t vocab) {
    scale = given[0] > 1e-37f ? 1.0f / given[0] : FLT_MAX;
    top_k = given[1] >= 1.0f && given[1] < static_cast<float>(vocab) ? static_cast<int64_t>(given[1]) : vocab;
    top_p = given[2] < 1.0f ? given[2] : 1.0f;
    min_p = given[3] > 0.0f ? given[3] : 0.0f;
  }
  bool filtered(int64_t vocab) const { return top_k < vocab || top_p < 1.0f || min_p > 0.0f; }
};

struct Drawn {
  float ratio;
  int64_t index;
};

struct SampleJob {
  const float *logits, *noise, *settings;
  int64_t rows, vocab, logits_stride, noise_stride, settings_stride;
  int64_t *ids, *chosen;  // chosen may be null
  int most_threads;
  // [rows][blocks], [rows][blocks], [rows][vocab], [rows][blocks], [rows], [rows][threads]
  std::vector<float> maxima, sums;
  std::unique_ptr<float[]> found;
  std::vector<int64_t> count;
  std::vector<float> least;
  std::vector<Drawn> drawn;

  int64_t blocks() const { return (vocab + kSampleBlock - 1) / kSampleBlock; }
  int64_t size_of(int64_t block) const { return std::min(kSampleBlock, vocab - block * kSampleBlock); }
  Settings settings_of(int64_t row) const { return {settings + row * settings_stride, vocab}; }
  bool needs_mass(const Settings& s) const { return s.top_k == vocab && s.top_p < 1.0f; }
  float top(int64_t row) const;
  void run(const Team& team);
  void find_maxima(const Team& team);
  void find_sums(const Team& team);
  float bound(int64_t row);
  void find_values(const Team& team);
  float threshold(int64_t row);
  void draw(const Team& team);
  void choose(int64_t row, int threads);
};

// the largest logit; NaN where one is
float SampleJob::top(int64_t row) const {
  float best = -INFINITY;
  for (int64_t b = 0; b < blocks(); ++b) {
    const float x = maxima[row * blocks() + b];
    if (std::isnan(x)) return x;
    best = std::max(best, x);
  }
  return best;
}

// logits of a row that a thread takes: whole blocks
Share values_of(const Team& team, int64_t vocab, int64_t blocks) {
  const Share mine = team.share(blocks);
  return {mine.begin * kSampleBlock, std::min(mine.end * kSampleBlock, vocab)};
}

void SampleJob::find_maxima(const Team& team) {
  const Share mine = values_of(team, vocab, blocks());
  for (int64_t r = 0; r < rows; ++r) {
    sample_token_kernels(active_isa())
        .maxima(logits + r * logits_stride + mine.begin, mine.end - mine.begin,
                maxima.data() + r * blocks() + mine.begin / kSampleBlock);
  }
}

void SampleJob::find_sums(const Team& team) {
  const Share mine = values_of(team, vocab, blocks());
  for (int64_t r = 0; r < rows; ++r) {
    const Settings s = settings_of(r);
    if (!needs_mass(s)) continue;
    sample_token_kernels(active_isa())
        .sums(logits + r * logits_stride + mine.begin, mine.end - mine.begin, top(r), s.scale,
              sums.data() + r * blocks() + mine.begin / kSampleBlock);
  }
}

float sum(const float* x, int64_t n) {
  float total = 0;
  for (int64_t i = 0; i < n; ++i) total += x[i];
  return total;
}

// What no logit under it passes the filters.
float SampleJob::bound(int64_t row) {
  const Settings s = settings_of(row);
  const float* first = maxima.data() + row * blocks();
  if (!s.filtered(vocab)) return -INFINITY;
  if (!std::isfinite(top(row))) return INFINITY;
  if (s.top_k < vocab) {
    if (s.top_k > blocks()) return -INFINITY;
    float* held = found.get() + row * vocab;
    std::copy(first, first + blocks(), held);
    std::nth_element(held, held + s.top_k - 1, held + blocks(), std::greater<float>());
    return held[s.top_k - 1];
  }
  float weight = s.min_p;
  if (s.top_p < 1.0f) {
    const float mass = sum(sums.data() + row * blocks(), blocks());
    // all that are lighter are together too light for top-p to keep one
    weight = std::max(weight, mass * (1.0f - s.top_p) / static_cast<float>(vocab));
  }
  return top(row) + (std::log(std::min(weight, 1.0f)) - kSlack) / s.scale;
}

// Of each block that reaches the bound, the values that do, where the block stands in the row.
void SampleJob::find_values(const Team& team) {
  const Share mine = team.share(blocks());
  for (int64_t r = 0; r < rows; ++r) {
    if (!settings_of(r).filtered(vocab)) continue;
    for (int64_t b = mine.begin; b < mine.end; ++b) {
      const int64_t at = r * blocks() + b, begin = b * kSampleBlock;
      count[at] = 0;
      if (!(maxima[at] >= least[r])) continue;
      count[at] =
          sample_token_kernels(active_isa())
              .at_least(logits + r * logits_stride + begin, size_of(b), least[r], found.get() + r * vocab + begin);
    }
  }
}

// The sum of weights of values, in their order.
float mass_of(const float* values, int64_t n, float top, float scale) {
  constexpr int64_t kAtOnce = 32 * kSampleBlock;
  float parts[32], total = 0;
  for (int64_t begin = 0; begin < n; begin += kAtOnce) {
    const int64_t size = std::min(kAtOnce, n - begin);
    sample_token_kernels(active_isa()).sums(values + begin, size, top, scale, parts);
    total += sum(parts, (size + kSampleBlock - 1) / kSampleBlock);
  }
  return total;
}

// The smallest of the fewest largest values whose weights reach `target`; their order changes. Quickselect by mass.
float nucleus(float* values, int64_t n, float target, float top, float scale) {
  constexpr int64_t kSorted = 64;
  float before = 0;
  while (n > kSorted) {
    float probes[3] = {values[0], values[n / 2], values[n - 1]};
    std::sort(probes, probes + 3);
    const float pivot = probes[1];
    float* equal = std::partition(values, values + n, [=](float x) { return x > pivot; });
    float* smaller = std::partition(equal, values + n, [=](float x) { return x == pivot; });
    const float larger_mass = mass_of(values, equal - values, top, scale);
    const float equal_mass = mass_of(equal, smaller - equal, top, scale);
    if (before + larger_mass >= target && equal != values) {
      n = equal - values;
    } else if (before + larger_mass + equal_mass >= target || smaller == values + n) {
      return pivot;
    } else {
      before += larger_mass + equal_mass;
      n -= smaller - values;
      values = smaller;
    }
  }
  std::sort(values, values + n, std::greater<float>());
  float last = values[0];
  for (int64_t i = 0; i < n && (i == 0 || before < target); ++i) {
    last = values[i];
    before += std::exp((last - top) * scale);
  }
  return last;
}

// The smallest logit that is kept.
float SampleJob::threshold(int64_t row) {
  const Settings s = settings_of(row);
  const float largest = top(row);
  if (!s.filtered(vocab)) return -INFINITY;
  if (!std::isfinite(largest)) return INFINITY;
  float* values = found.get() + row * vocab;
  int64_t n = 0;
  for (int64_t b = 0; b < blocks(); ++b) {
    const float* from = values + b * kSampleBlock;
    const int64_t some = count[row * blocks() + b];
    if (from != values + n) std::copy(from, from + some, values + n);
    n += some;
  }
  float kept = least[row];
  if (s.top_k < n) {
    std::nth_element(values, values + s.top_k - 1, values + n, std::greater<float>());
    kept = values[s.top_k - 1];
    // equals of the k-th stay
    n = std::partition(values, values + n, [=](float x) { return x >= kept; }) - values;
  }
  if (s.top_p < 1.0f) {
    const float mass =
        needs_mass(s) ? sum(sums.data() + row * blocks(), blocks()) : mass_of(values, n, largest, s.scale);
    kept = std::max(kept, nucleus(values, n, s.top_p * mass, largest, s.scale));
  }
  if (s.min_p > 0.0f) {
    float lightest = largest;
    for (int64_t i = 0; i < n; ++i) {
      if (values[i] < lightest && std::exp((values[i] - largest) * s.scale) >= s.min_p) lightest = values[i];
    }
    kept = std::max(kept, lightest);
  }
  return kept;
}

void SampleJob::draw(const Team& team) {
  const Share mine = team.share(blocks());
  for (int64_t r = 0; r < rows; ++r) {
    const float largest = top(r), scale = settings_of(r).scale;
    Drawn best{-1.0f, 0};
    for (int64_t b = mine.begin; b < mine.end; ++b) {
      if (!(maxima[r * blocks() + b] >= least[r])) continue;
      const int64_t begin = b * kSampleBlock;
      const int64_t at = sample_token_kernels(active_isa())
                             .draw(logits + r * logits_stride + begin, noise + r * noise_stride + begin, size_of(b),
                                   largest, scale, least[r], &best.ratio);
      if (at >= 0) best.index = begin + at;
    }
    drawn[r * most_threads + team.rank] = best;
  }
}

void SampleJob::choose(int64_t row, int threads) {
  const bool possible = std::isfinite(top(row));
  Drawn best{-1.0f, 0};
  for (int t = 0; t < threads; ++t) {
    const Drawn& other = drawn[row * most_threads + t];
    if (other.ratio > best.ratio) best = other;
  }
  ids[row] = possible ? best.index : 0;
  if (chosen != nullptr) chosen[row] = possible ? best.index : -1;
}

void SampleJob::run(const Team& team) {
  bool filtered = false, mass = false;
  for (int64_t r = 0; r < rows; ++r) {
    const Settings s = settings_of(r);
    filtered = filtered || s.filtered(vocab), mass = mass || needs_mass(s);
  }
  const Share mine = team.share(rows);
  find_maxima(team);
  team.sync();
  if (mass) {
    find_sums(team);
    team.sync();
  }
  for (int64_t r = mine.begin; r < mine.end; ++r) least[r] = bound(r);
  team.sync();
  if (filtered) {
    find_values(team);
    team.sync();
    for (int64_t r = mine.begin; r < mine.end; ++r) least[r] = threshold(r);
    team.sync();
  }
  draw(team);
  team.sync();
  for (int64_t r = mine.begin; r < mine.end; ++r) choose(r, team.size);
}

using tvm::ffi::Optional;

void sample_token(TensorView logits, TensorView noise, TensorView settings, TensorView ids,
                  Optional<TensorView> chosen) {
  check_cpu("ids", ids), check_i64("ids", ids), check_shape("ids", ids, {-1});
  auto job = std::make_shared<SampleJob>();
  job->rows = ids.size(0);
  job->logits = check_floats("logits", logits, {job->rows, -1});
  job->vocab = logits.size(1);
  if (job->vocab == 0) TVM_FFI_THROW(ValueError) << "logits: expected at least one column";
  job->noise = check_floats("noise", noise, {job->rows, job->vocab});
  job->settings = check_floats("settings", settings, {job->rows, 4});
  job->logits_stride = logits.stride(0), job->noise_stride = noise.stride(0);
  job->settings_stride = settings.stride(0);
  job->ids = static_cast<int64_t*>(ids.data_ptr());
  job->chosen = nullptr;
  if (chosen.has_value()) {
    check_cpu("chosen", *chosen), check_i64("chosen", *chosen), check_shape("chosen", *chosen, {job->rows});
    job->chosen = static_cast<int64_t*>((*chosen).data_ptr());
  }
  job->most_threads = omp_get_max_threads();
  job->maxima.resize(static_cast<size_t>(job->rows * job->blocks()));
  job->sums.resize(job->maxima.size());
  job->count.resize(job->maxima.size());
  job->least.resize(static_cast<size_t>(job->rows));
  job->drawn.resize(static_cast<size_t>(job->rows * job->most_threads));
  // room for a filter that leaves everything; pages that are not needed are never touched
  job->found.reset(new float[static_cast<size_t>(job->rows * job->vocab)]);
  run_or_record(
      "sample_token", [job](const Team& team) { job->run(team); }, threads_for(job->rows * job->vocab, 65536));
}

}  // namespace
}  // namespace llmopt

TVM_FFI_DLL_EXPORT_TYPED_FUNC(sample_token, llmopt::sample_token);
