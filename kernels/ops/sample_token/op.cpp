// sample_token: temperature, top-k, top-p and min-p as one threshold on the logits, and a draw among what is above it.
//
// Logits are read once for the largest of each block. The k-th largest of those is a bound that k logits reach at least, so
// only blocks that reach it are read again, and only what reaches it is sorted. Without top-k the bound comes from the mass
// that top-p drops, or from min-p.
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
  // [rows][blocks], [rows][blocks], [rows], [rows][vocab], [rows][threads], [rows][vocab], [rows][threads]
  std::vector<float> maxima, sums, least;
  std::unique_ptr<int32_t[]> found;
  std::vector<int64_t> count;
  std::unique_ptr<float[]> sorted;
  std::vector<Drawn> drawn;

  int64_t blocks() const { return (vocab + kSampleBlock - 1) / kSampleBlock; }
  Settings settings_of(int64_t row) const { return {settings + row * settings_stride, vocab}; }
  // the largest logit; NaN where one is
  float top(int64_t row) const {
    float best = -INFINITY;
    for (int64_t b = 0; b < blocks(); ++b) {
      const float x = maxima[row * blocks() + b];
      if (std::isnan(x)) return x;
      best = std::max(best, x);
    }
    return best;
  }
  bool needs_mass(const Settings& s) const { return s.top_k == vocab && s.top_p < 1.0f; }
  void run(const Team& team);
  void find_maxima(const Team& team);
  void find_sums(const Team& team);
  float bound(int64_t row);
  void draw_among(const Team& team);
  void choose(int64_t row, int threads);
  float threshold(int64_t row, const Settings& s, float top, int64_t count, float* values) const;
};

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

// What no logit under it passes the filters.
float SampleJob::bound(int64_t row) {
  const Settings s = settings_of(row);
  const float* first = maxima.data() + row * blocks();
  if (!std::isfinite(top(row))) return INFINITY;
  if (s.top_k < vocab) {
    if (s.top_k > blocks()) return -INFINITY;
    float* held = sorted.get() + row * vocab;
    std::copy(first, first + blocks(), held);
    std::nth_element(held, held + s.top_k - 1, held + blocks(), std::greater<float>());
    return held[s.top_k - 1];
  }
  float weight = s.min_p;
  if (s.top_p < 1.0f) {
    float mass = 0;
    for (int64_t b = 0; b < blocks(); ++b) mass += sums[row * blocks() + b];
    // all that are lighter are together too light for top-p to keep one
    weight = std::max(weight, mass * (1.0f - s.top_p) / static_cast<float>(vocab));
  }
  return top(row) + (std::log(std::min(weight, 1.0f)) - kSlack) / s.scale;
}

void SampleJob::draw_among(const Team& team) {
  const auto& kernels = sample_token_kernels(active_isa());
  const Share mine = team.share(blocks());
  for (int64_t r = 0; r < rows; ++r) {
    const Settings s = settings_of(r);
    const float *x = logits + r * logits_stride, *q = noise + r * noise_stride;
    if (!s.filtered(vocab)) {
      const Share all = values_of(team, vocab, blocks());
      Drawn& best = drawn[r * most_threads + team.rank];
      best.index =
          all.begin + kernels.draw(x + all.begin, q + all.begin, all.end - all.begin, top(r), s.scale, &best.ratio);
      continue;
    }
    int32_t* out = found.get() + r * vocab + mine.begin * kSampleBlock;
    int64_t total = 0;
    for (int64_t b = mine.begin; b < mine.end; ++b) {
      if (!(maxima[r * blocks() + b] >= least[r])) continue;
      const int64_t begin = b * kSampleBlock;
      const int64_t kept = kernels.at_least(x + begin, std::min(kSampleBlock, vocab - begin), least[r], out + total);
      for (int64_t i = total; i < total + kept; ++i) out[i] += static_cast<int32_t>(begin);
      total += kept;
    }
    count[r * most_threads + team.rank] = total;
  }
}

// The smallest logit that is kept, from all that may be.
float SampleJob::threshold(int64_t row, const Settings& s, float top, int64_t count, float* values) const {
  float least = -INFINITY;
  if (s.top_k < count) {
    std::nth_element(values, values + s.top_k - 1, values + count, std::greater<float>());
    least = values[s.top_k - 1];
    // equals of the k-th stay
    count = std::partition(values, values + count, [=](float x) { return x >= least; }) - values;
  }
  const auto weight = [=](float x) { return std::exp((x - top) * s.scale); };
  if (s.top_p < 1.0f) {
    std::sort(values, values + count, std::greater<float>());
    float mass = 0, kept = 0;
    if (needs_mass(s)) {
      for (int64_t b = 0; b < blocks(); ++b) mass += sums[row * blocks() + b];
    } else {
      for (int64_t i = 0; i < count; ++i) mass += weight(values[i]);
    }
    for (int64_t i = 0; i < count && (i == 0 || kept < s.top_p * mass); ++i) {
      least = values[i];
      kept += weight(values[i]);
    }
  }
  if (s.min_p > 0.0f) {
    float lightest = top;
    for (int64_t i = 0; i < count; ++i) {
      if (values[i] < lightest && weight(values[i]) >= s.min_p) lightest = values[i];
    }
    least = std::max(least, lightest);
  }
  return least;
}

void SampleJob::choose(int64_t row, int threads) {
  const Settings s = settings_of(row);
  const float *x = logits + row * logits_stride, *q = noise + row * noise_stride;
  const float largest = top(row);
  Drawn best{-1.0f, 0};
  if (!std::isfinite(largest)) {
    ids[row] = 0;
    if (chosen != nullptr) chosen[row] = -1;
    return;
  }
  if (!s.filtered(vocab)) {
    for (int t = 0; t < threads; ++t) {
      const Drawn& other = drawn[row * most_threads + t];
      if (other.ratio > best.ratio) best = other;
    }
  } else {
    float* values = sorted.get() + row * vocab;
    const auto each = [&](auto&& see) {
      for (int t = 0; t < threads; ++t) {
        const int32_t* part = found.get() + row * vocab + share_of(blocks(), t, threads).begin * kSampleBlock;
        for (int64_t i = 0; i < count[row * most_threads + t]; ++i) see(part[i]);
      }
    };
    int64_t total = 0;
    each([&](int32_t i) { values[total++] = x[i]; });
    const float lightest = threshold(row, s, largest, total, values);
    each([&](int32_t i) {
      if (!(x[i] >= lightest)) return;
      const float ratio = std::exp((x[i] - largest) * s.scale) / std::max(q[i], kLeastNoise);
      if (ratio > best.ratio) best = {ratio, i};
    });
  }
  ids[row] = best.index;
  if (chosen != nullptr) chosen[row] = best.index;
}

void SampleJob::run(const Team& team) {
  find_maxima(team);
  team.sync();
  bool any = false;
  for (int64_t r = 0; r < rows; ++r) any = any || needs_mass(settings_of(r));
  if (any) {
    find_sums(team);
    team.sync();
  }
  const Share mine = team.share(rows);
  for (int64_t r = mine.begin; r < mine.end; ++r) least[r] = bound(r);
  team.sync();
  draw_among(team);
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
  job->least.resize(static_cast<size_t>(job->rows));
  job->count.resize(static_cast<size_t>(job->rows * job->most_threads));
  job->drawn.resize(job->count.size());
  // room for a filter that leaves everything; pages that are not needed are never touched
  job->found.reset(new int32_t[static_cast<size_t>(job->rows * job->vocab)]);
  job->sorted.reset(new float[static_cast<size_t>(job->rows * job->vocab)]);
  run_or_record(
      "sample_token", [job](const Team& team) { job->run(team); }, threads_for(job->rows * job->vocab, 65536));
}

}  // namespace
}  // namespace llmopt

TVM_FFI_DLL_EXPORT_TYPED_FUNC(sample_token, llmopt::sample_token);
