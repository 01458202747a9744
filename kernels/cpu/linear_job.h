// One linear layer, or several that read the same activations, as work for a team of threads: normalize and quantize the
// tokens, multiply, and store, add (residual) or gate (SwiGLU) the result.
#pragma once

#include <tvm/ffi/extra/c_env_api.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "dense_linear.h"
#include "program.h"
#include "quant_linear.h"
#include "scratch.h"
#include "tensor_check.h"

namespace llmopt {

// Tokens up to which every thread prepares all activations for itself: it costs less than a barrier.
constexpr int64_t kOwnTokens = 2;
// Bytes of weights below which a second thread is not worth waking.
constexpr int64_t kBytesPerThread = 16 * 1024;
// Tokens a thread from which threads share the tokens rather than the tiles. Each quantizes its own then, and no codes
// cross from one core's cache to another's; for that it unpacks all weights.
constexpr int64_t kSharedTokens = 128;
// Tiles whose gate and up rows are held between the product and the gating.
constexpr int64_t kGatedTiles = 4;

struct LinearWeight {
  bool quantized;
  QuantWeight quant;
  DenseWeight dense;

  int64_t rows() const { return quantized ? quant.rows : dense.rows; }
  int64_t cols() const { return quantized ? quant.cols : dense.cols; }
  int64_t tiles() const { return (rows() + 15) / 16; }
  int64_t tile_bytes() const {
    return quantized ? quant.tile_bytes() : dense.cols * 16 * (dense.dtype == static_cast<int>(DType::kF32) ? 4 : 2);
  }
};

// Activations as the products want them: quantized, and as float32 for weights that are not. Either may be unused.
struct PreparedTokens {
  QuantTokens quant;
  float* dense;
};

struct LinearJob {
  TokenSource x;
  int64_t tokens = 0;
  std::vector<LinearWeight> weights;
  std::vector<Output> outputs;  // one a weight; of a gated job one in all
  bool gated = false;           // outputs[0] = silu(weights[0] x) * (weights[1] x)
  PreparedTokens shared{};      // for more than kOwnTokens, filled in by run_linear()

  const LinearWeight* first(bool quantized) const {
    for (const LinearWeight& w : weights)
      if (w.quantized == quantized) return &w;
    return nullptr;
  }
  int64_t bytes() const {
    int64_t total = 0;
    for (const LinearWeight& w : weights) total += w.tiles() * w.tile_bytes();
    return total;
  }
  // the same for some of the tokens
  LinearJob of_tokens(Share some) const {
    LinearJob part = *this;
    part.tokens = some.end - some.begin;
    part.x.data = static_cast<const char*>(x.data) + some.begin * x.stride * bytes_of(static_cast<DType>(x.dtype));
    for (Output& y : part.outputs)
      y.data = static_cast<char*>(y.data) + some.begin * y.stride * bytes_of(static_cast<DType>(y.dtype));
    return part;
  }
};

inline PreparedTokens token_buffers(Scratch& scratch, const LinearJob& job, int64_t tokens) {
  const LinearWeight *quant = job.first(true), *dense = job.first(false);
  const int64_t cols = quant ? quant->quant.padded_cols() : 0, groups = quant ? quant->quant.num_groups() : 0;
  const size_t q_bytes = (static_cast<size_t>(tokens * cols) + 63) / 64 * 64;
  const size_t count = static_cast<size_t>(tokens * groups);
  const size_t floats = dense ? static_cast<size_t>(tokens * padded_cols(dense->cols())) : 0;
  unsigned char* base = scratch.get(q_bytes + (floats + 3 * count) * 4);
  auto* values = reinterpret_cast<float*>(base + q_bytes);
  float *scales = values + floats, *offsets = scales + count;
  auto* sums = reinterpret_cast<int32_t*>(offsets + count);
  return {{reinterpret_cast<int8_t*>(base), scales, offsets, sums, cols, groups}, values};
}

inline void prepare_tokens(const LinearJob& job, Share tokens, const PreparedTokens& out) {
  if (const LinearWeight* w = job.first(true))
    linear_kernels(active_isa()).quantize(job.x, w->quant.group, tokens.begin, tokens.end, out.quant);
  if (const LinearWeight* w = job.first(false))
    dense_kernels(active_isa()).prepare(job.x, w->dense.dtype, tokens.begin, tokens.end, out.dense);
}

inline void tiles_product(const LinearWeight& w, const PreparedTokens& x, int64_t tokens, Share tiles,
                          const Output& y) {
  static thread_local Scratch panel;
  if (tiles.begin >= tiles.end) return;
  if (!w.quantized)
    return dense_kernels(active_isa()).product(w.dense, x.dense, tokens, 16 * tiles.begin, 16 * tiles.end, y);
  const LinearKernels& kernels = linear_kernels(active_isa());
  kernels.product(w.quant, x.quant, tokens, tiles.begin, tiles.end, y, panel.get(kernels.panel_bytes(w.quant)));
}

// y = silu(gate x) * (up x), rows of the given tiles
inline void gated_tiles(const LinearWeight& gate, const LinearWeight& up, const PreparedTokens& x, int64_t tokens,
                        Share tiles, const Output& y) {
  static thread_local Scratch scratch;
  if (tiles.begin >= tiles.end) return;
  const LinearKernels& kernels = linear_kernels(active_isa());
  if (gate.quantized && tokens <= 2 && gate.quant.asymmetric == up.quant.asymmetric)
    return kernels.gated_product(gate.quant, up.quant, x.quant, tokens, tiles.begin, tiles.end, y);
  const int64_t width = 16 * kGatedTiles;
  auto* both = reinterpret_cast<float*>(scratch.get(static_cast<size_t>(tokens * 2 * width) * 4));
  for (int64_t t = tiles.begin; t < tiles.end; t += kGatedTiles) {
    const Share some{t, std::min(t + kGatedTiles, tiles.end)};
    // a product addresses its output by row of the whole weight
    tiles_product(gate, x, tokens, some, {both - 16 * t, 2 * width, 0, nullptr});
    tiles_product(up, x, tokens, some, {both + width - 16 * t, 2 * width, 0, nullptr});
    const int64_t rows = std::min(16 * some.end, gate.rows()) - 16 * t;
    for (int64_t m = 0; m < tokens; ++m) {
      const float* from = both + m * 2 * width;
      kernels.gated(from, from + width, static_cast<float*>(y.data) + m * y.stride + 16 * t, rows);
    }
  }
}

// tiles of weight [start, start + tiles * bytes) whose first byte lies in thread `rank`'s share of all bytes
inline Share tiles_in(int64_t total, int64_t start, int64_t tiles, int64_t bytes, const Team& team) {
  const auto tile_from = [&](int64_t at) { return std::clamp<int64_t>((at - start + bytes - 1) / bytes, 0, tiles); };
  const Share mine = team.share(total);
  return {mine.begin <= start ? 0 : tile_from(mine.begin), mine.end <= start ? 0 : tile_from(mine.end)};
}

// Not on AMX, whose products are quick beside the unpacking; not measured there.
inline bool shares_tokens(const LinearJob& job, int threads) {
  return threads > 1 && job.tokens >= kSharedTokens * threads && !job.first(false) && active_isa() != Isa::kAmx;
}

inline void linear_part(const LinearJob& job, const Team& team) {
  static thread_local Scratch own;
  if (shares_tokens(job, team.size)) return linear_part(job.of_tokens(team.share(job.tokens)), {0, 1, nullptr});
  const bool shared = job.tokens > kOwnTokens && team.size > 1;
  PreparedTokens x = job.shared;
  if (shared) {
    prepare_tokens(job, team.share(job.tokens), x);
    team.sync();
  } else {
    x = token_buffers(own, job, job.tokens);
    prepare_tokens(job, {0, job.tokens}, x);
  }
  if (job.gated)
    return gated_tiles(job.weights[0], job.weights[1], x, job.tokens, team.share(job.weights[0].tiles()),
                       job.outputs[0]);
  const int64_t total = job.bytes();
  int64_t start = 0;
  for (size_t i = 0; i < job.weights.size(); ++i) {
    const LinearWeight& w = job.weights[i];
    tiles_product(w, x, job.tokens, tiles_in(total, start, w.tiles(), w.tile_bytes(), team), job.outputs[i]);
    start += w.tiles() * w.tile_bytes();
  }
}

// Runs the job, or records it under the op's name.
inline void run_linear(const char* op, LinearJob job) {
  static thread_local Scratch token_scratch;
  if (job.tokens == 0) return;
  const int threads = threads_for(job.bytes() * ((job.tokens + 3) / 4), kBytesPerThread);
  if (!recording()) {
    if (job.tokens > kOwnTokens) job.shared = token_buffers(token_scratch, job, job.tokens);
    return run_team(threads, [&](const Team& team) { linear_part(job, team); });
  }
  // a recorded job outlives this call, and so must its buffers
  auto buffers = std::make_shared<Scratch>();
  if (job.tokens > kOwnTokens) job.shared = token_buffers(*buffers, job, job.tokens);
  run_or_record(op, [job = std::move(job), buffers](const Team& team) { linear_part(job, team); }, threads);
}

inline QuantWeight quant_weight(const char* name, const TensorView& packed, int64_t rows, int64_t cols, int64_t group,
                                int bits, bool asymmetric) {
  if (group != 32 && group != 64 && group != 128)
    TVM_FFI_THROW(ValueError) << "group_size: expected 32, 64 or 128, got " << group;
  if (rows <= 0 || cols <= 0)
    TVM_FFI_THROW(ValueError) << name << ": expected positive sizes, got " << rows << " x " << cols;
  check_cpu(name, packed);
  check_bytes(name, packed);
  check_contiguous(name, packed);
  return {static_cast<const uint8_t*>(packed.data_ptr()), rows, cols, static_cast<int>(group), bits, asymmetric};
}

// Memory for `rows` values in place of x's last dimension, from the caller's own allocator (torch's, when torch calls).
inline tvm::ffi::Tensor new_rows(const TensorView& x, int64_t rows) {
  if (x.ndim() < 1) TVM_FFI_THROW(ValueError) << "x: expected shape [..., in_features], got []";
  if (rows < 1) TVM_FFI_THROW(ValueError) << "out_features: expected at least 1, got " << rows;
  check_cpu("x", x);
  float_dtype("x", x);
  std::vector<int64_t> shape(x.shape().begin(), x.shape().end());
  shape.back() = rows;
  return tvm::ffi::Tensor::FromEnvAlloc(TVMFFIEnvTensorAlloc, tvm::ffi::ShapeView(shape.data(), shape.size()),
                                        x.dtype(), x.device());
}

// y[..., rows] = x[..., cols] @ weight.T + bias
inline void linear_op(TensorView x, TensorView packed, tvm::ffi::Optional<tvm::ffi::TensorView> bias, TensorView y,
                      int64_t group, int bits, bool asymmetric) {
  if (x.ndim() < 1 || y.ndim() < 1) TVM_FFI_THROW(ValueError) << "x: expected shape [..., in_features]";
  const int64_t rows = y.size(y.ndim() - 1), cols = x.size(x.ndim() - 1);
  const QuantWeight w = quant_weight("packed", packed, rows, cols, group, bits, asymmetric);
  const Rows in = rows_of("x", x), to = rows_of("y", y);
  check_shape("packed", packed, {w.num_tiles(), w.tile_bytes()});
  if (in.count != to.count)
    TVM_FFI_THROW(ValueError) << "y: expected as many rows as x, " << in.count << ", got " << to.count;
  const DType dtype = float_dtype("x", x);
  check_same_dtype("y", y, "x", dtype);
  if (bias.has_value()) {
    check_cpu("bias", *bias);
    check_shape("bias", *bias, {rows});
    check_same_dtype("bias", *bias, "x", dtype);
  }
  LinearJob job;
  job.x = {x.data_ptr(), static_cast<int>(dtype), in.stride, cols};
  job.tokens = in.count;
  job.weights = {{true, w, {}}};
  job.outputs = {{y.data_ptr(), to.stride, static_cast<int>(dtype), bias.has_value() ? (*bias).data_ptr() : nullptr}};
  run_linear(bits == 4 ? "int4_linear" : "int8_linear", std::move(job));
}

}  // namespace llmopt
