// From one token's router logits to its experts and their weights, for every published family:
//
//   scores = softmax or sigmoid of the logits; what is chosen by is score + correction bias, what is weighted by the score.
//   groups of experts: only the best `kept_groups` are open; a group counts as the sum of its best one or two.
//   weights = scores of the chosen [/ max(their sum + sum_eps, sum_min)] * scale
//
// A few hundred scalar operations a token, beside megabytes of weights: no vectors, the same bits on every instruction set.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace llmopt {

constexpr int kMaxExperts = 1024;
constexpr int kMaxChoices = 64;

struct Routing {
  int experts, top_k;
  bool sigmoid;
  int groups, kept_groups, group_best;  // group_best: 1 or 2
  bool renormalize;
  float sum_eps, sum_min, scale;
  const float* bias;  // [experts], or null
};

// logits become scores
inline void score(const Routing& r, float* x) {
  if (r.sigmoid) {
    for (int e = 0; e < r.experts; ++e) x[e] = 1.0f / (1.0f + std::exp(-x[e]));
    return;
  }
  const float top = *std::max_element(x, x + r.experts);
  double sum = 0.0;
  for (int e = 0; e < r.experts; ++e) sum += x[e] = std::exp(x[e] - top);
  const auto whole = static_cast<float>(sum);
  for (int e = 0; e < r.experts; ++e) x[e] /= whole;
}

// The largest open value, the first of equals. With NaN about it is some open one: its weight will say NaN.
inline int best_open(const float* values, const bool* open, int n) {
  int best = -1;
  for (int i = 0; i < n; ++i)
    if (open[i] && (best < 0 || values[i] > values[best])) best = i;
  return best;
}

inline float group_score(const float* values, int n, int count) {
  float first = values[0], second = -std::numeric_limits<float>::infinity();
  for (int i = 1; i < n; ++i) {
    second = std::max(second, std::min(first, values[i]));
    first = std::max(first, values[i]);
  }
  return count == 1 ? first : first + second;
}

// opens the experts of the best groups
inline void open_groups(const Routing& r, const float* choice, bool* open) {
  const int size = r.experts / r.groups;
  float scores[kMaxExperts];
  bool left[kMaxExperts];
  for (int g = 0; g < r.groups; ++g) {
    scores[g] = group_score(choice + g * size, size, r.group_best);
    left[g] = true;
  }
  std::fill(open, open + r.experts, false);
  for (int i = 0; i < r.kept_groups; ++i) {
    const int g = best_open(scores, left, r.groups);
    left[g] = false;
    std::fill(open + g * size, open + (g + 1) * size, true);
  }
}

// index and weights: [top_k]; logits become scores on the way
inline void route_token(const Routing& r, float* logits, int32_t* index, float* weights) {
  float biased[kMaxExperts];
  bool open[kMaxExperts];
  score(r, logits);
  for (int e = 0; r.bias && e < r.experts; ++e) biased[e] = logits[e] + r.bias[e];
  const float* choice = r.bias ? biased : logits;
  std::fill(open, open + r.experts, true);
  if (r.kept_groups < r.groups) open_groups(r, choice, open);
  float sum = 0.0f;
  for (int i = 0; i < r.top_k; ++i) {
    const int e = best_open(choice, open, r.experts);
    open[e] = false;
    index[i] = e;
    weights[i] = logits[e];
    sum += weights[i];
  }
  sum += r.sum_eps;
  // a NaN stays one
  const float divisor = !r.renormalize ? 1.0f : (sum < r.sum_min ? r.sum_min : sum);
  for (int i = 0; i < r.top_k; ++i) weights[i] = weights[i] / divisor * r.scale;
}

}  // namespace llmopt
