// Many queries in bfloat16: what op.cpp and the loops of prefill_kernel.h agree on.
//
// Both products are of bfloat16 with sums in float32, in blocks of 32 rows x 32 columns over 32 terms a step. Keys and
// values are packed once for all rows of a KV head, since the instructions want the two neighbours of a sum in one lane:
//   32 keys: [2 panels][depth / 32][16 pairs of dimensions][16 keys][2], then their values [width / 16][16 pairs of
//   keys][16 dimensions][2]. A panel's step, 16 pairs x 16 lanes, is 1 KiB: one AMX tile, or sixteen AVX-512 vectors.
#pragma once
#include "attention.h"

namespace llmopt {

constexpr int64_t kBlock = 32;
constexpr int64_t kPanelStep = 16 * 16 * 2;  // elements of 16 pairs x 16 lanes
// Keys whose scores are weighed before the product with the values: few enough for the scores of 32 rows to stay in L1,
// enough that the sums of the second product are loaded and stored seldom.
constexpr int64_t kStretch = 256;
// Elements between rows of scores, as float32: the rows of a block must not all fall into the same few sets of the cache.
constexpr int64_t kScoreStride = kStretch + 16;

struct PrefillLayout {
  int64_t depth, width;         // of queries and keys, of values; parts padded to whole blocks
  int64_t packed;               // elements of 32 packed keys and values
  int64_t query, scores, sums;  // floats from the start of the scratch; accumulators come first
  int64_t total;

  PrefillLayout(const AttentionParams& p, int64_t rows) {
    const int64_t padded = round_up(rows, kBlock);
    depth = round_up(p.dim, kBlock) + round_up(p.dim_rope, kBlock);
    width = round_up(p.dim_v, kBlock);
    packed = kBlock * (depth + width);
    query = padded * width;
    scores = query + padded * depth / 2;
    sums = scores + kBlock * kScoreStride;
    total = sums + padded * (16 + 1);
  }
};

struct PrefillKernels {
  // keys and values [key, key + 32) of a KV head, zeros past the end and where key_mask hides them
  void (*pack)(const AttentionParams& p, const AttentionJob& job, int64_t key, uint16_t* out);
  void (*attend)(const AttentionParams& p, const AttentionJob& job, const uint16_t* packed, float* scratch);
};

const PrefillKernels& prefill_kernels_avx512();
const PrefillKernels& prefill_kernels_amx();

// The loops for an ISA, or null where float32 is as fast.
inline const PrefillKernels* prefill_kernels(Isa isa) {
#ifdef LLMOPT_X86
  if (isa == Isa::kAmx) return &prefill_kernels_amx();
  if (isa == Isa::kAvx512 && fast_bf16_dots()) return &prefill_kernels_avx512();
#else
  (void)isa;
#endif
  return nullptr;
}

}  // namespace llmopt
