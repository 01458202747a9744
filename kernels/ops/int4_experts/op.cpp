// A mixture of int4 experts: (token, choice) pairs sorted by expert, two task lists, one weighted sum.
#include <algorithm>
#include <cstring>
#include <vector>

#include "linear_job.h"

namespace llmopt {
namespace {

// pairs handled at once are limited so that their intermediate rows stay within this many bytes
constexpr int64_t kScratchBytes = 64 << 20;
// tiles a task takes: short enough to balance two threads, long enough to stream
constexpr int64_t kTaskTiles = 16;

struct Task {
  int64_t expert, pair_begin, pairs, tile_begin, tile_end;
};

// Pairs of tokens [begin, end), ordered by expert: order[i] = token * k + choice; starts[e] = first pair of expert e.
struct Routing {
  std::vector<int64_t> order, starts;
};

Routing route(const int64_t* index, int64_t begin, int64_t end, int64_t k, int64_t experts) {
  Routing r;
  r.starts.assign(experts + 1, 0);
  for (int64_t i = begin * k; i < end * k; ++i) ++r.starts[index[i] + 1];
  for (int64_t e = 0; e < experts; ++e) r.starts[e + 1] += r.starts[e];
  r.order.resize((end - begin) * k);
  std::vector<int64_t> next(r.starts.begin(), r.starts.end() - 1);
  for (int64_t i = begin * k; i < end * k; ++i) r.order[next[index[i]]++] = i;
  return r;
}

std::vector<Task> tasks_for(const Routing& r, int64_t tiles) {
  std::vector<Task> tasks;
  for (size_t e = 0; e + 1 < r.starts.size(); ++e) {
    const int64_t pairs = r.starts[e + 1] - r.starts[e];
    if (pairs == 0) continue;
    for (int64_t t = 0; t < tiles; t += kTaskTiles)
      tasks.push_back(
          {static_cast<int64_t>(e), r.starts[e], pairs, t, t + kTaskTiles < tiles ? t + kTaskTiles : tiles});
  }
  return tasks;
}

QuantTokens token_buffers(Scratch& scratch, const QuantWeight& w, int64_t tokens) {
  LinearJob job;
  job.weights = {{true, w, {}}};
  return token_buffers(scratch, job, tokens).quant;
}

struct Experts {
  QuantWeight gate_up, down;  // of expert 0
  int64_t gate_up_bytes, down_bytes, experts;
};

QuantWeight of(const QuantWeight& first, int64_t bytes, int64_t expert) {
  QuantWeight w = first;
  w.data += expert * bytes;
  return w;
}

struct Io {
  const void* x;
  int64_t x_stride;
  const int64_t* index;
  const float* weights;
  void* out;
  int64_t out_stride, k;
  int dtype;
};

void run_chunk(const Experts& m, const Io& io, int64_t begin, int64_t end) {
  static thread_local Scratch scratch[5];
  static thread_local Scratch panel;
  const LinearKernels& kernels = linear_kernels(active_isa());
  const int64_t tokens = end - begin, pairs = tokens * io.k, inner = m.down.cols, hidden = m.down.rows;
  const Routing r = route(io.index, begin, end, io.k, m.experts);
  const std::vector<Task> up_tasks = tasks_for(r, m.gate_up.num_tiles()), down_tasks = tasks_for(r, m.down.num_tiles());
  const QuantTokens x = token_buffers(scratch[0], m.gate_up, tokens);
  const QuantTokens sorted = token_buffers(scratch[1], m.gate_up, pairs);
  const QuantTokens act = token_buffers(scratch[2], m.down, pairs);
  auto* gate_up = reinterpret_cast<float*>(scratch[3].get(static_cast<size_t>(pairs * 2 * inner) * 4));
  auto* result = reinterpret_cast<float*>(scratch[4].get(static_cast<size_t>(pairs * hidden) * 4));
  const size_t element = io.dtype == 0 ? 4 : 2;
  const size_t panel_size = std::max(kernels.panel_bytes(m.gate_up), kernels.panel_bytes(m.down));
#pragma omp parallel num_threads(threads_for(static_cast<int64_t>(up_tasks.size()), 2))
  {
    uint8_t* my_panel = panel.get(panel_size);
    const int me = omp_get_thread_num(), all = omp_get_num_threads();
    const Share mine = share_of(tokens, me, all);
    const char* from = static_cast<const char*>(io.x) + begin * io.x_stride * element;
    kernels.quantize({from, io.dtype, io.x_stride, m.gate_up.cols}, m.gate_up.group, mine.begin, mine.end, x);
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t i = 0; i < pairs; ++i) sorted.copy_from(x, r.order[i] / io.k - begin, i);
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < up_tasks.size(); ++i) {
      const Task& t = up_tasks[i];
      const Output y{gate_up + t.pair_begin * 2 * inner, 2 * inner, 0, nullptr};
      kernels.product(of(m.gate_up, m.gate_up_bytes, t.expert), sorted.from(t.pair_begin), t.pairs, t.tile_begin,
                      t.tile_end, y, my_panel);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < pairs; ++i) {
      float* row = gate_up + i * 2 * inner;
      kernels.gated(row, row + inner, row, inner);
      kernels.quantize({gate_up, 0, 2 * inner, inner}, m.down.group, i, i + 1, act);
    }
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < down_tasks.size(); ++i) {
      const Task& t = down_tasks[i];
      const Output y{result + t.pair_begin * hidden, hidden, 0, nullptr};
      kernels.product(of(m.down, m.down_bytes, t.expert), act.from(t.pair_begin), t.pairs, t.tile_begin, t.tile_end, y,
                      my_panel);
    }
  }
  std::vector<int64_t> where(pairs);
  for (int64_t i = 0; i < pairs; ++i) where[r.order[i] - begin * io.k] = i;
  const int threads = threads_for(pairs * hidden, 32768);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t t = 0; t < tokens; ++t) {
    std::vector<const float*> rows(io.k);
    for (int64_t j = 0; j < io.k; ++j) rows[j] = result + where[t * io.k + j] * hidden;
    kernels.weighted_sum(rows.data(), io.weights + (begin + t) * io.k, static_cast<int>(io.k), hidden,
                         static_cast<char*>(io.out) + (begin + t) * io.out_stride * element, io.dtype);
  }
}

using tvm::ffi::TensorView;

// out[t] = sum over choices j of weights[t, j] * down[e](silu(gate[e](x[t])) * up[e](x[t])), e = index[t, j]
void int4_experts(TensorView x, TensorView index, TensorView weights, TensorView gate_up, TensorView down,
                  TensorView out, int64_t inner, int64_t group, int64_t down_group, bool asymmetric) {
  check_shape("x", x, {-1, -1});
  check_shape("index", index, {-1, -1});
  check_shape("gate_up", gate_up, {-1, -1, -1});
  const int64_t tokens = x.size(0), hidden = x.size(1), experts = gate_up.size(0), k = index.size(1);
  Experts m{quant_weight("gate_up", gate_up, 2 * inner, hidden, group, 4, asymmetric),
            quant_weight("down", down, hidden, inner, down_group, 4, asymmetric), 0, 0, experts};
  m.gate_up_bytes = m.gate_up.num_tiles() * m.gate_up.tile_bytes();
  m.down_bytes = m.down.num_tiles() * m.down.tile_bytes();
  check_cpu("x", x);
  check_shape("gate_up", gate_up, {-1, m.gate_up.num_tiles(), m.gate_up.tile_bytes()});
  check_shape("down", down, {experts, m.down.num_tiles(), m.down.tile_bytes()});
  check_shape("index", index, {tokens, -1});
  check_cpu("index", index);
  check_contiguous("index", index);
  check_i64("index", index);
  check_shape("weights", weights, {tokens, k});
  check_cpu("weights", weights);
  check_contiguous("weights", weights);
  if (float_dtype("weights", weights) != DType::kF32) TVM_FFI_THROW(ValueError) << "weights: expected dtype float32";
  const DType dtype = float_dtype("x", x);
  check_same_dtype("out", out, "x", dtype);
  check_shape("out", out, {tokens, hidden});
  const auto* chosen = static_cast<const int64_t*>(index.data_ptr());
  for (int64_t i = 0; i < tokens * k; ++i) {
    if (chosen[i] < 0 || chosen[i] >= experts)
      TVM_FFI_THROW(IndexError) << "index: expected values in [0, " << experts << "), got " << chosen[i];
  }
  if (k == 0) TVM_FFI_THROW(ValueError) << "index: expected at least one expert a token";
  const Io io{x.data_ptr(),   x.stride(0),   chosen, static_cast<const float*>(weights.data_ptr()),
              out.data_ptr(), out.stride(0), k,      static_cast<int>(dtype)};
  const int64_t step = std::max<int64_t>(1, kScratchBytes / (k * (2 * inner + hidden) * 4));
  for (int64_t t = 0; t < tokens; t += step) run_chunk(m, io, t, std::min(tokens, t + step));
}

}  // namespace
}  // namespace llmopt

TVM_FFI_DLL_EXPORT_TYPED_FUNC(int4_experts, llmopt::int4_experts);
