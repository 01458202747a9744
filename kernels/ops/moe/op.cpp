// moe(h, norm, eps, router, bias, choice, weighting, gate_up, down, sizes, shared, shared_sizes): h += MoE(RMSNorm(h)).
// moe_route(logits, bias, choice, weighting, index, weights): the routing alone.
//
//   choice        [top_k, sigmoid, groups, kept_groups, group_best]
//   weighting     [renormalize, sum_eps, sum_min, scale]
//   sizes         [intermediate, group, down_group, bits, asymmetric]; weights of a floating dtype do not read the last four
//   shared        gate, up, down; or nothing
#include "run.h"

namespace llmopt {
namespace {

using moe::Block;
using moe::Memory;
using moe::Mlp;
using tvm::ffi::Array;
using tvm::ffi::Optional;
using tvm::ffi::Tensor;

// scratch of one call is limited to about this many bytes; more tokens come in several rounds
constexpr int64_t kScratchBytes = 64 << 20;
constexpr int64_t kMostDenseTokens = 64;

struct Sizes {
  int64_t inner, group, down_group, bits;
  bool asymmetric;
};

Sizes sizes_of(const char* name, const Array<int64_t>& v) {
  if (v.size() != 5) TVM_FFI_THROW(ValueError) << name << ": expected five sizes, got " << v.size();
  if (v[0] < 1) TVM_FFI_THROW(ValueError) << name << ": expected an intermediate size of at least 1, got " << v[0];
  if (v[3] != 4 && v[3] != 8) TVM_FFI_THROW(ValueError) << name << ": expected 4 or 8 bits, got " << v[3];
  return {v[0], v[1], v[2], v[3], v[4] != 0};
}

const float* floats(const char* name, const TensorView& t, int64_t size) {
  check_cpu(name, t);
  check_shape(name, t, {size});
  if (float_dtype(name, t) != DType::kF32) TVM_FFI_THROW(ValueError) << name << ": expected dtype float32";
  return static_cast<const float*>(t.data_ptr());
}

LinearWeight dense_weight(const char* name, const TensorView& t, int64_t rows, int64_t cols) {
  check_cpu(name, t);
  check_contiguous(name, t);
  return {false, {}, {t.data_ptr(), static_cast<int>(float_dtype(name, t)), rows, cols}};
}

bool is_packed(const TensorView& t) { return t.dtype().code == kDLUInt; }

// the first of `experts` weights [rows, cols], or, with 0 experts, the only one
LinearWeight weight_of(const char* name, const TensorView& t, int64_t experts, int64_t rows, int64_t cols,
                       int64_t group, const Sizes& s) {
  LinearWeight w{};
  int64_t a = rows, b = cols;
  if (is_packed(t)) {
    w = {true, quant_weight(name, t, rows, cols, group, static_cast<int>(s.bits), s.asymmetric), {}};
    a = w.quant.num_tiles(), b = w.quant.tile_bytes();
  } else {
    w = dense_weight(name, t, rows, cols);
  }
  if (experts > 0) check_shape(name, t, {experts, a, b});
  if (experts == 0) check_shape(name, t, {a, b});
  return w;
}

int64_t bytes_of(const LinearWeight& w) {
  return w.quantized ? w.tiles() * w.tile_bytes() : w.rows() * w.tile_bytes() / 16;
}

Mlp routed_mlp(const TensorView& gate_up, const TensorView& down, int64_t experts, int64_t hidden, const Sizes& s) {
  Mlp m;
  const LinearWeight both = weight_of("gate_up", gate_up, experts, 2 * s.inner, hidden, s.group, s);
  m.down = weight_of("down", down, experts, hidden, s.inner, s.down_group, s);
  m.gate_up_step = bytes_of(both), m.down_step = bytes_of(m.down);
  m.gate = both;
  // of 8 bits the low nibbles lie behind all tiles: half of the tiles is no weight
  m.joined = both.quantized && (s.inner % 16 != 0 || s.bits == 8);
  if (m.joined) return m;
  m.gate.quant.rows = m.gate.dense.rows = s.inner;
  m.up = moe::moved(m.gate, m.gate_up_step / 2);
  return m;
}

Mlp shared_mlp(const Array<Tensor>& weights, int64_t hidden, const Sizes& s) {
  if (weights.size() != 3) TVM_FFI_THROW(ValueError) << "shared: expected gate, up and down, got " << weights.size();
  Mlp m;
  m.gate = weight_of("shared_gate", weights[0], 0, s.inner, hidden, s.group, s);
  m.up = weight_of("shared_up", weights[1], 0, s.inner, hidden, s.group, s);
  m.down = weight_of("shared_down", weights[2], 0, hidden, s.inner, s.down_group, s);
  if (m.gate.quantized != m.up.quantized || m.gate.dense.dtype != m.up.dense.dtype)
    TVM_FFI_THROW(ValueError) << "shared_up: expected the dtype of shared_gate";
  return m;
}

void check_groups(const Routing& r) {
  if (r.groups < 1 || r.experts % r.groups != 0)
    TVM_FFI_THROW(ValueError) << "n_group: expected a divisor of " << r.experts << " experts, got " << r.groups;
  if (r.kept_groups < 1 || r.kept_groups > r.groups)
    TVM_FFI_THROW(ValueError) << "topk_group: expected 1 to " << r.groups << ", got " << r.kept_groups;
  const int size = r.experts / r.groups;
  if (r.group_best < 1 || r.group_best > 2 || (r.kept_groups < r.groups && r.group_best > size))
    TVM_FFI_THROW(ValueError) << "group_best: expected 1 or 2, and no more than the " << size
                              << " experts of a group, got " << r.group_best;
  if (r.top_k < 1 || r.top_k > std::min(kMaxChoices, r.kept_groups * size))
    TVM_FFI_THROW(ValueError) << "top_k: expected 1 to " << std::min(kMaxChoices, r.kept_groups * size) << ", got "
                              << r.top_k;
}

Routing routing_of(int64_t experts, const Optional<TensorView>& bias, const Array<int64_t>& choice,
                   const Array<double>& weighting) {
  if (experts < 1 || experts > kMaxExperts)
    TVM_FFI_THROW(ValueError) << "router: expected 1 to " << kMaxExperts << " experts, got " << experts;
  if (choice.size() != 5 || weighting.size() != 4)
    TVM_FFI_THROW(ValueError) << "routing: expected five choices and four numbers";
  const auto small = [](int64_t x) { return static_cast<int>(std::clamp<int64_t>(x, -1, 1 << 20)); };
  Routing r{};
  r.experts = static_cast<int>(experts), r.top_k = small(choice[0]), r.sigmoid = choice[1] != 0;
  r.groups = small(choice[2]), r.kept_groups = small(choice[3]), r.group_best = small(choice[4]);
  r.renormalize = weighting[0] != 0.0, r.sum_eps = static_cast<float>(weighting[1]);
  r.sum_min = static_cast<float>(weighting[2]), r.scale = static_cast<float>(weighting[3]);
  if (bias.has_value()) r.bias = floats("correction_bias", *bias, experts);
  check_groups(r);
  return r;
}

// at least so many bytes, for this call or for every task this thread records
std::shared_ptr<Memory> memory_for(size_t bytes) {
  static thread_local const auto own = std::make_shared<Memory>();
  static thread_local std::weak_ptr<Memory> recorded;
  if (!recording()) {
    own->scratch.get(bytes);
    return own;
  }
  std::shared_ptr<Memory> memory = recorded.lock();
  // a larger one is a new one: tasks recorded before hold addresses in theirs
  if (!memory || memory->size < bytes) {
    memory = std::make_shared<Memory>();
    memory->scratch.get(bytes), memory->size = bytes;
    recorded = memory;
  }
  return memory;
}

int64_t active_bytes(const Block& b) {
  const int64_t experts = std::min<int64_t>(b.routing.experts, b.tokens * b.routing.top_k);
  int64_t bytes = bytes_of(b.router) + experts * (b.routed.gate_up_step + b.routed.down_step);
  if (b.has_shared) bytes += 2 * bytes_of(b.shared.gate) + bytes_of(b.shared.down);
  return bytes;
}

void run(const Block& b) {
  if (b.tokens == 0) return;
  const auto bytes_for = [&](int64_t tokens) {
    moe::Carver count{nullptr};
    moe::carve(b, tokens, count);
    return count.used;
  };
  const int64_t step = std::clamp<int64_t>(kScratchBytes / static_cast<int64_t>(bytes_for(1)), 1, b.tokens);
  std::shared_ptr<Memory> memory = memory_for(bytes_for(step));
  moe::Carver carver{memory->scratch.get(0)};
  const moe::Buffers buffers = moe::carve(b, step, carver);
  const int threads = threads_for(active_bytes(b) * ((b.tokens + 3) / 4), kBytesPerThread);
  run_or_record(
      "moe", [b, buffers, memory, step](const Team& team) { moe::run_block(b, buffers, *memory, step, team); },
      threads);
}

void moe_block(TensorView h, TensorView norm, double eps, TensorView router, Optional<TensorView> bias,
               Array<int64_t> choice, Array<double> weighting, TensorView gate_up, TensorView down,
               Array<int64_t> sizes, Array<Tensor> shared, Array<int64_t> shared_sizes) {
  check_cpu("h", h);
  check_shape("h", h, {-1, -1});
  if (float_dtype("h", h) != DType::kF32) TVM_FFI_THROW(ValueError) << "h: expected dtype float32";
  Block b{};
  b.tokens = h.size(0), b.hidden = h.size(1);
  b.h = static_cast<float*>(h.data_ptr()), b.h_stride = h.stride(0);
  b.norm = floats("norm", norm, b.hidden), b.eps = static_cast<float>(eps);
  check_shape("router", router, {-1, b.hidden});
  b.router = dense_weight("router", router, router.size(0), b.hidden);
  b.routing = routing_of(router.size(0), bias, choice, weighting);
  b.routed = routed_mlp(gate_up, down, router.size(0), b.hidden, sizes_of("sizes", sizes));
  b.has_shared = shared.size() > 0;
  if (b.has_shared) b.shared = shared_mlp(shared, b.hidden, sizes_of("shared_sizes", shared_sizes));
  bool dense = !b.routed.gate.quantized || !b.routed.down.quantized;
  if (b.has_shared) dense = dense || !b.shared.gate.quantized || !b.shared.down.quantized;
  if (dense && b.tokens > kMostDenseTokens)
    TVM_FFI_THROW(ValueError) << "h: expected at most " << kMostDenseTokens
                              << " tokens with weights that are not quantized, got " << b.tokens;
  run(b);
}

void moe_route(TensorView logits, Optional<TensorView> bias, Array<int64_t> choice, Array<double> weighting,
               TensorView index, TensorView weights) {
  check_cpu("logits", logits), check_cpu("index", index), check_cpu("weights", weights);
  check_shape("logits", logits, {-1, -1});
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  const Routing r = routing_of(experts, bias, choice, weighting);
  check_shape("index", index, {tokens, r.top_k}), check_shape("weights", weights, {tokens, r.top_k});
  check_contiguous("index", index), check_contiguous("weights", weights);
  if (float_dtype("logits", logits) != DType::kF32) TVM_FFI_THROW(ValueError) << "logits: expected dtype float32";
  if (float_dtype("weights", weights) != DType::kF32) TVM_FFI_THROW(ValueError) << "weights: expected dtype float32";
  check_i64("index", index);
  float scores[kMaxExperts];
  int32_t chosen[kMaxChoices];
  for (int64_t t = 0; t < tokens; ++t) {
    const float* from = static_cast<const float*>(logits.data_ptr()) + t * logits.stride(0);
    std::copy(from, from + experts, scores);
    route_token(r, scores, chosen, static_cast<float*>(weights.data_ptr()) + t * r.top_k);
    std::copy(chosen, chosen + r.top_k, static_cast<int64_t*>(index.data_ptr()) + t * r.top_k);
  }
}

}  // namespace
}  // namespace llmopt

TVM_FFI_DLL_EXPORT_TYPED_FUNC(moe, llmopt::moe_block);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(moe_route, llmopt::moe_route);
