// The mixture-of-experts block of a decoder layer as one task of a team: what it is given, its buffers, its phases.
#pragma once
#include <atomic>
#include <cstring>
#include <memory>

#include "linear_job.h"
#include "routing.h"

namespace llmopt::moe {

// A gated MLP. Of routed experts: the first one, and the bytes from one to the next.
struct Mlp {
  LinearWeight gate, up, down;
  int64_t gate_up_step = 0, down_step = 0;
  // packed gate and up rows share a tile: `gate` then holds the rows of both
  bool joined = false;

  int64_t inner() const { return down.cols(); }
  int64_t act_stride() const { return joined ? 2 * inner() : inner(); }
  int64_t up_bytes() const { return joined ? gate.tile_bytes() : 2 * gate.tile_bytes(); }  // of a tile's task
};

struct Block {
  float* h;  // [tokens, hidden]
  int64_t h_stride, tokens, hidden;
  const float* norm;
  float eps;
  LinearWeight router;
  Routing routing;
  Mlp routed, shared;
  bool has_shared;

  TokenSource source(int64_t begin) const { return {h + begin * h_stride, 0, h_stride, hidden, norm, eps}; }
};

// Consecutive rows of activations that meet one expert's weights.
struct Slot {
  int64_t expert;  // -1: the shared one
  int64_t begin, rows;
};

// Pairs are (token, choice), ordered by expert wherever a row a pair is meant.
struct Buffers {
  float *router_x, *logits;       // [T, padded hidden], [T, experts]
  int32_t* index;                 // [T, k] experts
  float* weights;                 // [T, k]
  int32_t *starts, *token, *row;  // [experts + 1] first pairs; [pairs] token of a pair; [T, k] pair of a token's choice
  Slot* slots;                    // [experts + 1]
  int64_t* slot_count;
  PreparedTokens x, shared_x, sorted;  // [T], [T], [pairs]
  float *act, *shared_act;             // [pairs, act_stride], [T, act_stride]
  PreparedTokens prepared_act, prepared_shared_act;
  float *result, *shared_result;  // [pairs, hidden], [T, hidden]
};

// Hands out parts of a block of memory, or, without one, counts the bytes.
struct Carver {
  unsigned char* base;
  size_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* at = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return at;
  }
  PreparedTokens tokens(const LinearWeight& w, int64_t count) {
    PreparedTokens x{};
    if (!w.quantized) {
      x.dense = take<float>(count * padded_cols(w.dense.cols));
      return x;
    }
    const int64_t cols = w.quant.padded_cols(), groups = w.quant.num_groups();
    return {{take<int8_t>(count * cols), take<float>(count * groups), take<float>(count * groups),
             take<int32_t>(count * groups), cols, groups},
            nullptr};
  }
};

inline Buffers carve(const Block& b, int64_t tokens, Carver& memory) {
  const int64_t pairs = tokens * b.routing.top_k, experts = b.routing.experts;
  Buffers s{};
  s.router_x = memory.take<float>(tokens * padded_cols(b.hidden));
  s.logits = memory.take<float>(tokens * experts);
  s.index = memory.take<int32_t>(pairs), s.weights = memory.take<float>(pairs);
  s.starts = memory.take<int32_t>(experts + 1);
  s.token = memory.take<int32_t>(pairs), s.row = memory.take<int32_t>(pairs);
  s.slots = memory.take<Slot>(experts + 1), s.slot_count = memory.take<int64_t>(1);
  s.x = memory.tokens(b.routed.gate, tokens), s.sorted = memory.tokens(b.routed.gate, pairs);
  s.act = memory.take<float>(pairs * b.routed.act_stride());
  s.prepared_act = memory.tokens(b.routed.down, pairs);
  s.result = memory.take<float>(pairs * b.hidden);
  if (!b.has_shared) return s;
  s.shared_x = memory.tokens(b.shared.gate, tokens);
  s.shared_act = memory.take<float>(tokens * b.shared.act_stride());
  s.prepared_shared_act = memory.tokens(b.shared.down, tokens);
  s.shared_result = memory.take<float>(tokens * b.hidden);
  return s;
}

// What a task works in besides its weights. Tasks of one recording thread share it: programs run one at a time, and a
// program's tasks one after the other.
struct Memory {
  Scratch scratch;
  size_t size = 0;
  std::atomic<int64_t> next_up{0}, next_down{0};  // tiles to be taken
};

struct Run {
  const Block& block;
  const Buffers& buffers;
  Memory& memory;
  const Team& team;
  int64_t begin, tokens;  // of the block's tokens

  int64_t pairs() const { return tokens * block.routing.top_k; }
};

inline LinearWeight moved(LinearWeight w, int64_t bytes) {
  if (w.quantized) w.quant.data += bytes;
  if (!w.quantized) w.dense.data = static_cast<const char*>(w.dense.data) + bytes;
  return w;
}

inline PreparedTokens rows_from(const LinearWeight& w, PreparedTokens x, int64_t row) {
  if (!w.quantized) return {{}, x.dense + row * padded_cols(w.dense.cols)};
  return {x.quant.from(row), nullptr};
}

inline void copy_row(const LinearWeight& w, const PreparedTokens& from, int64_t a, const PreparedTokens& to,
                     int64_t b) {
  if (w.quantized) return to.quant.copy_from(from.quant, a, b);
  const int64_t cols = padded_cols(w.dense.cols);
  std::memcpy(to.dense + b * cols, from.dense + a * cols, static_cast<size_t>(cols) * 4);
}

inline void prepare(const LinearWeight& w, const TokenSource& x, Share rows, const PreparedTokens& out) {
  if (w.quantized) {
    linear_kernels(active_isa()).quantize(x, w.quant.group, rows.begin, rows.end, out.quant);
  } else {
    dense_kernels(active_isa()).prepare(x, w.dense.dtype, rows.begin, rows.end, out.dense);
  }
}

// every token's experts and their weights
inline void route(const Run& r) {
  const Block& b = r.block;
  const Buffers& s = r.buffers;
  const Share mine = r.team.share(r.tokens);
  prepare(b.router, b.source(r.begin), mine, {{}, s.router_x});
  prepare(b.routed.gate, b.source(r.begin), mine, s.x);
  if (b.has_shared) prepare(b.shared.gate, b.source(r.begin), mine, s.shared_x);
  r.team.sync();
  tiles_product(b.router, {{}, s.router_x}, r.tokens, r.team.share(b.router.tiles()),
                {s.logits, b.routing.experts, 0, nullptr});
  r.team.sync();
  const int64_t k = b.routing.top_k;
  for (int64_t t = mine.begin; t < mine.end; ++t)
    route_token(b.routing, s.logits + t * b.routing.experts, s.index + t * k, s.weights + t * k);
  r.team.sync();
}

// orders the pairs by expert, one thread for all
inline void plan(const Run& r) {
  const Buffers& s = r.buffers;
  const int64_t experts = r.block.routing.experts, k = r.block.routing.top_k;
  std::fill(s.starts, s.starts + experts + 1, 0);
  for (int64_t i = 0; i < r.pairs(); ++i) ++s.starts[s.index[i] + 1];
  int64_t count = 0;
  if (r.block.has_shared) s.slots[count++] = {-1, 0, r.tokens};
  for (int64_t e = 0; e < experts; ++e) {
    const int32_t rows = s.starts[e + 1];
    s.starts[e + 1] += s.starts[e];
    if (rows > 0) s.slots[count++] = {e, s.starts[e], rows};
  }
  *s.slot_count = count;
  for (int64_t i = 0; i < r.pairs(); ++i) {
    const int32_t at = s.starts[s.index[i]]++;
    s.token[at] = static_cast<int32_t>(i / k), s.row[i] = at;
  }
  r.memory.next_up.store(0, std::memory_order_relaxed);
  r.memory.next_down.store(0, std::memory_order_relaxed);
}

inline void sort_tokens(const Run& r) {
  const Buffers& s = r.buffers;
  if (r.team.rank == 0) plan(r);
  r.team.sync();
  if (r.tokens == 1) return;  // its row serves every expert
  const Share mine = r.team.share(r.pairs());
  for (int64_t i = mine.begin; i < mine.end; ++i) copy_row(r.block.routed.gate, s.x, s.token[i], s.sorted, i);
  r.team.sync();
}

// Tokens up to which reading the weights is all that counts: threads then take shares of equal bytes, long runs that need
// no counter. With more, experts cost what their tokens cost, and threads take pieces as they go.
constexpr int64_t kStreamTokens = 2;
constexpr int64_t kPieceTiles = 16;

struct Tiles {
  int64_t count, bytes;  // of one slot
};

// work(slot, tiles) for all tiles of all slots, over the threads of the team
template <class Work>
void over_tiles(const Run& r, Tiles routed, Tiles shared, std::atomic<int64_t>& next, const Work& work) {
  const Slot* slots = r.buffers.slots;
  const int64_t count = *r.buffers.slot_count, first = r.block.has_shared ? 1 : 0;
  if (r.tokens <= kStreamTokens) {
    int64_t total = (count - first) * routed.count * routed.bytes + first * shared.count * shared.bytes, start = 0;
    for (int64_t i = 0; i < count; ++i) {
      const Tiles& t = i < first ? shared : routed;
      const Share mine = tiles_in(total, start, t.count, t.bytes, r.team);
      if (mine.begin < mine.end) work(slots[i], mine);
      start += t.count * t.bytes;
    }
    return;
  }
  const int64_t pieces = (routed.count + kPieceTiles - 1) / kPieceTiles;
  const int64_t shared_pieces = first * ((shared.count + kPieceTiles - 1) / kPieceTiles);
  const int64_t all = shared_pieces + (count - first) * pieces;
  for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < all;) {
    const bool is_shared = i < shared_pieces;
    const int64_t slot = is_shared ? 0 : first + (i - shared_pieces) / pieces;
    const int64_t tile = (is_shared ? i : (i - shared_pieces) % pieces) * kPieceTiles;
    work(slots[slot], {tile, std::min(tile + kPieceTiles, (is_shared ? shared : routed).count)});
  }
}

// gate and up of every chosen expert and of the shared ones, and SwiGLU where both lie in tiles of their own
inline void gate_up(const Run& r) {
  const Buffers& s = r.buffers;
  const Mlp &routed = r.block.routed, &shared = r.block.shared;
  const auto work = [&](const Slot& slot, Share tiles) {
    if (slot.expert < 0)
      return gated_tiles(shared.gate, shared.up, s.shared_x, r.tokens, tiles,
                         {s.shared_act, shared.act_stride(), 0, nullptr});
    const PreparedTokens x = r.tokens == 1 ? s.x : rows_from(routed.gate, s.sorted, slot.begin);
    const Output y{s.act + slot.begin * routed.act_stride(), routed.act_stride(), 0, nullptr};
    const LinearWeight gate = moved(routed.gate, slot.expert * routed.gate_up_step);
    if (routed.joined) return tiles_product(gate, x, slot.rows, tiles, y);
    gated_tiles(gate, moved(routed.up, slot.expert * routed.gate_up_step), x, slot.rows, tiles, y);
  };
  const Tiles of_shared = r.block.has_shared ? Tiles{shared.gate.tiles(), shared.up_bytes()} : Tiles{};
  over_tiles(r, {routed.gate.tiles(), routed.up_bytes()}, of_shared, r.memory.next_up, work);
  r.team.sync();
}

inline void prepare_act(const Run& r) {
  const Buffers& s = r.buffers;
  const Mlp& m = r.block.routed;
  const Share mine = r.team.share(r.pairs());
  if (m.joined) {
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      float* row = s.act + i * m.act_stride();
      linear_kernels(active_isa()).gated(row, row + m.inner(), row, m.inner());
    }
  }
  prepare(m.down, {s.act, 0, m.act_stride(), m.inner()}, mine, s.prepared_act);
  const Mlp& shared = r.block.shared;
  if (r.block.has_shared)
    prepare(shared.down, {s.shared_act, 0, shared.act_stride(), shared.inner()}, r.team.share(r.tokens),
            s.prepared_shared_act);
  r.team.sync();
}

inline void down(const Run& r) {
  const Buffers& s = r.buffers;
  const Mlp &routed = r.block.routed, &shared = r.block.shared;
  const int64_t hidden = r.block.hidden;
  const auto work = [&](const Slot& slot, Share tiles) {
    if (slot.expert < 0)
      return tiles_product(shared.down, s.prepared_shared_act, r.tokens, tiles, {s.shared_result, hidden, 0, nullptr});
    tiles_product(moved(routed.down, slot.expert * routed.down_step),
                  rows_from(routed.down, s.prepared_act, slot.begin), slot.rows, tiles,
                  {s.result + slot.begin * hidden, hidden, 0, nullptr});
  };
  const Tiles of_shared = r.block.has_shared ? Tiles{shared.down.tiles(), shared.down.tile_bytes()} : Tiles{};
  over_tiles(r, {routed.down.tiles(), routed.down.tile_bytes()}, of_shared, r.memory.next_down, work);
  r.team.sync();
}

// h += shared result + sum of the weighted results; threads take (token, sixteen columns)
inline void add_up(const Run& r) {
  const Buffers& s = r.buffers;
  const int64_t hidden = r.block.hidden, columns = (hidden + 15) / 16, k = r.block.routing.top_k;
  const Share mine = r.team.share(r.tokens * columns);
  const float* rows[kMaxChoices + 2];
  float weights[kMaxChoices + 2] = {1.0f, 1.0f};
  for (int64_t i = mine.begin; i < mine.end;) {
    const int64_t t = i / columns, from = i % columns * 16, end = std::min(mine.end, (t + 1) * columns);
    const int64_t to = std::min(hidden, (end - t * columns) * 16);
    float* out = r.block.h + (r.begin + t) * r.block.h_stride + from;
    int count = 0;
    rows[count++] = out;
    if (r.block.has_shared) rows[count++] = s.shared_result + t * hidden + from;
    for (int64_t j = 0; j < k; ++j, ++count) {
      weights[count] = s.weights[t * k + j];
      rows[count] = s.result + s.row[t * k + j] * hidden + from;
    }
    linear_kernels(active_isa()).weighted_sum(rows, weights, count, to - from, out, 0);
    i = end;
  }
}

}  // namespace llmopt::moe
