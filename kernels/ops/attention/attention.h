// What op.cpp hands to the loops of one instruction set, and the functions every instruction set provides.
//
// A "row" is one query of one head. The rows of one KV head are numbered position by position, all heads of its group
// together (row = position * group + head), so that a run of rows shares its keys and a key is read once for the group.
#pragma once
#include <cstdint>

#include "isa.h"

namespace llmopt {

// Elements between batches, heads and tokens; the last dimension is dense.
struct Strides {
  int64_t b, h, t;
};

struct AttentionParams {
  const void *q, *k, *v;
  const void *q_rope, *k_rope;     // second part of queries and keys, or null
  void* out;                       // [B, Tq, H, Dv] contiguous
  const float *k_scale, *v_scale;  // of int8 keys and values, [Hk, ...] by key, scale_stride apart; or null
  const uint8_t* key_mask;         // [B, Tk], nonzero = visible, or null
  const uint8_t* mask;             // [B or 1, 1 or H, Tq, Tk] likewise; broadcast dimensions have stride 0
  Strides q_stride, k_stride, v_stride, q_rope_stride, k_rope_stride, mask_stride;
  int64_t key_mask_stride, scale_stride;
  int64_t batch, heads, kv_heads, tq, tk;
  int64_t dim, dim_rope, dim_v;
  float scale;
  bool causal;
  int64_t window;  // 0: none

  int64_t group() const { return heads / kv_heads; }
  int64_t rows() const { return tq * group(); }
};

// Rows [row_begin, row_end) of one KV head against keys [key_begin, key_end). With `partial` the unnormalised result goes
// there, to be combined with that of other keys; without, the output rows are written.
struct AttentionJob {
  int64_t b, kv_head, row_begin, row_end, key_begin, key_end;
  float* partial;
};

constexpr int64_t round_up(int64_t x, int64_t m) { return (x + m - 1) / m * m; }

// Keys of one tile: transposed, in float32, 32 keys x 128 fill 16 KiB, and stay in L1 while the rows pass over them; in
// decode, turns between keys and values short enough for the memory not to notice.
constexpr int64_t kTileKeys = 32;
// How many keys ahead the second part of keys (rope) is asked for, where they are read as they lie.
constexpr int64_t kAheadKeys = 16;

// Floats of scratch one thread needs for a job of `rows` rows.
struct AttentionLayout {
  int64_t query_stride, value_stride;  // floats per row, parts padded to 16 each
  int64_t query, scores, acc, keys, values, stats, total;

  AttentionLayout(const AttentionParams& p, int64_t rows) {
    const int64_t padded = round_up(rows, 16);
    query_stride = round_up(p.dim, 16) + round_up(p.dim_rope, 16);
    value_stride = round_up(p.dim_v, 16);
    query = 0;
    scores = query + padded * query_stride;
    acc = scores + padded * kTileKeys;
    keys = acc + padded * value_stride;
    values = keys + query_stride * kTileKeys;
    stats = values + value_stride * kTileKeys;
    total = stats + 9 * padded;
  }
  // floats of a partial result: maximum, sum and value_stride accumulators per row
  int64_t partial_size(int64_t rows) const { return rows * (value_stride + 2); }
};

struct AttentionKernels {
  void (*attend)(const AttentionParams& p, const AttentionJob& job, float* scratch);
  // output row `row` of one KV head from `count` partial results, `stride` floats apart, of jobs that start at row_begin
  void (*combine)(const AttentionParams& p, const AttentionJob& job, int64_t count, int64_t stride, int64_t row,
                  float* scratch);
};

// by DType
const AttentionKernels& attention_kernels_portable(int dtype);
const AttentionKernels& attention_kernels_avx2(int dtype);
const AttentionKernels& attention_kernels_avx512(int dtype);

inline const AttentionKernels& attention_kernels(Isa isa, int dtype) {
#ifdef LLMOPT_X86
  if (isa >= Isa::kAvx512) return attention_kernels_avx512(dtype);
  if (isa == Isa::kAvx2) return attention_kernels_avx2(dtype);
#else
  (void)isa;
#endif
  return attention_kernels_portable(dtype);
}

}  // namespace llmopt
