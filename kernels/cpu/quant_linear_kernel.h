// Loops of the int4 / int8 linear, written once against the lanes of simd_*.h and compiled once per ISA.
#pragma once
#include <cmath>
#include <limits>

#include "quant_linear.h"
#include "simd_math.h"

namespace llmopt::LLMOPT_ISA {

// bytes ahead of the stream to ask for; a few hundred nanoseconds of reading at one core's bandwidth
constexpr int kPrefetch = 2048;
// tokens from which unpacking a tile once costs less than unpacking it for every block of tokens
constexpr int64_t kPanelTokens = 2 * kTokens;

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

// what to multiply a token with before its norm's weights
template <int kDType>
float inverse_rms(const TokenSource& x, int64_t token) {
  F32x16 sum = zero_f32();
  for (int64_t k = 0; k < x.cols; k += 16) {
    const int n = x.cols - k < 16 ? static_cast<int>(x.cols - k) : 16;
    const F32x16 v = load_as_n<kDType>(x.data, token * x.stride + k, n);
    sum = fmadd(v, v, sum);
  }
  return 1.0f / std::sqrt(reduce_add(sum) / static_cast<float>(x.cols) + x.eps);
}

// `n` (up to 16) values of a token from column k on, normalized where the source says so
template <int kDType>
F32x16 source_values(const TokenSource& x, int64_t token, int64_t k, int n, F32x16 inverse) {
  const int64_t at = token * x.stride + k;
  const F32x16 v = n == 16 ? load_as<kDType>(x.data, at) : load_as_n<kDType>(x.data, at, n);
  return x.norm ? mul(mul(v, inverse), n == 16 ? load(x.norm + k) : load_n(x.norm + k, n)) : v;
}

// Steps of a group's range: codes from -127 to 126, and one for what rounding both ends may add.
constexpr double kSteps = 253.0;

template <int kDType>
void quantize_tokens(const TokenSource& x, int group, int64_t begin, int64_t end, const QuantTokens& out) {
  for (int64_t t = begin; t < end; ++t) {
    const F32x16 inverse_norm = set1(x.norm ? inverse_rms<kDType>(x, t) : 1.0f);
    int8_t* q = out.q + t * out.padded_cols;
    for (int64_t g = 0; g < out.num_groups; ++g) {
      const int64_t k0 = g * group, at = t * out.num_groups + g, real = x.cols - k0 < group ? x.cols - k0 : group;
      F32x16 values[8], high = zero_f32(), low = zero_f32();
      I32x16 biggest = zero_i32();
      for (int i = 0; i < group / 16; ++i) {
        const int64_t left = real - 16 * i;
        const int n = left >= 16 ? 16 : (left > 0 ? static_cast<int>(left) : 0);
        values[i] = n > 0 ? source_values<kDType>(x, t, k0 + 16 * i, n, inverse_norm) : zero_f32();
        biggest = max(biggest, abs_bits(values[i]));
        high = max(high, values[i]), low = max(low, sub(zero_f32(), values[i]));
      }
      const float least = -reduce_max(low);
      const double range = static_cast<double>(reduce_max(high)) - least;  // may be twice the largest float
      // below this the inverse overflows; such a group is zero for every purpose
      const bool zero = range < 1e-35;
      const float inverse = zero ? 0.0f : static_cast<float>(kSteps / range);
      const F32x16 zero_point = sub(set1(-127.0f), round_even(mul(set1(least), set1(inverse))));
      I32x16 sum = zero_i32();
      for (int i = 0; i < group / 16; ++i)
        sum = add(sum, store_s8(q + k0 + 16 * i, add(round_even(mul(values[i], set1(inverse))), zero_point)));
      // a NaN or Inf among the inputs must reach the output, and integers cannot carry it
      const bool finite = reduce_max(biggest) < 0x7f800000;
      const float scale = zero ? 0.0f : static_cast<float>(range / kSteps);
      out.scales[at] = finite ? scale : std::numeric_limits<float>::quiet_NaN();
      out.offsets[at] = -scale * first_lane(zero_point);
      out.sums[at] = reduce_add(sum);
    }
  }
}

inline void quantize(const TokenSource& x, int group, int64_t begin, int64_t end, const QuantTokens& out) {
  if (x.dtype == 0) quantize_tokens<0>(x, group, begin, end, out);
  if (x.dtype == 1) quantize_tokens<1>(x, group, begin, end, out);
  if (x.dtype == 2) quantize_tokens<2>(x, group, begin, end, out);
}

// where one tile's parts begin
struct Tile {
  const uint8_t* groups;
  const uint8_t* low;    // 8 bits: vectors of the low nibbles
  const uint8_t* zeros;  // asymmetric: zero points
};
inline Tile tile_at(const QuantWeight& w, int64_t t) {
  const uint8_t* base = w.data + t * w.step_bytes();
  return {base + w.zeros_bytes(), w.data + w.low_plane(t), base};
}

inline const uint8_t* line_of(const QuantWeight& w, const Tile& tile, int64_t g) {
  return tile.groups + g * w.group_bytes();
}

// of the rows of a group, whose line is given
inline F32x16 group_scales(const uint8_t* line) { return load_f16(reinterpret_cast<const uint16_t*>(line)); }
// sums of a group's weights, row by row: what a token's offset is multiplied with
inline F32x16 group_values(const uint8_t* line, F32x16 scale) {
  return mul(to_f32(load_s16(reinterpret_cast<const int16_t*>(line) + 16)), scale);
}

// accumulator's start: minus zero * sum of the group's activations
inline I32x16 start_value(const QuantWeight& w, const Tile& tile, int64_t g, int32_t sum) {
  if (w.asymmetric) return mul(load_u8(tile.zeros + 16 * g), set1(-sum));
  return set1(-(w.bits == 4 ? 8 : 128) * sum);
}

template <int kDType>
void store_rows_as(const Output& y, int64_t at, int64_t row, int n, F32x16 v) {
  if (y.bias) v = add(v, load_as_n<kDType>(y.bias, row, n));
  if (y.accumulate) v = add(v, load_as_n<kDType>(y.data, at, n));
  store_as_n<kDType>(y.data, at, v, n);
}

inline void store_rows(const Output& y, int64_t token, int64_t row, int64_t rows, F32x16 v) {
  const int n = rows - row < 16 ? static_cast<int>(rows - row) : 16;
  const int64_t at = token * y.stride + row;
  if (y.dtype == 0) return store_rows_as<0>(y, at, row, n, v);
  if (y.dtype == 1) return store_rows_as<1>(y, at, row, n, v);
  store_rows_as<2>(y, at, row, n, v);
}

// kS tiles (1, 2 or 4) of weights like w times kM tokens (1 or 2), straight from the stream: the decode path. Several
// streams keep more of the memory busy than one, above all where a matrix begins, and share the activations' quads;
// independent sums hide the latency of the dot product.
template <int kBits, int kM, int kS>
[[gnu::always_inline]] inline void stream_tiles(const QuantWeight& w, const Tile (&tile)[kS], const QuantTokens& x,
                                                F32x16 (&total)[kS][kM]) {
  constexpr int kChains = kS == 1 ? 4 : 2, kLast = kChains - 1;
  const uint8_t *v[kS], *low[kS];
#pragma GCC unroll 4
  for (int s = 0; s < kS; ++s) {
    v[s] = tile[s].groups, low[s] = tile[s].low;
#pragma GCC unroll 2
    for (int m = 0; m < kM; ++m) total[s][m] = zero_f32();
  }
  constexpr int kStep = kBits == 4 ? 2 : 1;  // vectors of a plane at once: either way two are loaded
  for (int64_t g = 0; g < x.num_groups; ++g) {
    const uint8_t* line[kS];
    I32x16 acc[kS][kM][kChains];
#pragma GCC unroll 4
    for (int s = 0; s < kS; ++s) {
      line[s] = v[s];
      prefetch(v[s] + kPrefetch);
      v[s] += kLine;
#pragma GCC unroll 2
      for (int m = 0; m < kM; ++m) {
        acc[s][m][0] = start_value(w, tile[s], g, x.sums[m * x.num_groups + g]);
#pragma GCC unroll 4
        for (int c = 1; c < kChains; ++c) acc[s][m][c] = zero_i32();
      }
    }
    const int8_t* q = x.q + g * w.group;
    for (int j = 0; j < w.group / 8; j += kStep) {
#pragma GCC unroll 4
      for (int s = 0; s < kS; ++s) {
        const uint8_t* second = kBits == 4 ? v[s] + 64 : low[s];
        const U8x64 a = load_u8x64(v[s]), b = load_u8x64(second);
        prefetch(v[s] + kPrefetch);
        prefetch(second + kPrefetch);
        v[s] += 64 * kStep;
        if constexpr (kBits == 8) low[s] += 64;
#pragma GCC unroll 2
        for (int m = 0; m < kM; ++m) {
          const int8_t* p = q + m * x.padded_cols;
          I32x16(&sum)[kChains] = acc[s][m];
          if constexpr (kBits == 4) {
            sum[0] = dot_u4(sum[0], low_nibbles(a), load_quad(p + 8 * j));
            sum[1] = dot_u4(sum[1], high_nibbles(a), load_quad(p + 8 * j + 4));
            sum[kLast - 1] = dot_u4(sum[kLast - 1], low_nibbles(b), load_quad(p + 8 * j + 8));
            sum[kLast] = dot_u4(sum[kLast], high_nibbles(b), load_quad(p + 8 * j + 12));
          } else {
            sum[0] = dot_u8(sum[0], join_low(a, b), load_quad(p + 8 * j));
            sum[1] = dot_u8(sum[1], join_high(a, b), load_quad(p + 8 * j + 4));
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int s = 0; s < kS; ++s) {
      const F32x16 scale = group_scales(line[s]), values = group_values(line[s], scale);
#pragma GCC unroll 2
      for (int m = 0; m < kM; ++m) {
        const int64_t at = m * x.num_groups + g;
        I32x16 sum = add(acc[s][m][0], acc[s][m][1]);
        if constexpr (kChains == 4) sum = add(sum, add(acc[s][m][2], acc[s][m][3]));
        total[s][m] = fmadd(values, set1(x.offsets[at]), total[s][m]);
        total[s][m] = fmadd(to_f32(sum), mul(scale, set1(x.scales[at])), total[s][m]);
      }
    }
  }
}

// one tile, or several that lie `apart` tiles from each other
template <int kBits, int kM, int kS>
void stream_product(const QuantWeight& w, const QuantTokens& x, int64_t t, int64_t apart, const Output& y) {
  Tile tile[kS];
  F32x16 total[kS][kM];
#pragma GCC unroll 4
  for (int s = 0; s < kS; ++s) tile[s] = tile_at(w, t + s * apart);
  stream_tiles<kBits, kM, kS>(w, tile, x, total);
#pragma GCC unroll 4
  for (int s = 0; s < kS; ++s)
#pragma GCC unroll 2
    for (int m = 0; m < kM; ++m) store_rows(y, m, 16 * (t + s * apart), w.rows, total[s][m]);
}

// Tiles that each of `streams` streams takes of `tiles`; what is left over comes afterwards. Streams a multiple of 4096
// bytes apart would take each other's places in the caches: a tenth slower.
inline int64_t stream_tiles_of(const QuantWeight& w, int64_t tiles, int64_t streams) {
  const int64_t part = tiles / streams;
  return part > 1 && part * w.step_bytes() % 4096 == 0 ? part - 1 : part;
}

template <int kBits, int kM>
void stream(const QuantWeight& w, const QuantTokens& x, int64_t t, int64_t end, const Output& y) {
  constexpr int kStreams = 4 / kM;
  while (end - t >= kStreams) {
    const int64_t part = stream_tiles_of(w, end - t, kStreams), next = t + kStreams * part;
    for (const int64_t until = t + part; t < until; ++t) stream_product<kBits, kM, kStreams>(w, x, t, part, y);
    t = next;
  }
  for (; t < end; ++t) stream_product<kBits, kM, 1>(w, x, t, 0, y);
}

// kS / 2 tiles of either weight, `apart` tiles from each other
template <int kBits, int kM, int kS>
void gated_stream_product(const QuantWeight& gate, const QuantWeight& up, const QuantTokens& x, int64_t t,
                          int64_t apart, const Output& y) {
  Tile tile[kS];
  F32x16 total[kS][kM];
#pragma GCC unroll 2
  for (int s = 0; s < kS / 2; ++s)
    tile[2 * s] = tile_at(gate, t + s * apart), tile[2 * s + 1] = tile_at(up, t + s * apart);
  stream_tiles<kBits, kM, kS>(gate, tile, x, total);
#pragma GCC unroll 2
  for (int s = 0; s < kS / 2; ++s)
#pragma GCC unroll 2
    for (int m = 0; m < kM; ++m)
      store_rows(y, m, 16 * (t + s * apart), gate.rows, mul(silu(total[2 * s][m]), total[2 * s + 1][m]));
}

template <int kBits, int kM>
void gated_stream(const QuantWeight& gate, const QuantWeight& up, const QuantTokens& x, int64_t t, int64_t end,
                  const Output& y) {
  constexpr int kPairs = 2 / kM;
  while (end - t >= kPairs) {
    const int64_t part = stream_tiles_of(gate, end - t, kPairs), next = t + kPairs * part;
    for (const int64_t until = t + part; t < until; ++t)
      gated_stream_product<kBits, kM, 2 * kPairs>(gate, up, x, t, part, y);
    t = next;
  }
  for (; t < end; ++t) gated_stream_product<kBits, kM, 2>(gate, up, x, t, 0, y);
}

inline void gated_product(const QuantWeight& gate, const QuantWeight& up, const QuantTokens& x, int64_t tokens,
                          int64_t begin, int64_t end, const Output& y) {
  if (gate.bits == 4 && tokens == 1) return gated_stream<4, 1>(gate, up, x, begin, end, y);
  if (gate.bits == 4) return gated_stream<4, 2>(gate, up, x, begin, end, y);
  if (tokens == 1) return gated_stream<8, 1>(gate, up, x, begin, end, y);
  gated_stream<8, 2>(gate, up, x, begin, end, y);
}

// Bytes of one tile in a panel: of each group the quads, unpacked, then scales [16] and group_values() [16] as float32.
constexpr int64_t kPanelLines = 128;
inline int64_t panel_group_bytes(const QuantWeight& w) { return w.group * 16 + kPanelLines; }
inline int64_t panel_tile_bytes(const QuantWeight& w) { return w.num_groups() * panel_group_bytes(w); }

// what follows a group's quads in a panel; gives where the next group begins
inline uint8_t* store_panel_lines(uint8_t* panel, const uint8_t* line) {
  const F32x16 scale = group_scales(line);
  auto* to = reinterpret_cast<float*>(panel);
  store(to, scale);
  store(to + 16, group_values(line, scale));
  return panel + kPanelLines;
}

// kT tiles times kM tokens held in registers. kPanel: the tiles lie unpacked in `panel`, one after the other; otherwise they
// are unpacked on the way. Every loop over sums is unrolled in full: one
// variable index, and the compiler keeps all of them in memory.
template <int kBits, bool kPanel, int kT, int kM>
void block(const QuantWeight& w, const QuantTokens& x, int64_t token, int64_t t, const Output& y,
           const uint8_t* panel) {
  Tile tile[kT];
  const uint8_t *v[kT], *second[kT];
  for (int i = 0; i < kT; ++i) {
    tile[i] = tile_at(w, t + i);
    v[i] = kPanel ? panel + i * panel_tile_bytes(w) : tile[i].groups;
    second[i] = tile[i].low;
  }
  alignas(64) float total[kT][kM][16] = {};
  for (int64_t g = 0; g < x.num_groups; ++g) {
    I32x16 acc[kT][kM];
    if constexpr (!kPanel) {
      for (int i = 0; i < kT; ++i) prefetch(v[i] + 2 * kPrefetch), v[i] += kLine;
    }
#pragma GCC unroll 16
    for (int m = 0; m < kM; ++m)
#pragma GCC unroll 4
      for (int i = 0; i < kT; ++i) acc[i][m] = start_value(w, tile[i], g, x.sums[(token + m) * x.num_groups + g]);
    const int8_t* q = x.q + token * x.padded_cols + g * w.group;
    for (int k = 0; k < w.group; k += kPanel ? 4 : 8) {
      U8x64 low[kT], high[kT];
#pragma GCC unroll 4
      for (int i = 0; i < kT; ++i) {
        const U8x64 raw = load_u8x64(v[i]);
        if constexpr (!kPanel) prefetch(v[i] + 2 * kPrefetch);
        if constexpr (kPanel) {
          low[i] = raw;
        } else if constexpr (kBits == 4) {
          low[i] = low_nibbles(raw), high[i] = high_nibbles(raw);
        } else {
          const U8x64 rest = load_u8x64(second[i]);
          prefetch(second[i] + 2 * kPrefetch);
          second[i] += 64;
          low[i] = join_low(raw, rest), high[i] = join_high(raw, rest);
        }
        v[i] += 64;
      }
#pragma GCC unroll 16
      for (int m = 0; m < kM; ++m) {
        const Quad a = load_quad(q + m * x.padded_cols + k);
#pragma GCC unroll 4
        for (int i = 0; i < kT; ++i)
          acc[i][m] = kBits == 4 ? dot_u4(acc[i][m], low[i], a) : dot_u8(acc[i][m], low[i], a);
      }
      if constexpr (!kPanel) {
#pragma GCC unroll 16
        for (int m = 0; m < kM; ++m) {
          const Quad a = load_quad(q + m * x.padded_cols + k + 4);
#pragma GCC unroll 4
          for (int i = 0; i < kT; ++i)
            acc[i][m] = kBits == 4 ? dot_u4(acc[i][m], high[i], a) : dot_u8(acc[i][m], high[i], a);
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kT; ++i) {
      F32x16 scale, values;
      if constexpr (kPanel) {
        const auto* floats = reinterpret_cast<const float*>(v[i]);
        scale = load(floats), values = load(floats + 16);
        v[i] += kPanelLines;
      } else {
        const uint8_t* line = line_of(w, tile[i], g);
        scale = group_scales(line), values = group_values(line, scale);
      }
#pragma GCC unroll 16
      for (int m = 0; m < kM; ++m) {
        const int64_t at = (token + m) * x.num_groups + g;
        const F32x16 sum = fmadd(values, set1(x.offsets[at]), load(total[i][m]));
        store(total[i][m], fmadd(to_f32(acc[i][m]), mul(scale, set1(x.scales[at])), sum));
      }
    }
  }
  for (int i = 0; i < kT; ++i)
    for (int m = 0; m < kM; ++m) store_rows(y, token + m, 16 * (t + i), w.rows, load(total[i][m]));
}

template <int kBits, bool kPanel, int kT, int kM>
void blocks(const QuantWeight& w, const QuantTokens& x, int64_t token, int64_t tokens, int64_t t, const Output& y,
            const uint8_t* panel) {
  for (; token + kM <= tokens; token += kM) block<kBits, kPanel, kT, kM>(w, x, token, t, y, panel);
  if constexpr (kM > 1) {
    // the tail takes the next smaller power of two instead of crawling token by token
    constexpr int kNext = kM > 8 ? 8 : kM > 4 ? 4 : kM / 2;
    if (token < tokens) blocks<kBits, kPanel, kT, kNext>(w, x, token, tokens, t, y, panel);
  }
}

// One tile as a panel has it. adjust(tile, g) gives what a group's codes go through on the way.
template <int kBits, class Adjust>
void unpack_tile(const QuantWeight& w, int64_t t, uint8_t* panel, const Adjust& adjust) {
  const Tile tile = tile_at(w, t);
  const uint8_t *v = tile.groups, *second = tile.low;
  for (int64_t g = 0; g < w.num_groups(); ++g) {
    const auto adjusted = adjust(tile, g);
    const uint8_t* line = v;
    prefetch(v + kPrefetch);
    v += kLine;
    for (int i = 0; i < w.group / 8; ++i, v += 64, panel += 128) {
      const U8x64 raw = load_u8x64(v);
      prefetch(v + kPrefetch);
      U8x64 low = low_nibbles(raw), high = high_nibbles(raw);
      if constexpr (kBits == 8) {
        const U8x64 rest = load_u8x64(second);
        prefetch(second + kPrefetch);
        second += 64;
        low = join_low(raw, rest), high = join_high(raw, rest);
      }
      store_u8x64(panel, adjusted(low));
      store_u8x64(panel + 64, adjusted(high));
    }
    panel = store_panel_lines(panel, line);
  }
}

template <int kBits, int kT>
void tiles_product(const QuantWeight& w, const QuantTokens& x, int64_t tokens, int64_t t, const Output& y,
                   uint8_t* panel) {
  if (tokens < kPanelTokens) return blocks<kBits, false, kT, kTokens>(w, x, 0, tokens, t, y, nullptr);
  const auto as_is = [](const Tile&, int64_t) { return [](U8x64 codes) { return codes; }; };
  for (int i = 0; i < kT; ++i) unpack_tile<kBits>(w, t + i, panel + i * panel_tile_bytes(w), as_is);
  blocks<kBits, true, kT, kTokens>(w, x, 0, tokens, t, y, panel);
}

template <int kBits>
void product_of(const QuantWeight& w, const QuantTokens& x, int64_t tokens, int64_t t, int64_t end, const Output& y,
                uint8_t* panel) {
  if (tokens == 1) return stream<kBits, 1>(w, x, t, end, y);
  if (tokens == 2) return stream<kBits, 2>(w, x, t, end, y);
  for (; t + kTiles <= end; t += kTiles) tiles_product<kBits, kTiles>(w, x, tokens, t, y, panel);
  for (; t < end; ++t) tiles_product<kBits, 1>(w, x, tokens, t, y, panel);
}

inline void product(const QuantWeight& w, const QuantTokens& x, int64_t tokens, int64_t tile_begin, int64_t tile_end,
                    const Output& y, uint8_t* panel) {
  w.bits == 4 ? product_of<4>(w, x, tokens, tile_begin, tile_end, y, panel)
              : product_of<8>(w, x, tokens, tile_begin, tile_end, y, panel);
}

inline int64_t panel_bytes(const QuantWeight& w) { return kTiles * panel_tile_bytes(w); }

inline void dequantize_row(const QuantWeight& w, int64_t row, float* out) {
  const Tile tile = tile_at(w, row / 16);
  const int64_t lane = row % 16;
  for (int64_t g = 0; g < w.num_groups(); ++g) {
    alignas(64) float scales[16];
    const uint8_t* line = line_of(w, tile, g);
    store(scales, group_scales(line));
    const int zero = w.asymmetric ? tile.zeros[16 * g + lane] : (w.bits == 4 ? 8 : 128);
    const int64_t end = w.cols < (g + 1) * w.group ? w.cols : (g + 1) * w.group;
    for (int64_t k = g * w.group; k < end; ++k) {
      const int64_t within = lane * 4 + k % 4;
      const uint8_t* at = line + kLine + (k - g * w.group) / 8 * 64 + within;
      const int shift = k % 8 < 4 ? 0 : 4;
      int value = at[0] >> shift & 15;
      if (w.bits == 8) value = value << 4 | (tile.low[k / 8 * 64 + within] >> shift & 15);
      out[k] = scales[lane] * static_cast<float>(value - zero);
    }
  }
}

inline void gated(const float* gate, const float* up, float* out, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    const int left = n - i < 16 ? static_cast<int>(n - i) : 16;
    store_n(out + i, mul(silu(load_n(gate + i, left)), load_n(up + i, left)), left);
  }
}

inline void weighted_sum(const float* const* rows, const float* weights, int count, int64_t n, void* out, int dtype) {
  for (int64_t i = 0; i < n; i += 16) {
    const int left = n - i < 16 ? static_cast<int>(n - i) : 16;
    F32x16 sum = zero_f32();
    for (int j = 0; j < count; ++j) sum = fmadd(set1(weights[j]), load_n(rows[j] + i, left), sum);
    if (dtype == 0) store_as_n<0>(out, i, sum, left);
    if (dtype == 1) store_as_n<1>(out, i, sum, left);
    if (dtype == 2) store_as_n<2>(out, i, sum, left);
  }
}

inline LinearKernels make_linear_kernels() {
  return {quantize, product, gated_product, dequantize_row, gated, weighted_sum, panel_bytes};
}

}  // namespace llmopt::LLMOPT_ISA
