// Loops of packed_tiles, plain ones that the compiler vectorizes; compiled once per ISA.
#pragma once
#include <cstring>

#include "packed_tiles.h"

namespace llmopt::LLMOPT_ISA {

constexpr int kRows = 16, kMostGroup = 128;

// Codes of one group of one tile: [row][column], and where they go.
struct Block {
  uint8_t q[kRows][kMostGroup];
};

struct Tiles : PackedTiles {
  int64_t given_row(int64_t tile) const { return (tile - first) * kRows; }
  int middle() const { return weight.bits == 4 ? 8 : 128; }
  int64_t real_rows(int64_t tile) const {
    return weight.rows - tile * kRows < kRows ? weight.rows - tile * kRows : kRows;
  }
  int64_t real_cols(int64_t group) const {
    const int64_t left = weight.cols - group * weight.group;
    return left < weight.group ? left : weight.group;
  }
  uint8_t* zero_points(int64_t tile) const { return out + tile * weight.step_bytes(); }
  // a group's scales, and behind them its sums
  uint8_t* line(int64_t tile, int64_t group) const {
    return zero_points(tile) + weight.zeros_bytes() + group * weight.group_bytes();
  }
  uint8_t* vectors(int64_t tile, int64_t group) const { return line(tile, group) + kLine; }
  // 8 bits: a group's vectors of the second plane
  uint8_t* low_vectors(int64_t tile, int64_t group) const {
    return out + weight.low_plane(tile) + group * weight.group * 8;
  }

  // Scales, sums and zeros of a tile whose vectors are there already; those of rows that are padding are 0.
  void write_lines(int64_t tile) const {
    const int64_t groups = weight.num_groups(), rows = real_rows(tile);
    std::memset(zero_points(tile), 0, static_cast<size_t>(weight.zeros_bytes()));
    for (int64_t g = 0; g < groups; ++g) {
      uint8_t* to = line(tile, g);
      std::memset(to, 0, kLine);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t from = (given_row(tile) + r) * groups + g;
        std::memcpy(to + 2 * r, scales + from, 2);
        if (zeros) zero_points(tile)[g * kRows + r] = zeros[from];
      }
      write_sums(tile, g);
    }
  }

  // a group's sums of codes, row by row
  void sum_codes(int64_t tile, int64_t group, int32_t (&sum)[kRows]) const {
    std::memset(sum, 0, sizeof(sum));
    for (int plane = 0; plane < weight.bits / 4; ++plane) {
      const uint8_t* from = plane == 0 ? vectors(tile, group) : low_vectors(tile, group);
      // bytes hold the sums of sixteen nibbles
      uint32_t low[kRows] = {}, high[kRows] = {};
      for (int v = 0; v < weight.group / 8; ++v)
        for (int r = 0; r < kRows; ++r) {
          uint32_t lane;
          std::memcpy(&lane, from + (v * kRows + r) * 4, 4);
          low[r] += lane & 0x0f0f0f0fu;
          high[r] += lane >> 4 & 0x0f0f0f0fu;
        }
      const int32_t unit = weight.bits == 8 && plane == 0 ? 16 : 1;
      for (int r = 0; r < kRows; ++r) {
        const uint32_t pairs = (low[r] & 0x00ff00ffu) + (low[r] >> 8 & 0x00ff00ffu) + (high[r] & 0x00ff00ffu) +
                               (high[r] >> 8 & 0x00ff00ffu);
        sum[r] += unit * static_cast<int32_t>((pairs & 0xffffu) + (pairs >> 16));
      }
    }
  }

  void write_sums(int64_t tile, int64_t group) const {
    int32_t sum[kRows];
    sum_codes(tile, group, sum);
    uint8_t* to = line(tile, group) + kRows * 2;
    const uint8_t* zero_of = zero_points(tile) + group * kRows;
    for (int64_t r = 0; r < kRows; ++r) {
      const int zero = weight.asymmetric ? zero_of[r] : middle();
      const auto value = static_cast<int16_t>(sum[r] - zero * weight.group);
      std::memcpy(to + 2 * r, &value, 2);
    }
  }

  // fills what is padding in a block with codes that stand for 0
  void pad(Block& block, int64_t tile, int64_t group) const {
    const int64_t rows = real_rows(tile), cols = real_cols(group);
    for (int64_t r = 0; r < kRows; ++r) {
      const int zero = !zeros ? middle() : (r < rows ? zeros[(given_row(tile) + r) * weight.num_groups() + group] : 0);
      const int64_t from = r < rows ? cols : 0;
      std::memset(block.q[r] + from, zero, static_cast<size_t>(weight.group - from));
    }
  }

  // Eight codes of a row, given as two quads of bytes: its part of a vector, and with 8 bits of another in the low plane.
  void write_quads(uint8_t* to, uint8_t* low, uint32_t quad, uint32_t next) const {
    constexpr uint32_t kLow = 0x0f0f0f0fu, kHigh = 0xf0f0f0f0u;
    const bool whole = weight.bits == 4;
    const uint32_t first = whole ? quad | next << 4 : (quad >> 4 & kLow) | (next & kHigh);
    const uint32_t second = (quad & kLow) | (next << 4 & kHigh);
    std::memcpy(to, &first, 4);
    if (!whole) std::memcpy(low, &second, 4);
  }

  void write_block(const Block& block, int64_t tile, int64_t group) const {
    uint8_t *to = vectors(tile, group), *low = low_vectors(tile, group);
    for (int64_t k = 0; k < weight.group; k += 8)
      for (int r = 0; r < kRows; ++r, to += 4, low += 4) {
        uint32_t quad, next;
        std::memcpy(&quad, block.q[r] + k, 4);
        std::memcpy(&next, block.q[r] + k + 4, 4);
        write_quads(to, low, quad, next);
      }
  }
};

// Four codes of four bits, the first in the lowest bits, as four bytes.
inline uint32_t spread(uint32_t x) {
  x = (x | x << 8) & 0x00ff00ffu;
  return (x | x << 4) & 0x0f0f0f0fu;
}

// words [ceil(cols * bits / 32), stride]: a word holds consecutive columns of a row, the first in the lowest bits
inline void pack_words(const PackedTiles& tiles, const uint32_t* words, int64_t stride, int64_t tile) {
  const Tiles t{tiles};
  const int bits = t.weight.bits, per_word = 32 / bits;
  const int64_t rows = t.real_rows(tile);
  for (int64_t g = 0; g < t.weight.num_groups(); ++g) {
    const uint32_t* from = words + g * t.weight.group / per_word * stride + tile * kRows;
    const int64_t cols = t.real_cols(g);
    if (rows == kRows && cols == t.weight.group) {
      uint8_t *to = t.vectors(tile, g), *low = t.low_vectors(tile, g);
      for (int64_t k = 0; k < cols; k += 8, from += 8 / per_word * stride, to += 64, low += 64)
        for (int r = 0; r < kRows; ++r)
          bits == 8 ? t.write_quads(to + 4 * r, low + 4 * r, from[r], from[stride + r])
                    : t.write_quads(to + 4 * r, nullptr, spread(from[r] & 0xffffu), spread(from[r] >> 16));
      continue;
    }
    Block block;
    for (int64_t k = 0; k < cols; ++k)
      for (int64_t r = 0; r < rows; ++r)
        block.q[r][k] =
            static_cast<uint8_t>(from[k / per_word * stride + r] >> (k % per_word * bits) & ((1u << bits) - 1));
    t.pad(block, tile, g);
    t.write_block(block, tile, g);
  }
  t.write_lines(tile);
}

inline float value(const float* from, int64_t k) { return from[k]; }
inline float value(const uint16_t* from, int64_t k) {
  const uint32_t wide = static_cast<uint32_t>(from[k]) << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

// Rounds one row of one group; false if a weight is NaN or Inf. The operations and their order are the reference's.
template <typename T>
bool round_row(const T* from, int64_t n, float scale, float zero, float top, uint8_t* codes) {
  uint32_t worst = 0;
  for (int64_t k = 0; k < n; ++k) {
    const float x = value(from, k);
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bits &= 0x7fffffffu;
    worst = bits > worst ? bits : worst;
    float q = x / scale + zero;
    q = q < 0.0f ? 0.0f : q;
    q = q > top ? top : q;
    // adding 1.5 * 2^23 leaves the nearest integer, ties to even, in the low bits
    q += 12582912.0f;
    std::memcpy(&bits, &q, 4);
    codes[k] = static_cast<uint8_t>(bits);
  }
  return worst < 0x7f800000u;
}

inline float half_to_float(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16, rest = bits & 0x7fffu;
  uint32_t wide = rest << 13;
  float x;
  std::memcpy(&x, &wide, 4);
  x *= 0x1p112f;
  return sign ? -x : x;
}

template <typename T>
bool pack_nearest(const PackedTiles& tiles, const void* values, int64_t stride, int64_t tile) {
  const Tiles t{tiles};
  const T* weight = static_cast<const T*>(values);
  const int64_t rows = t.real_rows(tile), groups = t.weight.num_groups();
  bool finite = true;
  for (int64_t g = 0; g < groups; ++g) {
    Block block;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = t.given_row(tile) + r, at = row * groups + g;
      const auto zero = static_cast<float>(t.zeros ? t.zeros[at] : t.middle());
      finite &= round_row(weight + row * stride + g * t.weight.group, t.real_cols(g), half_to_float(t.scales[at]), zero,
                          t.weight.bits == 4 ? 15.0f : 255.0f, block.q[r]);
    }
    t.pad(block, tile, g);
    t.write_block(block, tile, g);
  }
  t.write_lines(tile);
  return finite;
}

inline void pack_sums(const PackedTiles& tiles, int64_t tile) {
  const Tiles t{tiles};
  for (int64_t g = 0; g < t.weight.num_groups(); ++g) t.write_sums(tile, g);
}

inline PackKernels make_pack_kernels() { return {pack_words, pack_nearest<float>, pack_nearest<uint16_t>, pack_sums}; }

}  // namespace llmopt::LLMOPT_ISA
