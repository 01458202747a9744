// One small linear layer a head, each with its own weight and its own part of the tokens: y[t, h] = x[t, h] @ weight[h].T.
#pragma once
#include "linear_job.h"

namespace llmopt {

// One job a head, all of one size.
using HeadsLinear = std::vector<LinearJob>;

// `w`, `x` and `y` are head 0's; the weights of the others follow it, the activations lie x_head and y_head elements on.
inline HeadsLinear heads_linear(LinearWeight w, TokenSource x, int64_t x_head, Output y, int64_t y_head, int64_t heads,
                                int64_t tokens) {
  const auto size = [](int dtype) { return dtype == static_cast<int>(DType::kF32) ? 4 : 2; };
  HeadsLinear jobs(static_cast<size_t>(heads));
  for (LinearJob& job : jobs) {
    job.x = x, job.tokens = tokens, job.weights = {w}, job.outputs = {y};
    x.data = static_cast<const char*>(x.data) + x_head * size(x.dtype);
    y.data = static_cast<char*>(y.data) + y_head * size(y.dtype);
    w.quant.data += w.quantized ? w.tiles() * w.tile_bytes() : 0;
    if (!w.quantized) w.dense.data = static_cast<const char*>(w.dense.data) + w.rows() * w.cols() * size(w.dense.dtype);
  }
  return jobs;
}

inline int64_t heads_bytes(const HeadsLinear& jobs) {
  return jobs.empty() ? 0 : jobs[0].bytes() * static_cast<int64_t>(jobs.size());
}

// A thread's part: tiles of whole heads, and of one or two in part. Every thread prepares the tokens of its heads itself.
inline void heads_linear_part(const HeadsLinear& jobs, const Team& team) {
  static thread_local Scratch scratch;
  if (jobs.empty()) return;
  const int64_t tiles = jobs[0].weights[0].tiles();
  const Share mine = team.share(tiles * static_cast<int64_t>(jobs.size()));
  for (int64_t tile = mine.begin; tile < mine.end;) {
    const int64_t head = tile / tiles, end = std::min(mine.end, (head + 1) * tiles);
    const LinearJob& job = jobs[static_cast<size_t>(head)];
    const PreparedTokens x = token_buffers(scratch, job, job.tokens);
    prepare_tokens(job, {0, job.tokens}, x);
    tiles_product(job.weights[0], x, job.tokens, {tile - head * tiles, end - head * tiles}, job.outputs[0]);
    tile = end;
  }
}

// `weight` as [heads, rows, cols] in a float dtype, or packed: [heads, tiles, tile_bytes] uint8, 8 bits, symmetric.
inline LinearWeight heads_weight(const char* name, const TensorView& weight, int64_t heads, int64_t rows, int64_t cols,
                                 int64_t group) {
  check_cpu(name, weight);
  check_contiguous(name, weight);
  LinearWeight w{};
  w.quantized = weight.dtype().code == kDLUInt;
  if (w.quantized) {
    w.quant = quant_weight(name, weight, rows, cols, group, 8, false);
    check_shape(name, weight, {heads, w.quant.num_tiles(), w.quant.tile_bytes()});
  } else {
    check_shape(name, weight, {heads, rows, cols});
    w.dense = {weight.data_ptr(), static_cast<int>(float_dtype(name, weight)), rows, cols};
  }
  return w;
}

}  // namespace llmopt
