// The int4 and int8 weight formats and the functions every ISA provides for them.
//
// Weights: tiles of 16 output rows, one after the other, each a block of bytes read front to back without a gap, which is
// what keeps a core's prefetchers going (docs/decisions/0012):
//   [num_groups][16] uint8 zeros, padded to whole lines (asymmetric only) | groups
// A group: a line of [16] float16 scales and [16] int16 sums of the group's q - zero, then group / 8 vectors of 64 bytes.
// A vector's lane r (4 bytes) belongs to row r: low nibbles are k = 8j..8j+3, high nibbles k = 8j+4..8j+7. int8 (stored plus
// 128): such tiles of the codes' high nibbles, which are the weight at 4 bits and can be read alone, and behind the last of
// them the vectors of the low nibbles, tile by tile. Values are unsigned; value = scale * (q - zero), zero = 8 or 128 when
// symmetric. in_features is padded to whole groups with q = zero, so that padding adds nothing.
//
// Activations: int8, one scale and one zero point per token and group (docs/decisions/0006); value = scale * q + offset. The
// weights' zero points go into the accumulator's start value, the offsets meet the sums of the weights.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "isa.h"

namespace llmopt {

constexpr int64_t kLine = 64;  // bytes of a group's scales and sums

struct QuantWeight {
  const uint8_t* data;  // first tile
  int64_t rows;         // out_features
  int64_t cols;         // in_features as the caller sees them
  int group;            // 32, 64 or 128
  int bits;             // 4 or 8
  bool asymmetric;

  int64_t num_tiles() const { return (rows + 15) / 16; }
  int64_t num_groups() const { return (cols + group - 1) / group; }
  int64_t padded_cols() const { return num_groups() * group; }
  int64_t zeros_bytes() const { return asymmetric ? (num_groups() * 16 + 63) / 64 * 64 : 0; }
  int64_t group_bytes() const { return kLine + group * 8; }
  int64_t step_bytes() const { return zeros_bytes() + num_groups() * group_bytes(); }  // from one tile to the next
  int64_t plane_bytes() const { return padded_cols() * 8; }  // 4 bits of each weight of a tile
  int64_t tile_bytes() const { return step_bytes() + (bits == 8 ? plane_bytes() : 0); }
  // from the first tile to the low nibbles of tile t
  int64_t low_plane(int64_t t) const { return num_tiles() * step_bytes() + t * plane_bytes(); }
};

// Quantized activations of `tokens` tokens, in caller-owned memory.
struct QuantTokens {
  int8_t* q;       // [tokens, padded_cols]
  float* scales;   // [tokens, num_groups]
  float* offsets;  // [tokens, num_groups]
  int32_t* sums;   // [tokens, num_groups], of q
  int64_t padded_cols, num_groups;

  // the tokens from `token` on
  QuantTokens from(int64_t token) const {
    const int64_t group = token * num_groups;
    return {q + token * padded_cols, scales + group, offsets + group, sums + group, padded_cols, num_groups};
  }
  void copy_from(const QuantTokens& other, int64_t theirs, int64_t ours) const {
    const QuantTokens a = other.from(theirs), b = from(ours);
    const auto groups = static_cast<size_t>(num_groups) * 4;
    std::memcpy(b.q, a.q, static_cast<size_t>(padded_cols));
    std::memcpy(b.scales, a.scales, groups);
    std::memcpy(b.offsets, a.offsets, groups);
    std::memcpy(b.sums, a.sums, groups);
  }
};

// Activations as they come: rows of `cols` values, optionally to be normalized on the way (RMSNorm, Zhang & Sennrich 2019:
// x / sqrt(mean(x^2) + eps) * norm).
struct TokenSource {
  const void* data;
  int dtype;                    // DType
  int64_t stride, cols;         // elements between tokens, elements of a token
  const float* norm = nullptr;  // [cols], or null: taken as they are
  float eps = 0.0f;
};

struct Output {
  void* data;               // element [token 0, row 0]
  int64_t stride;           // elements between tokens
  int dtype;                // DType
  const void* bias;         // [rows] of the same dtype, or null
  bool accumulate = false;  // add to what is there: a residual connection
};

struct LinearKernels {
  // quantizes tokens [begin, end) of x
  void (*quantize)(const TokenSource& x, int group, int64_t begin, int64_t end, const QuantTokens& out);
  // y[token, row] for tokens [0, tokens) and tiles [tile_begin, tile_end); panel: scratch of panel_bytes()
  void (*product)(const QuantWeight& w, const QuantTokens& x, int64_t tokens, int64_t tile_begin, int64_t tile_end,
                  const Output& y, uint8_t* panel);
  // y = silu(gate x) * (up x) for one or two tokens: both weights, of one format, are read as two streams
  // side by side
  void (*gated_product)(const QuantWeight& gate, const QuantWeight& up, const QuantTokens& x, int64_t tokens,
                        int64_t tile_begin, int64_t tile_end, const Output& y);
  // writes row `row` of the weight, dequantized, to float32 out[cols]
  void (*dequantize_row)(const QuantWeight& w, int64_t row, float* out);
  // out[i] = silu(gate[i]) * up[i]
  void (*gated)(const float* gate, const float* up, float* out, int64_t n);
  // out[i] = sum over j of weights[j] * rows[j][i], stored as dtype
  void (*weighted_sum)(const float* const* rows, const float* weights, int count, int64_t n, void* out, int dtype);
  // scratch bytes product() needs for one thread
  int64_t (*panel_bytes)(const QuantWeight& w);
};

const LinearKernels& linear_kernels_portable();
const LinearKernels& linear_kernels_avx2();
const LinearKernels& linear_kernels_avx512();
const LinearKernels& linear_kernels_amx();

inline const LinearKernels& linear_kernels(Isa isa) {
#ifdef LLMOPT_X86
  if (isa == Isa::kAmx) return linear_kernels_amx();
  if (isa == Isa::kAvx512) return linear_kernels_avx512();
  if (isa == Isa::kAvx2) return linear_kernels_avx2();
#else
  (void)isa;
#endif
  return linear_kernels_portable();
}

}  // namespace llmopt
