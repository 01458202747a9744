// How a team runs the block: whole experts a thread where one token's divide evenly, everything in shares where not.
#pragma once
#include "block.h"

namespace llmopt::moe {

inline int64_t mlp_bytes(const Mlp& m) { return m.gate.tiles() * m.up_bytes() + m.down.tiles() * m.down.tile_bytes(); }

// The first of the slots that thread `rank` takes whole: the shared expert, then the chosen ones.
inline int64_t first_slot(const Block& b, int rank, int threads) {
  const int64_t routed = mlp_bytes(b.routed), shared = b.has_shared ? mlp_bytes(b.shared) : 0;
  const int64_t at = (shared + b.routing.top_k * routed) * rank / threads;
  const int64_t before = b.has_shared && at > shared / 2 ? 1 : 0;
  return before + std::max<int64_t>(0, at - shared + routed / 2) / routed;
}

// Whether threads get equal bytes that way.
inline bool divides(const Block& b, int threads) {
  const int64_t routed = mlp_bytes(b.routed), shared = b.has_shared ? mlp_bytes(b.shared) : 0;
  const int64_t fair = (shared + b.routing.top_k * routed) / threads;
  for (int i = 0; i < threads; ++i) {
    const int64_t begin = first_slot(b, i, threads), end = first_slot(b, i + 1, threads);
    const int64_t has_shared = b.has_shared && begin == 0 && end > 0 ? 1 : 0;
    if (has_shared * shared + (end - begin - has_shared) * routed > fair + fair / 32) return false;
  }
  return true;
}

// one preparation of the token serves both weights
inline bool same_tokens(const LinearWeight& a, const LinearWeight& b) {
  if (a.quantized != b.quantized) return false;
  return a.quantized ? a.quant.group == b.quant.group : a.dense.dtype == b.dense.dtype;
}

// What every thread makes for itself of the only token, and of one expert at a time.
inline Buffers own_buffers(const Block& b, const Buffers& shared, Carver& memory) {
  Buffers s = shared;
  s.router_x = memory.take<float>(padded_cols(b.hidden));
  s.logits = memory.take<float>(b.routing.experts);
  s.index = memory.take<int32_t>(b.routing.top_k), s.weights = memory.take<float>(b.routing.top_k);
  s.row = memory.take<int32_t>(b.routing.top_k);
  s.x = s.shared_x = memory.tokens(b.routed.gate, 1);
  s.act = memory.take<float>(2 * b.routed.inner()), s.prepared_act = memory.tokens(b.routed.down, 1);
  if (!b.has_shared) return s;
  if (!same_tokens(b.shared.gate, b.routed.gate)) s.shared_x = memory.tokens(b.shared.gate, 1);
  s.shared_act = memory.take<float>(2 * b.shared.inner());
  s.prepared_shared_act = memory.tokens(b.shared.down, 1);
  return s;
}

// the token's experts and their weights, in every thread; `logits` is everyone's
inline void route_single(const Run& r, float* logits) {
  const Block& b = r.block;
  const Buffers& s = r.buffers;
  prepare(b.router, b.source(0), {0, 1}, {{}, s.router_x});
  tiles_product(b.router, {{}, s.router_x}, 1, r.team.share(b.router.tiles()), {logits, b.routing.experts, 0, nullptr});
  prepare(b.routed.gate, b.source(0), {0, 1}, s.x);
  if (b.has_shared && !same_tokens(b.shared.gate, b.routed.gate))
    prepare(b.shared.gate, b.source(0), {0, 1}, s.shared_x);
  r.team.sync();
  std::copy(logits, logits + b.routing.experts, s.logits);
  route_token(b.routing, s.logits, s.index, s.weights);
  for (int32_t i = 0; i < b.routing.top_k; ++i) s.row[i] = i;
}

// y = w x
inline void multiply(const LinearWeight& w, const PreparedTokens& x, float* y) {
  tiles_product(w, x, 1, {0, w.tiles()}, {y, w.rows(), 0, nullptr});
}

// One gated MLP, all of it. up after gate rather than side by side, where their streams lay a multiple of 4096 bytes apart
// when this was measured.
inline void run_mlp(const Mlp& m, int64_t expert, const PreparedTokens& x, float* act, const PreparedTokens& prepared,
                    float* result) {
  const int64_t inner = m.inner();
  multiply(moved(m.gate, expert * m.gate_up_step), x, act);
  if (!m.joined) multiply(moved(m.up, expert * m.gate_up_step), x, act + inner);
  linear_kernels(active_isa()).gated(act, act + inner, act, inner);
  prepare(m.down, {act, 0, inner, inner}, {0, 1}, prepared);
  multiply(moved(m.down, expert * m.down_step), prepared, result);
}

// One token: threads meet twice, for the logits and for the sum, and each reads its experts one after the other.
inline void run_single(const Block& b, const Buffers& shared, Memory& memory, const Team& team) {
  static thread_local Scratch scratch;
  Carver counted{nullptr};
  own_buffers(b, shared, counted);
  Carver carver{scratch.get(counted.used)};
  const Buffers s = own_buffers(b, shared, carver);
  const Run r{b, s, memory, team, 0, 1};
  route_single(r, shared.logits);
  const int64_t end = first_slot(b, team.rank + 1, team.size), first = b.has_shared ? 1 : 0;
  for (int64_t i = first_slot(b, team.rank, team.size); i < end; ++i) {
    if (i < first) {
      run_mlp(b.shared, 0, s.shared_x, s.shared_act, s.prepared_shared_act, s.shared_result);
    } else {
      run_mlp(b.routed, s.index[i - first], s.x, s.act, s.prepared_act, s.result + (i - first) * b.hidden);
    }
  }
  team.sync();
  add_up(r);
}

inline void run_block(const Block& b, const Buffers& s, Memory& memory, int64_t step, const Team& team) {
  if (b.tokens == 1 && divides(b, team.size)) return run_single(b, s, memory, team);
  for (int64_t begin = 0; begin < b.tokens; begin += step) {
    const Run r{b, s, memory, team, begin, std::min(step, b.tokens - begin)};
    if (begin > 0) team.sync();  // the buffers of the tokens before are still being read
    route(r);
    sort_tokens(r);
    gate_up(r);
    prepare_act(r);
    down(r);
    add_up(r);
  }
}

}  // namespace llmopt::moe
