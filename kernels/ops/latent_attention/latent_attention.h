// What op.cpp hands to the loops of one instruction set.
//
// All query heads share the one latent "head": a row of the cache is the key, and its first `rank` values are the value. A
// "row" of queries is one head of one token; the rows of a run of tokens are numbered token by token. latent_rows.h says how
// an int8 cache looks; queries beside it are bfloat16.
#pragma once
#include <cstdint>

#include "isa.h"

namespace llmopt {

// Keys turned into float32 at once, a multiple of every instruction set's block of keys; 48 x 576 floats stay in L2.
constexpr int64_t kLatentTile = 48;
// Queries side by side in the lanes of one vector.
constexpr int64_t kLanes = 16;

struct LatentParams {
  const void* query;        // [tokens, heads, dim]
  const void* cache;        // [sequences, capacity, row]
  float* out;               // [tokens, heads, rank]
  int64_t row, seq_stride;  // elements
  const float* scales;      // [sequences, scale_stride], of an int8 cache
  int64_t scale_stride;
  int64_t heads, dim, rank;
  float scale;
};

// Rows [row_begin, row_end) of a run of tokens against keys [key_begin, key_end) of its sequence. With `partial` the
// unnormalised result goes there, to be combined with that of other keys; without, the output rows are written.
struct LatentJob {
  int64_t token, seq, slot;  // the run's first token, its sequence and its slot
  int64_t row_begin, row_end, key_begin, key_end;
  float* partial;
  // the scratch is as a job of the same rows left it, whose keys end where these begin: the queries are in place, and the
  // first keys have been asked for
  bool follows;
};

// Where in one thread's scratch the float32 loops keep what they need for a job of `rows` rows.
struct LatentLayout {
  int64_t groups;                // sixteens of rows
  int64_t blocks, value_blocks;  // sixteens of a key's and a value's dimensions
  int64_t query, tile, scores, acc, stats, total;

  LatentLayout(const LatentParams& p, int64_t rows)
      : groups((rows + kLanes - 1) / kLanes), blocks((p.dim + 15) / 16), value_blocks((p.rank + 15) / 16) {
    query = 0;
    tile = query + groups * blocks * 16 * kLanes;
    scores = tile + blocks * 16 * kLatentTile;
    acc = scores + kLatentTile * kLanes;
    stats = acc + groups * kLanes * value_blocks * 16;
    total = stats + 3 * groups * kLanes;
  }
};

// Floats for a job of so many rows: of one thread's scratch, and of a partial result (maximum, sum and values of each row).
struct LatentSizes {
  int64_t scratch, partial;
};

struct LatentKernels {
  int64_t tile_keys, fewest_keys;  // jobs take multiples of the one, and at least the other where there are several
  LatentSizes (*sizes)(const LatentParams& p, int64_t rows);
  void (*attend)(const LatentParams& p, const LatentJob& job, float* scratch);
  // the partial result of some of the keys becomes that of those of `from` too, in rows [begin, end) of the job
  void (*merge)(const LatentParams& p, const LatentJob& job, const float* from, int64_t begin, int64_t end);
  // output row `row` of the run from the partial result, that of all keys by now
  void (*write)(const LatentParams& p, const LatentJob& job, int64_t row, float* scratch);
};

// by DType
const LatentKernels& latent_kernels_portable(int dtype);
const LatentKernels& latent_kernels_avx2(int dtype);
const LatentKernels& latent_kernels_avx512(int dtype);
// of bfloat16 alone, with products of bfloat16 (latent_pairs_kernel.h)
const LatentKernels& latent_kernels_bf16_dots();
const LatentKernels& latent_kernels_amx();
// of int8 latents, with products of bytes, and of bfloat16 for the rotary part (latent_codes_kernel.h)
const LatentKernels& latent_kernels_codes();

inline const LatentKernels& latent_kernels(Isa isa, int dtype) {
#ifdef LLMOPT_X86
  constexpr int kBf16 = 1, kS8 = 3;
  if (dtype == kS8 && (isa == Isa::kAmx || (isa == Isa::kAvx512 && fast_bf16_dots()))) return latent_kernels_codes();
  if (isa == Isa::kAmx && dtype == kBf16) return latent_kernels_amx();
  if (isa == Isa::kAvx512 && dtype == kBf16 && fast_bf16_dots()) return latent_kernels_bf16_dots();
  if (isa >= Isa::kAvx512) return latent_kernels_avx512(dtype);
  if (isa == Isa::kAvx2) return latent_kernels_avx2(dtype);
#else
  (void)isa;
#endif
  return latent_kernels_portable(dtype);
}

}  // namespace llmopt
